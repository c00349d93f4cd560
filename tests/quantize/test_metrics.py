"""KL divergence, agreement and perplexity against figures worked out by hand."""

import math

import pytest
import torch

from quantize.metrics import Comparison, Divergence, chunks, kl_divergence


def log_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_logits(n: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def test_kl_by_hand() -> None:
    kl = kl_divergence(log_of(0.5, 0.5), log_of(0.25, 0.75))
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    assert kl.dtype == torch.float64


def test_kl_of_equal_logits_is_exactly_zero() -> None:
    logits = random_logits(50, 3000, 0)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(50, dtype=torch.float64))


def test_kl_ignores_a_constant_and_is_never_negative() -> None:
    logits = random_logits(50, 3000, 0)
    shifted = kl_divergence(logits, logits + 3.0)
    assert (shifted >= 0).all() and shifted.max() < 1e-12
    nudged = kl_divergence(logits, logits + 1e-7 * random_logits(50, 3000, 1))
    assert (nudged >= 0).all()


def test_small_divergences_are_resolved() -> None:
    # For q = p (1 + u), E_p[u] = 0, the divergence is E_p[u^2] / 2: here 1e-8, far below f32's resolution.
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    q = p * (1 + math.sqrt(2e-8) * torch.tensor([1.0, -1.0]))
    assert kl_divergence(p.log()[None], q.log()[None]).item() == pytest.approx(1e-8, rel=1e-3)


def test_broken_logits_diverge_infinitely() -> None:
    good = random_logits(1, 5, 0)
    broken, ruled_out = good.clone(), good.clone()
    broken[0, 2], ruled_out[0, 2] = math.nan, -math.inf
    assert kl_divergence(good, broken).item() == math.inf
    assert kl_divergence(good, ruled_out).item() == math.inf
    assert 0 < kl_divergence(ruled_out, good).item() < math.inf


def test_figures_by_hand() -> None:
    reference = torch.cat([log_of(0.5, 0.25, 0.25)] * 4)
    other = torch.cat(
        [log_of(0.5, 0.25, 0.25), log_of(0.25, 0.5, 0.25), log_of(0.5, 0.25, 0.25), log_of(0.25, 0.5, 0.25)]
    )
    comparison = Comparison()
    comparison.add(reference[:2], other[:2], torch.tensor([0, 1]))
    comparison.add(reference[2:], other[2:], torch.tensor([2]), first_position=2)
    off = 0.25 * math.log(2)
    found = comparison.divergence()
    assert found is not None
    assert found.n_positions == 4
    assert found.mean == pytest.approx(off / 2)
    assert (found.median, found.p99, found.max) == pytest.approx((0.0, off, off))
    assert found.top1_agreement == 0.5
    assert found.perplexity_reference == pytest.approx((2 * 4 * 4) ** (1 / 3))
    assert found.perplexity_other == pytest.approx((2 * 2 * 4) ** (1 / 3))


def test_late_positions_are_counted_apart() -> None:
    logits = random_logits(6, 8, 0)
    other = logits.clone()
    other[4:] = random_logits(2, 8, 1)
    comparison = Comparison()
    comparison.add(logits, other, torch.arange(5))
    late = comparison.divergence(from_position=4)
    assert late is not None
    assert late.n_positions == 2
    assert late.mean == pytest.approx(kl_divergence(logits[4:], other[4:]).mean().item())
    assert comparison.divergence(from_position=6) is None
    assert Comparison().divergence() is None


def test_chunks_do_not_change_the_figures() -> None:
    reference, other, ids = random_logits(33, 50, 0), random_logits(33, 50, 1), torch.arange(32)
    whole, parts = Comparison(), Comparison()
    whole.add(reference, other, ids)
    for start, end in chunks(33, 10):
        parts.add(reference[start:end], other[start:end], ids[start:end], start)
    assert parts.divergence() == whole.divergence()


def test_p99_is_the_value_that_99_percent_do_not_exceed() -> None:
    reference = torch.zeros(200, 2)
    other = torch.zeros(200, 2)
    other[:, 0] = torch.arange(200) / 200
    comparison = Comparison()
    comparison.add(reference, other, torch.zeros(199, dtype=torch.int64))
    found = comparison.divergence()
    assert isinstance(found, Divergence)
    assert found.p99 == kl_divergence(reference, other)[197].item()


def test_a_nan_loss_is_not_an_unknown_one() -> None:
    broken = torch.full((2, 4), math.nan)
    comparison = Comparison()
    comparison.add(torch.zeros(2, 4), broken, torch.tensor([1]))
    found = comparison.divergence()
    assert found is not None and found.perplexity_other == math.inf
