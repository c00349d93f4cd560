"""The solver against plain statements of itself: GPTQ written out, and the enumerated optimum."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch

from quantize.errors import HessianError, UsageError
from quantize.solver import compensate as walk
from quantize.solver import descend as descent
from quantize.solver.compensate import compensate
from quantize.solver.descend import descend, in_place, loss, refit_scales
from quantize.solver.factor import Factor, Order, column_order, prepare
from quantize.solver.grid import Grid, affine_grid
from quantize.solver.scales import plain_scales

ORDERS: tuple[Order, ...] = get_args(Order)
UNEVEN = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, k) and a Hessian whose columns are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=generator)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    X = torch.randn(4 * k, k, generator=generator) @ mix * torch.rand(k, generator=generator).add(0.1)
    return W, X.T @ X / len(X)


def grids(W: torch.Tensor, group_size: int, bits: int) -> list[Grid]:
    """A symmetric grid, one with zero-points, and one of uneven levels with some scales negative."""
    group = torch.arange(W.shape[1]) // group_size
    both = [affine_grid(*plain_scales(W, group, bits, symmetric), group, bits) for symmetric in (True, False)]
    sign = 1 - 2 * (torch.arange(len(W)) % 2).float()[:, None]
    scale = both[0].scale * 2.0 ** (bits - 1) / 127 * sign
    return [*both, Grid(scale, torch.zeros_like(scale), group, UNEVEN)]


def gptq(W: torch.Tensor, factor: Factor, grid: Grid) -> torch.Tensor:
    """The algorithm as its paper states it, in f64 and unblocked: factor of the inverse, errors over U_jj."""
    U = torch.linalg.cholesky(torch.linalg.inv(factor.hessian.double()), upper=True)
    left = W.double()[:, factor.order].clone()
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for i, column in enumerate(factor.order.tolist()):
        group = grid.group[column]
        values = grid.scale[:, group, None].double() * grid.levels + grid.base[:, group, None].double()
        code = (left[:, i, None] - values).abs().argmin(1)
        codes[:, column] = code.to(torch.uint8)
        error = (left[:, i] - values.gather(1, code[:, None])[:, 0]) / U[i, i]
        left[:, i:] -= error[:, None] * U[i, i:]
    return codes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", range(3))
def test_compensation_is_gptq(order: Order, kind: int) -> None:
    W, H = problem(70, 96)
    factor, grid = prepare(H, order=order, group_size=32), grids(W, 32, 4)[kind]
    expected = gptq(W, factor, grid)
    for block in (1, 13, 64, 96):
        assert torch.equal(compensate(W, factor, grid, block), expected)


@pytest.mark.parametrize("kind", range(3))
def test_torch_and_the_compiled_loops_agree(kind: int) -> None:
    W, H = problem(70, 40)
    factor, grid = prepare(H, order="natural"), grids(W, 8, 3)[kind]
    codes, errors = walk.round_block(W, W, factor.feedback, grid)
    same_codes, same_errors = walk._round_block(W, W, factor.feedback, grid)
    assert torch.equal(codes, same_codes)
    torch.testing.assert_close(errors, same_errors, rtol=0, atol=1e-5)
    gradient, codes = (W - grid.values(grid.nearest(W))) @ H, grid.nearest(W)
    one, other = (f(gradient, H, grid, codes) for f in (descent.move_block, descent._move_columns))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[0], codes)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5)


def test_rows_are_independent() -> None:
    W, H = problem(130, 64)
    factor, grid = prepare(H, group_size=16), grids(W, 16, 4)[0]
    codes = compensate(W, factor, grid)
    parts = [
        compensate(W[a:b], factor, replace(grid, scale=grid.scale[a:b], base=grid.base[a:b]))
        for a, b in ((0, 1), (1, 67), (67, 130))
    ]
    assert torch.equal(torch.cat(parts), codes)
    assert torch.equal(compensate(W, factor, grid), codes)


@pytest.mark.parametrize("kind", range(2))
def test_never_below_the_optimum_and_near_it(kind: int) -> None:
    """Four columns and 2 bits: all 256 codes of a row are tried."""
    W, H = problem(200, 4, seed=1)
    factor, grid = prepare(H, damp=0.0, order="activation"), grids(W, 4, 2)[kind]
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    losses = torch.stack([loss(W, grid.values(codes.expand(len(W), 4)), H) for codes in every])
    best = losses.amin(0)
    compensated = compensate(W, factor, grid)
    descended = descend(W, compensated, H, grid, 4)
    for codes in (compensated, descended):
        assert bool((loss(W, grid.values(codes), H) >= best * (1 - 1e-4) - 1e-6).all())
    nearest = loss(W, grid.values(grid.nearest(W)), H).mean()
    reached = loss(W, grid.values(descended), H).mean()
    assert reached < best.mean() + 0.25 * (nearest - best.mean())


def test_each_step_lowers_the_loss_on_average() -> None:
    W, H = problem(256, 128, seed=2)
    factor, grid = prepare(H, group_size=32), grids(W, 32, 3)[0]
    compensated = compensate(W, factor, grid)
    descended = descend(W, compensated, H, grid)
    steps = [float(loss(W, grid.values(c), H).mean()) for c in (grid.nearest(W), compensated, descended)]
    assert steps[0] * 0.8 > steps[1] > steps[2]


@pytest.mark.parametrize("kind", range(3))
def test_descent_never_raises_the_loss_of_a_row(kind: int) -> None:
    W, H = problem(90, 96, seed=3)
    grid = grids(W, 32, 3)[kind]
    codes = grid.nearest(W)
    for _ in range(4):
        before = loss(W, grid.values(codes), H)
        codes = descend(W, codes, H, grid, block=40)
        after = loss(W, grid.values(codes), H)
        assert bool((after <= before * (1 + 1e-5)).all())
    fixed = descend(W, codes, H, grid, 30)
    # At the end no single code can be moved to its gain.
    least = loss(W, grid.values(fixed), H)
    for column in range(0, 96, 7):
        for step in (-1, 1):
            other = fixed.int()
            other[:, column] = (other[:, column] + step).clamp(0, len(grid.levels) - 1)
            assert bool((loss(W, grid.values(other), H) >= least * (1 - 1e-5)).all())


@pytest.mark.parametrize("bases", [False, True])
def test_refitting_scales_reaches_least_squares(bases: bool) -> None:
    W, H = problem(20, 48, seed=4)
    grid = grids(W, 16, 3)[1]
    codes, rough = grid.nearest(W), replace(grid, scale=grid.scale * 0.9)
    fitted = rough
    for _ in range(400):
        fitted = refit_scales(W, codes, H, fitted, half=False, bases=bases)
    levels = grid.levels[codes.long()].double()
    one_hot = torch.nn.functional.one_hot(grid.group, 3).double()
    root = torch.linalg.cholesky(H.double())
    for row in range(20):
        basis = levels[row, :, None] * one_hot
        rest = W[row].double() - (0 if bases else rough.base[row, grid.group].double())
        basis = torch.cat([basis, one_hot], 1) if bases else basis
        exact = torch.linalg.lstsq(root.T @ basis, (root.T @ rest)[:, None]).solution[:, 0]
        miss = root.T @ (rest - basis @ exact)
        reached = float(loss(W, fitted.values(codes), H)[row])
        assert reached == pytest.approx(float(miss.square().sum()), rel=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_half_precision_scales_never_raise_the_loss(symmetric: bool) -> None:
    W, H = problem(64, 96, seed=5)
    group = torch.arange(96) // 32
    scale, zero = plain_scales(W, group, 3, symmetric)
    grid = affine_grid(scale, zero, group, 3)
    codes = grid.nearest(W)
    for _ in range(3):
        before = loss(W, grid.values(codes), H)
        grid = refit_scales(W, codes, H, grid, zeros=zero)
        assert bool((loss(W, grid.values(codes), H) <= before * (1 + 1e-5)).all())
        assert torch.equal(grid.scale, grid.scale.half().float())
        assert torch.equal(grid.base, -grid.scale * zero)
    assert float(loss(W, grid.values(codes), H).sum()) < 0.98 * float(
        loss(W, affine_grid(scale, zero, group, 3).values(codes), H).sum()
    )


def test_the_orders() -> None:
    diagonal = torch.tensor([1.0, 5, 3, 2, 9, 2, 7, 0, 8, 4])
    assert column_order(diagonal, "natural").tolist() == list(range(10))
    assert column_order(diagonal, "activation").tolist() == [4, 8, 6, 1, 9, 2, 3, 5, 0, 7]
    assert column_order(diagonal, "group", 4).tolist() == [4, 6, 5, 7, 8, 9, 1, 2, 3, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_the_factor_is_that_of_the_damped_hessian(order: Order) -> None:
    _, H = problem(1, 40)
    factor = prepare(H, damp=0.05, order=order, group_size=8)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(in_place(factor.hessian, factor.order), damped)
    product = factor.feedback * factor.weights @ factor.feedback.T
    torch.testing.assert_close(product, factor.hessian, rtol=1e-4, atol=1e-5)
    assert torch.equal(factor.feedback, factor.feedback.triu())
    assert factor.log == ()


def test_dead_columns_are_rounded_plainly_and_change_nothing_else() -> None:
    W, H = problem(64, 32)
    dead, live = torch.tensor([0, 7, 31]), torch.tensor([i for i in range(32) if i not in (0, 7, 31)])
    H[dead] = 0.0
    H[:, dead] = 0.0
    grid = grids(W, 32, 3)[0]
    codes = compensate(W, prepare(H), grid)
    assert torch.equal(codes[:, dead], grid.nearest(W)[:, dead])
    alone = compensate(W[:, live], prepare(H[live][:, live]), grid.columns(live))
    assert torch.equal(codes[:, live], alone)
    everything = prepare(torch.zeros(32, 32))
    assert torch.equal(compensate(W, everything, grid), grid.nearest(W))


def test_a_singular_hessian_is_damped_further_and_says_so() -> None:
    _, H = problem(1, 24)
    H[3] = H[5]
    H[:, 3] = H[:, 5]
    H[3, 3] = H[5, 5] * (1 - 1e-3)  # not even positive semidefinite
    factor = prepare(H, damp=0.0, name="layer 3")
    assert factor.damp > 0
    assert len(factor.log) >= 2
    assert all("layer 3" in line and "damping" in line for line in factor.log)


def test_what_cannot_be_factored_is_an_error() -> None:
    _, H = problem(1, 8)
    with pytest.raises(HessianError, match="more tokens") as caught:
        prepare(2 * torch.ones(8, 8) - torch.eye(8), name="q_proj")
    assert "q_proj" in str(caught.value)
    assert len(caught.value.reasons) == 22
    with pytest.raises(HessianError, match="negative"):
        prepare(-H)
    with pytest.raises(HessianError, match="finite"):
        prepare(H * float("nan"))
    with pytest.raises(HessianError, match="square"):
        prepare(H[:4])
    with pytest.raises(UsageError, match="natural, activation, group") as usage:
        prepare(H, damp=2.0, order="best")  # type: ignore[arg-type]
    assert len(usage.value.reasons) == 2
