"""Sums of x x^T against XᵀX by hand, and the packed form against what it was made from."""

import pytest
import torch

from quantize.statistics import PackedStatistics, SecondMoment, Statistics, merge, pack, unpack

CPU = torch.device("cpu")


def inputs_of(n_tokens: int, n_columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated columns of very different sizes, as activations are; column 3 is dead."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n_tokens, n_columns, generator=generator) @ torch.randn(
        n_columns, n_columns, generator=generator
    )
    inputs = mixed * torch.logspace(-2, 2, n_columns)
    inputs[:, 3] = 0
    return inputs


def by_hand(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double() / len(inputs)


def gathered(inputs: torch.Tensor, split: int, diagonal_only: bool = False) -> SecondMoment:
    moment = SecondMoment(inputs.shape[1], CPU, diagonal_only)
    for part in torch.split(inputs, split):
        moment.add(part)
    return moment


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius distance of correlation matrices: large columns must not hide small ones."""
    scales = wanted.diagonal().sqrt().clamp_min(1e-30)
    difference = (found.double() - wanted) / scales / scales[:, None]
    return float(difference.norm() / (wanted / scales / scales[:, None]).norm())


@pytest.mark.parametrize("n_columns", [5, 128, 129, 300, 1100])
def test_panels_hold_the_whole_product(n_columns: int) -> None:
    inputs = inputs_of(70, n_columns)
    statistics = gathered(inputs, 32).statistics()
    assert statistics.hessian is not None
    assert statistics.n_tokens == 70
    assert torch.equal(statistics.hessian, statistics.hessian.T)
    assert torch.equal(statistics.hessian.diagonal(), statistics.diagonal)
    assert distance(statistics.hessian, by_hand(inputs)) < 1e-6


def test_the_panels_need_little_more_than_half_of_the_matrix() -> None:
    moment = SecondMoment(2048, CPU)
    assert sum(panel.numel() for panel in moment.panels) < 0.57 * 2048**2


def test_half_a_million_tokens_however_they_are_split() -> None:
    # Sixteen tokens at a time make 31,250 additions, far more than any micro-batch does.
    inputs = inputs_of(500_000, 24)
    inputs[:, 5] += 300  # a mean far from zero: all products of one sign, the worst case of a running sum
    wanted = by_hand(inputs)
    few, many = (gathered(inputs, split).statistics().hessian for split in (2048, 16))
    assert few is not None and many is not None
    assert distance(few, wanted) < 1e-5
    assert distance(many, wanted) < 1e-5


def test_the_diagonal_alone_is_that_of_the_hessian() -> None:
    inputs = inputs_of(500, 40)
    alone = gathered(inputs, 64, diagonal_only=True).statistics()
    assert alone.hessian is None
    assert torch.allclose(alone.diagonal.double(), by_hand(inputs).diagonal(), rtol=1e-6)


def test_no_tokens_are_zeros() -> None:
    statistics = SecondMoment(4, CPU).statistics()
    assert statistics.n_tokens == 0
    assert statistics.hessian is not None and not statistics.hessian.any()


@pytest.mark.parametrize("n_columns", [5, 129, 3000])
def test_packing_errs_by_half_a_step_of_correlation(n_columns: int) -> None:
    original = gathered(inputs_of(40, n_columns), 40).statistics()
    packed = pack(original)
    back = unpack(packed)
    assert original.hessian is not None and back.hessian is not None and packed.correlations is not None
    assert packed.correlations.dtype == torch.int16
    assert len(packed.correlations) == n_columns * (n_columns - 1) // 2
    scales = original.diagonal.sqrt()
    error = (back.hessian - original.hessian).abs() / (scales * scales[:, None]).clamp_min(1e-30)
    assert error.max() <= 0.5 / 32767 + 1e-6
    assert torch.equal(back.diagonal, original.diagonal)
    assert torch.equal(back.hessian.diagonal(), original.diagonal)
    assert torch.equal(back.hessian, back.hessian.T)


def test_a_dead_column_survives() -> None:
    back = unpack(pack(gathered(inputs_of(40, 9), 40).statistics()))
    assert back.hessian is not None
    assert not back.hessian[3].any() and not back.hessian[:, 3].any()
    assert back.hessian.isfinite().all()
    assert (back.diagonal[:3] > 0).all()


def test_columns_of_any_size_survive() -> None:
    inputs = inputs_of(40, 6) * torch.tensor([1e-18, 1e-15, 1, 1, 1e10, 1e15])
    original = gathered(inputs, 40).statistics()
    back = unpack(pack(original))
    assert back.hessian is not None and original.hessian is not None
    assert back.hessian.isfinite().all()
    assert back.hessian[0, 5] == pytest.approx(float(original.hessian[0, 5]), rel=1e-2)


@pytest.mark.parametrize("n_columns", [5, 300, 3000])
def test_packing_from_the_panels_gives_the_same_bits(n_columns: int) -> None:
    moment = gathered(inputs_of(40, n_columns), 40)
    one, other = moment.packed(), pack(moment.statistics())
    assert one.correlations is not None and other.correlations is not None
    assert torch.equal(one.correlations, other.correlations)
    assert torch.equal(one.diagonal, other.diagonal)


def test_the_diagonal_alone_packs_as_itself() -> None:
    packed = PackedStatistics(3, torch.ones(4), None)
    assert pack(unpack(packed)) == packed


def test_merging_weighs_by_tokens() -> None:
    inputs = inputs_of(90, 12)
    parts = [gathered(part, 90).statistics() for part in (inputs[:20], inputs[20:])]
    merged = merge(*parts)
    assert merged.n_tokens == 90
    assert merged.hessian is not None
    assert distance(merged.hessian, by_hand(inputs)) < 1e-6
    assert torch.allclose(merged.diagonal, merged.hessian.diagonal())
    assert merge(parts[0], Statistics(5, parts[1].diagonal, None)).hessian is None


def test_merging_other_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="4 and of 5 columns"):
        merge(Statistics(1, torch.ones(4), None), Statistics(1, torch.ones(5), None))
