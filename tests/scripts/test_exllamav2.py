"""ExLlamaV2's procedure, as the benchmarks restate it, against plain statements of the same."""

import os
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.codecs.exl2 import Group, step_sizes
from quantize.layouts import ATTENTION, DOWN, GATE_UP, Layout
from quantize.reference import INPUTS
from scripts.quality import exllamav2_options
from scripts.quality.exllamav2_options import OPTIONS, Way, anneal, choose, spend
from scripts.quality.exllamav2_solver import find_scales, invert, quantize

GROUPS = (Group(6, 32), Group(4, 32), Group(3, 64), Group(2, 32))


def hessian(k: int, seed: int = 0) -> torch.Tensor:
    """Return the sum of x xᵀ over tokens whose features are unlike each other and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(4 * k, k, generator=generator) @ mix * torch.linspace(0.2, 3, k).flip(0)
    H: torch.Tensor = x.T @ x
    return H


def stated(W: torch.Tensor, H: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    """Return the weights, f64 (N, K), by the algorithm as it is described, a column at a time in f64."""
    order = torch.argsort(H.diagonal(), descending=True)
    damped = H.double()[order][:, order]
    damped += 0.12 * damped.diagonal().mean() * torch.eye(len(H))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, made, start = W.double()[:, order], torch.zeros(W.shape, dtype=torch.float64), 0
    for group in groups:
        zero, top = 2 ** (group.bits - 1), 2**group.bits - 1
        inside = left[:, start : start + group.size]
        base = inside.abs().amax(1) * 2 / top
        scale = ((base / base.max()).sqrt() * 16).round().clamp(1, 16)
        losses = {}
        for i in range(97):
            maximum = base.max() * (0.7 + 0.5 * i / 96)
            step = ((scale / 16).square() * maximum)[:, None]
            error = ((inside / step).round() + zero).clamp(0, top) * step - zero * step - inside
            losses[float(maximum)] = float(error.abs().pow(3.5).sum())
        best = torch.tensor([min(losses, key=lambda maximum: losses[maximum])]).half()
        step = step_sizes(scale[:, None], best)[:, 0].half()
        for k in range(start, start + group.size):
            code = ((left[:, k] / step.double()).round() + zero).clamp(0, top)
            made[:, k] = ((code - zero).half() * step).double()
            error = (left[:, k] - made[:, k]) / upper[k, k]
            left[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
        start += group.size
    return made[:, torch.argsort(order)]


def test_the_solver_does_what_it_states() -> None:
    W = torch.randn(96, 160, generator=torch.Generator().manual_seed(1)) * 0.05
    H = hessian(160)
    made, plain = quantize(W, invert(H), GROUPS).weights(), stated(W, H, GROUPS)
    # A code at a tie is rounded otherwise in f32, and what follows it in that output is then another.
    same = (made.double() == plain).float().mean()
    assert same > 0.98
    losses = [torch.trace((V - W.double()) @ H.double() @ (V - W.double()).T) for V in (made.double(), plain)]
    assert float(losses[0] / losses[1]) == pytest.approx(1, abs=1e-3)


def test_outputs_and_inputs_of_zeros_become_zeros() -> None:
    W, H = torch.randn(64, 160, generator=torch.Generator().manual_seed(5)) * 0.05, hessian(160)
    H[:, 96:] = H[96:] = 0
    W[:, 96:] = 0
    W[:, 150] = 1e-7
    W[3] = 0
    made = quantize(W, invert(H), GROUPS).weights()
    assert bool(torch.isfinite(made).all())
    assert not bool(made[:, 96:].any() or made[3].any())


@pytest.mark.parametrize("n_outputs", [4, 300])
def test_the_scales_are_the_best_of_those_tried(n_outputs: int) -> None:
    x = torch.randn(32, n_outputs, generator=torch.Generator().manual_seed(3)) * 0.1
    scales, maximum = find_scales(x, 3)
    peak = float(x.abs().max()) / 3.5

    def lost(share: float) -> float:
        step = (scales / 16).square() * peak * share
        return float((((x / step).round().clamp(-4, 3) * step) - x).double().abs().pow(3.5).sum())

    shares = [0.7 + 0.5 * i / 96 for i in range(97)]
    assert float(maximum) / peak == pytest.approx(min(shares, key=lost), rel=2e-3)


def test_what_it_chooses_among_is_what_ours_are_made_of() -> None:
    for module, options in OPTIONS.items():
        assert [set(option) for option in options] == [set(options[0])] * len(options)
        for linear in options[0]:
            known = DOWN if "down" in linear else GATE_UP if module == "mlp" else ATTENTION
            assert {option[linear] for option in options} <= set(known)
    assert {linear for options in OPTIONS.values() for linear in options[0]} == set(INPUTS)


@pytest.mark.skipif("DSCQ_EXLLAMAV2" not in os.environ, reason="needs scripts/exllamav2_sources")
def test_the_options_are_exllamav2s() -> None:
    stated = runpy.run_path(str(Path(os.environ["DSCQ_EXLLAMAV2"]) / "conversion" / "qparams.py"))
    for module, table in (("self_attn", stated["qparams_attn"]), ("mlp", stated["qparams_mlp"])):
        theirs = [[plain(each.group_size, each.bits, each.bits_prop) for each in row] for row in table]
        ours = [[parts(each) for each in option.values()] for option in OPTIONS[module]]
        assert theirs == ours


def plain(sizes: dict[int, int], bits: list[int], shares: list[float]) -> list[tuple[int, int, Any]]:
    """Return a layout of ExLlamaV2's as (bits, group size, share)."""
    return [(b, sizes[b], pytest.approx(share)) for b, share in zip(bits, shares, strict=True)]


def parts(layout: Layout) -> list[tuple[int, int, float]]:
    """Return a layout of ours as (bits, group size, share)."""
    return [(part.bits, part.group_size, part.share) for part in layout.parts]


def slots(n: int) -> list[list[Way]]:
    """Return slots of four options each, whose errors fall with bits."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.rand(n, generator=generator)
    return [[Way(100 * (i + 2), float(w) * 2.0**-i) for i in range(4)] for w in weight]


def total(found: list[list[Way]], choice: tuple[int, ...], of: Callable[[Way], Any]) -> Any:
    """Return the sum over slots of something of the ways chosen."""
    return sum(of(slot[i]) for slot, i in zip(found, choice, strict=True))


@pytest.mark.parametrize("budget", [1000, 1500, 1900])
def test_annealing_finds_near_the_best_and_stays_within_the_budget(budget: int) -> None:
    some = slots(5)
    runs = [anneal(some, budget, 2.0, seed) for seed in range(20)]
    best = min(
        total(some, choice, lambda way: way.error**2)
        for choice in product(range(4), repeat=5)
        if total(some, choice, lambda way: way.bits) <= budget
    )
    assert all(total(some, run.choice, lambda way: way.bits) <= budget for run in runs)
    for run in runs:
        assert run.total == pytest.approx(total(some, run.choice, lambda way: way.error**2), abs=1e-4)
        assert run.largest == max(slot[i].error for slot, i in zip(some, run.choice, strict=True))
    assert min(run.total for run in runs) <= best * 1.1 + 1e-4


def test_the_choice_is_the_same_every_time_and_spends_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exllamav2_options, "RUNS", 3)
    some = slots(6)
    found = choose(some, 1700)
    assert choose(some, 1700) == found
    left = 1700 - total(some, found, lambda way: way.bits)
    assert 0 <= left < 100 or found == (3,) * 6
    assert spend(some, 10_000, (0,) * 6) == (3,) * 6
    with pytest.raises(ValueError, match="less than the first options"):
        choose(some, 1199)
