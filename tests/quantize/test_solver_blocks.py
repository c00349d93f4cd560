"""ggml's blocks under compensation: against plain statements, enumerated optima and stock decoders."""

import itertools
from dataclasses import replace
from typing import get_args

import gguf
import numpy as np
import pytest
import torch

from quantize.codecs import codec
from quantize.errors import HessianError, UsageError
from quantize.solver import block_kernels, blocks, gpu
from quantize.solver.block_factor import DAMP, WIDTH, BlockFactor, prepare_blocks
from quantize.solver.block_grids import SHAPES, packed, searched_scales
from quantize.solver.blocks import (
    compensated_types,
    compensates_on,
    encode_compensated,
    refit_blocks,
    search_beside,
)
from quantize.solver.compensate import compensate
from quantize.solver.descend import descend, in_place, loss
from quantize.solver.factor import prepare
from quantize.solver.grid import Grid, affine_grid
from quantize.solver.linears import Effort, Settings, prepare_input
from quantize.solver.scales import plain_scales

EFFORTS: tuple[Effort, ...] = get_args(Effort)
TYPES = compensated_types()
LEVELS = tuple(SHAPES)


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, k) and a Hessian whose columns are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=generator) * 0.02
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    X = torch.randn(3 * k, k, generator=generator) @ mix * torch.rand(k, generator=generator).add(0.1)
    return W, X.T @ X / len(X)


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor, BlockFactor]:
    """70 rows of three super-blocks."""
    W, H = problem(70, 768)
    return W, H, prepare_blocks(H)


def kernel_arrays(grid: Grid) -> tuple[np.ndarray, ...]:
    """Return levels, middles, scale and base as the kernels take them."""
    middles = (grid.levels[1:] + grid.levels[:-1]) / 2
    uniform = bool((grid.levels == torch.arange(len(grid.levels))).all())
    return tuple(t.numpy() for t in (grid.levels, middles[:0] if uniform else middles, grid.scale, grid.base))


def test_the_walk_is_the_hessian(case: tuple[torch.Tensor, torch.Tensor, BlockFactor]) -> None:
    """M S Mᵀ, put together from the steps, is the damped H."""
    _, H, factor = case
    order = torch.cat([torch.arange(step.start, step.start + 256) for step in factor.steps])
    M, S = torch.eye(768), torch.zeros(768, 768)
    for i, step in enumerate(factor.steps):
        at, end = 256 * i, 256 * (i + 1)
        S[at:end, at:end] = step.hessian
        M[at:end, end:] = step.feedback.T
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(768)
    torch.testing.assert_close(factor.hessian, damped)
    torch.testing.assert_close(M @ S @ M.T, damped[order][:, order], rtol=1e-4, atol=1e-5)
    largest = [float(H.diagonal()[step.start : step.start + 256].max()) for step in factor.steps]
    assert largest == sorted(largest, reverse=True)
    for n in (16, 32):
        places, feedback, weights = factor.steps[1].subs[n]
        for g in range(256 // n):
            product = feedback[g].T * weights[g] @ feedback[g]
            part = factor.steps[1].hessian[places[g]][:, places[g]]
            torch.testing.assert_close(product, part, rtol=1e-4, atol=1e-5)


def test_a_factor_lies_where_its_hessian_does() -> None:
    """What is made without a device would come to lie on another one, and mixing them is an error."""
    _, H = problem(1, 544)
    with torch.device("meta"):
        factor, shared = prepare_blocks(H), prepare_input(H, Settings(4, 32))
    parts = [shared.group, factor.hessian, factor.importance]
    for step in factor.steps:
        parts += [step.hessian, step.feedback, *step.local, *step.subs[16], *step.subs[32]]
    assert {part.device.type for part in parts} == {"cpu"}


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", TYPES)
def test_what_is_decoded_is_what_was_solved(
    name: str, effort: Effort, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    W, _, factor = case
    kind = codec(name)
    data = encode_compensated(kind, W, factor, effort)
    assert data.shape == (70, kind.row_bytes(768))
    parts = blocks._solve(kind, W, factor, effort)
    assert torch.equal(kind.decode(data, 768), torch.cat([part.values() for part in parts], 1))
    stock = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(stock, kind.decode(data, 768).numpy())


@pytest.mark.parametrize("name", TYPES)
def test_more_effort_is_a_smaller_loss(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    W, H, factor = case
    kind = codec(name)
    importance = H.diagonal().contiguous()
    # Types that cannot be encoded without importances get what they should have weighed turned around.
    ways = [kind.encode(W, 1 / importance if kind.needs_importance else None), kind.encode(W, importance)]
    ways += [encode_compensated(kind, W, factor, effort) for effort in EFFORTS]
    plain, weighted, fast, default, high = (float(loss(W, kind.decode(w, 768), H).sum()) for w in ways)
    assert plain >= weighted if name == "Q8_0" else plain > 1.1 * weighted
    assert weighted > 1.3 * fast
    assert fast > 1.03 * default > 1.03**2 * high


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "IQ4_XS", "IQ4_NL"])
def test_rounding_a_block_is_compensation(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    """The compiled loop against the column-wise solver, which is tested against GPTQ itself."""
    W, _, factor = case
    step, goal = factor.steps[0], W[:, :256].contiguous()
    scales = searched_scales(codec(name), goal, factor.importance[:256].contiguous())
    expected = compensate(goal, prepare(step.hessian, damp=0.0, order="activation"), scales.grid())
    found = blocks._round(goal, scales, step).codes
    assert float((found != expected).float().mean()) < 1e-3  # near-ties: other sums
    grid, H = scales.grid(), step.hessian
    mine, theirs = (loss(goal, grid.values(c), H) for c in (found, expected))
    torch.testing.assert_close(mine.sum(), theirs.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "Q4_0"])
def test_moving_a_blocks_codes_is_descent(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    W, _, factor = case
    H, goal = factor.steps[0].hessian, W[:, :256].contiguous()
    grid = searched_scales(codec(name), goal, factor.importance[:256].contiguous()).grid()
    codes, moves = grid.nearest(goal), torch.empty_like(goal)
    expected, moved = descend(goal, codes, H, grid), codes.clone()
    gradient = (goal - grid.values(codes)) @ H
    levels, middles, scale, base = kernel_arrays(grid)
    args = (levels, middles, scale, base, moved.numpy(), moves.numpy())
    block_kernels.move_block(gradient.numpy(), H.numpy(), *args)
    assert not torch.equal(moved, codes)
    assert float((moved != expected).float().mean()) < 1e-3
    torch.testing.assert_close(moves, grid.values(moved) - grid.values(codes), rtol=0, atol=1e-6)
    before, after = (loss(goal, grid.values(c), H) for c in (codes, moved))
    assert bool((after <= before * (1 + 1e-5)).all())


def test_never_below_the_optimum_and_near_it() -> None:
    """Four columns and 2 bits: all 256 codes of a row are tried."""
    W, H = problem(200, 4, seed=1)
    W = W / 0.02
    grid = affine_grid(
        *plain_scales(W, torch.zeros(4, dtype=torch.int64), 2, False), torch.zeros(4).long(), 2
    )
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    best = torch.stack([loss(W, grid.values(c.expand(200, 4)), H) for c in every]).amin(0)
    factor = prepare(H, damp=0.0, order="activation")
    codes, moves = torch.empty(200, 4, dtype=torch.uint8), torch.empty(200, 4)
    levels, middles, scale, base = kernel_arrays(grid)
    feedback = factor.feedback.T.contiguous().numpy()
    block_kernels.round_block(
        W.numpy(), factor.order.numpy(), feedback, levels, middles, scale, base, codes.numpy()
    )
    for _ in range(4):
        assert bool((loss(W, grid.values(codes), H) >= best * (1 - 1e-4) - 1e-6).all())
        gradient = ((W - grid.values(codes)) @ H).numpy()
        args = (levels, middles, scale, base, codes.numpy(), moves.numpy())
        block_kernels.move_block(gradient, H.numpy(), *args)
    nearest, reached = (loss(W, grid.values(c), H).mean() for c in (grid.nearest(W), codes))
    assert best.mean() <= reached < best.mean() + 0.25 * (nearest - best.mean())


@pytest.mark.parametrize("name", LEVELS)
def test_refitting_never_raises_the_loss(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    W, _, factor = case
    H, goal = factor.steps[0].hessian, W[:, :256].contiguous()
    scales = searched_scales(codec(name), goal * 0.97, factor.importance[:256].contiguous())
    codes = scales.grid().nearest(goal)
    first = before = loss(goal, scales.grid().values(codes), H)
    for _ in range(3):
        gradient = (goal - scales.grid().values(codes)) @ H
        fitted, moves = refit_blocks(codes, scales, gradient, H)
        change = fitted.grid().values(codes) - scales.grid().values(codes)
        torch.testing.assert_close(moves, change, rtol=0, atol=1e-6)
        scales, after = fitted, loss(goal, fitted.grid().values(codes), H)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert float(before.sum()) < 0.995 * float(first.sum())
    data = packed(codec(name), codes, scales)
    assert torch.equal(codec(name).decode(data, 256), scales.grid().values(codes))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K"])
def test_a_refitted_sub_block_is_near_the_best_integers(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    """All scales and minima of the first sub-block are tried, the others as they are."""
    W, _, factor = case
    H, goal, shape = factor.steps[0].hessian, W[:16, :256].contiguous(), SHAPES[name]
    scales = searched_scales(codec(name), goal, factor.importance[:256].contiguous())
    codes = scales.grid().nearest(goal)
    fitted, _ = refit_blocks(codes, scales, (goal - scales.grid().values(codes)) @ H, H)
    assert shape.steps is not None
    tried = []
    for step, drop in itertools.product(range(shape.steps[0], shape.steps[1] + 1), range(shape.drop + 1)):
        steps, drops = scales.steps.clone(), scales.drops.clone()
        steps[:, 0], drops[:, 0] = step, drop
        grid = replace(scales, steps=steps, drops=drops).grid()
        tried.append(loss(goal, grid.values(codes), H))
    steps, drops = scales.steps.clone(), scales.drops.clone()
    steps[:, 0], drops[:, 0] = fitted.steps[:, 0], fitted.drops[:, 0]
    reached = loss(goal, replace(scales, steps=steps, drops=drops).grid().values(codes), H)
    assert bool((reached <= torch.stack(tried).amin(0) * (1 + 1e-4)).all())


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "Q4_0", "Q4_1"])
def test_the_search_takes_the_best_beside(
    name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]
) -> None:
    """Each sub-block is rounded by the column-wise solver on its old and on its new grid."""
    W, _, factor = case
    step, goal, sub = factor.steps[0], W[:, :256].contiguous(), SHAPES[name].sub
    scales = searched_scales(codec(name), goal, factor.importance[:256].contiguous())
    found = search_beside(goal, scales, step, 7)
    old, new = torch.zeros(70), torch.zeros(70)
    for j in range(256 // sub):
        places = torch.arange(j * sub, (j + 1) * sub)
        inside, part = step.hessian[places][:, places], goal[:, places]
        local = prepare(inside, damp=0.0, order="activation")
        for grid, total in ((scales.grid(), old), (found.grid(), new)):
            grid = grid.columns(places)
            lost = loss(part, grid.values(compensate(part, local, grid)), inside)
            total += lost
    assert bool((new <= old * (1 + 1e-4)).all())
    assert float(new.sum()) < 0.99 * float(old.sum())
    same = search_beside(goal, scales, step, 1)
    assert torch.equal(same.steps, scales.steps)
    assert torch.equal(same.d, scales.d)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_1", "IQ2_XS", "IQ3_XXS"])
def test_rows_are_independent(name: str, case: tuple[torch.Tensor, torch.Tensor, BlockFactor]) -> None:
    W, _, factor = case
    kind = codec(name)
    whole = encode_compensated(kind, W, factor)
    assert torch.equal(encode_compensated(kind, W, factor), whole)
    parts = [encode_compensated(kind, W[a:b], factor) for a, b in ((0, 0), (0, 1), (1, 67), (67, 70))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", TYPES)
def test_dead_columns_and_zero_rows(name: str) -> None:
    W, H = problem(20, 512, seed=3)
    dead = torch.tensor([*range(32), 77, 300])
    H[dead] = 0.0
    H[:, dead] = 0.0
    W[3] = 0.0
    W[4, :256] = 0.0
    kind = codec(name)
    for effort in EFFORTS:
        decoded = kind.decode(encode_compensated(kind, W, prepare_blocks(H), effort), 512)
        assert bool(torch.isfinite(decoded).all())
        assert torch.equal(decoded[3], torch.zeros(512))
        assert float((decoded - W)[:, dead].abs().max()) < 0.08
    nothing = prepare_blocks(torch.zeros(512, 512))
    assert bool(torch.isfinite(kind.decode(encode_compensated(kind, W, nothing), 512)).all())


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_a_last_block_may_be_shorter(name: str) -> None:
    W, H = problem(40, 352, seed=4)
    kind, factor = codec(name), prepare_blocks(H)
    losses = [
        float(loss(W, kind.decode(data, 352), H).sum())
        for data in (
            kind.encode(W, H.diagonal().contiguous()),
            *(encode_compensated(kind, W, factor, effort) for effort in EFFORTS),
        )
    ]
    assert losses == sorted(losses, reverse=True)


def test_which_types_a_gpu_compensates(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_triton, types in ((True, set(LEVELS)), (False, set())):
        monkeypatch.setattr(gpu, "available", lambda has_triton=has_triton: has_triton)
        assert {name for name in TYPES if compensates_on(codec(name), cuda)} == types
        assert all(compensates_on(codec(name), cpu) for name in TYPES)


def test_what_does_not_fit_is_an_error() -> None:
    W, H = problem(4, 288)
    factor = prepare_blocks(H)
    with pytest.raises(UsageError, match="cannot be rounded") as caught:
        encode_compensated(codec("IQ1_S"), W * float("nan"), factor, "best")  # type: ignore[arg-type]
    assert len(caught.value.reasons) == 3
    assert "Q4_K" in caught.value.reasons[0]
    with pytest.raises(UsageError) as caught:
        encode_compensated(codec("Q4_K"), W, factor)
    assert caught.value.reasons == ("288 columns: Q4_K has blocks of 256",)
    with pytest.raises(UsageError) as caught:
        encode_compensated(codec("Q4_0"), W[:, :256], factor)
    assert caught.value.reasons == ("a matrix (4, 256) for a Hessian (288, 288)",)
    with pytest.raises(UsageError) as caught:
        elsewhere = replace(factor, hessian=factor.hessian.to("meta"))
        encode_compensated(codec("Q4_0"), W, elsewhere)
    assert caught.value.reasons == ("Q4_0: not compensated with a matrix on cpu and a Hessian on meta",)
    with pytest.raises(UsageError, match=r"layer 3.*40 columns"):
        prepare_blocks(torch.eye(40), name="layer 3")
    with pytest.raises(HessianError, match="negative"):
        prepare_blocks(-H)


def test_the_damped_hessian_is_the_factors_own() -> None:
    _, H = problem(8, 512)
    H[5] = H[:, 5] = H[300] = H[:, 300] = 0
    factor, damped = prepare(H, damp=DAMP, order="group", group_size=WIDTH), prepare_blocks(H).hessian
    expected = in_place(factor.hessian, factor.order)
    assert int(factor.dead.sum()) == 2
    live = ~factor.dead
    assert torch.equal(damped[live], expected[live])
    assert torch.equal(damped[:, live], expected[:, live])
