"""Error-compensated rounding to ggml's block types: bytes that every reader of the type decodes.

A row's columns are taken 256 at a time: a super-block of the K-quants, or eight blocks of 32. H is factored
by such blocks as it is by columns in quantize/solver/factor.py: H = M S Mᵀ, M with identities on its diagonal
and otherwise zero on one side of it, S zero but for blocks of 256 x 256. The loss of a row's errors e is then

    e H eᵀ = Σ_b (e M)_b S_b (e M)_bᵀ        (e M)_b = e_b + Σ_{a before b} e_a M_ab

so that what is best for block b, given those before, is to round the target w_b + Σ e_a M_ab under S_b: which
is H_bb less all that later blocks can make up for. That is a small problem, whose matrices stay in the cache,
and it is solved with care before the block's errors are handed on: scales by the type's own search on the
target, and then among those beside them; codes by compensation in the order of activation; rounds, in which
the scales are refitted to the codes and the codes moved to their best, all under S_b.

    fast      the type's own search, compensation
    default   three grids beside each other, a round
    high      all grids nearby, two rounds; then two sweeps over all blocks under H itself, with two rounds

The order of blocks is that of their largest diagonal element. Rows are independent of each other, up to how
the matrix products sum (then a near-tie may fall to the other side).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from quantize.codecs.base import Codec
from quantize.codecs.native.arithmetic import Floats
from quantize.errors import UsageError
from quantize.products import linear
from quantize.solver import block_kernels, refit_kernels, search_kernels
from quantize.solver.block_factor import BlockFactor, BlockStep
from quantize.solver.block_grids import SHAPES, BlockScales, BlockShape, join, packed, searched_scales
from quantize.solver.compensate import array
from quantize.solver.linears import Effort

TRIES: Mapping[str, int] = {"fast": 1, "default": 3, "high": 19}
ROUNDS: Mapping[str, int] = {"fast": 0, "default": 1, "high": 2}
SWEEPS: Mapping[str, int] = {"fast": 0, "default": 0, "high": 2}
_SWEEP_ROUNDS = 2
_WAYS = ((-1, -1), (-1, 0), (1, 1), (0, 1), (0, -1), (1, 0))
_WAYS_OF_STEPS = ((-1, 0), (1, 0))


def compensated_types() -> tuple[str, ...]:
    """Return the names of the quant types that `encode_compensated` writes."""
    return tuple(SHAPES)


def encode_compensated(
    kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: Effort = "default"
) -> torch.Tensor:
    """Return the blocks, uint8 (N, row_bytes), of W f32 (N, K) on the CPU, with a small loss under H.

    K is a multiple of the type's block size. Rows may be handed in slices, from several threads, with one
    factor; a slice of 256 rows or more keeps the matrix products busy. Raises UsageError for a type that is
    not one of `compensated_types`, an unknown effort, or a matrix that does not fit.
    """
    _check(kind, W, factor, effort)
    if not len(W):
        return torch.empty(0, kind.row_bytes(W.shape[1]), dtype=torch.uint8)
    codes, scales = _solve(kind, W.float().contiguous(), factor, effort)
    return packed(kind, codes, scales)


def _check(kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: str) -> None:
    reasons = []
    if kind.name not in SHAPES:
        reasons.append(f"{kind.name}: error-compensated types are {', '.join(SHAPES)}")
    if effort not in ROUNDS:
        reasons.append(f"effort {effort!r}: known are {', '.join(ROUNDS)}")
    if W.ndim != 2 or W.shape[1] != len(factor.hessian):
        reasons.append(f"a matrix {tuple(W.shape)} for a Hessian {tuple(factor.hessian.shape)}")
    elif W.shape[1] % kind.block_size:
        reasons.append(f"{W.shape[1]} columns: {kind.name} has blocks of {kind.block_size}")
    elif not bool(torch.isfinite(W).all()):
        reasons.append("the matrix holds weights that are not finite")
    if reasons:
        raise UsageError("this matrix cannot be rounded with compensation", reasons=reasons)


@dataclass
class _Part:
    """A block's columns of some rows: codes, uint8 (N, w), and scales."""

    codes: torch.Tensor
    scales: BlockScales


def _solve(
    kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: str
) -> tuple[torch.Tensor, BlockScales]:
    """Walk over the blocks, then sweep over them; return the codes, (N, K), and all scales."""
    target = torch.cat([_columns(W, step) for step in factor.steps], 1)
    parts: dict[int, _Part] = {}
    end = 0
    for step in factor.steps:
        start, end = end, end + len(step.hessian)
        part = _solve_block(kind, target[:, start:end].contiguous(), factor, step, effort)
        parts[step.start] = part
        if end < target.shape[1]:
            target[:, end:] += linear(_misses(_columns(W, step).contiguous(), part), step.feedback)
    ordered = [parts[start] for start in sorted(parts)]
    for _ in range(SWEEPS[effort]):
        _sweep(W, ordered, factor.hessian)
    return torch.cat([part.codes for part in ordered], 1), join([part.scales for part in ordered])


def _columns(W: torch.Tensor, step: BlockStep) -> torch.Tensor:
    return W[:, step.start : step.start + len(step.hessian)]


def _solve_block(kind: Codec, goal: torch.Tensor, factor: BlockFactor, step: BlockStep, effort: str) -> _Part:
    """Round one block's columns to what is best given all blocks before."""
    importance = factor.importance[step.start : step.start + goal.shape[1]].contiguous()
    scales = searched_scales(kind, goal, importance)
    if TRIES[effort] > 1:
        scales = search_beside(goal, scales, step, TRIES[effort])
    part = _round(goal, scales, step)
    if ROUNDS[effort]:
        _improve(part, linear(_misses(goal, part), step.hessian), step.hessian, ROUNDS[effort])
    return part


def _round(goal: torch.Tensor, scales: BlockScales, step: BlockStep) -> _Part:
    """Round a block's columns, each error handed on inside the block."""
    codes = torch.empty(goal.shape, dtype=torch.uint8)
    order, feedback, _ = step.local
    levels, pair = _levels(scales.shape), _pair(scales)
    block_kernels.round_block(goal.numpy(), order.numpy(), feedback.numpy(), *levels, *pair, codes.numpy())
    return _Part(codes, scales)


def _sweep(W: torch.Tensor, parts: Sequence[_Part], H: torch.Tensor) -> None:
    """Improve each block once more under H, all others held; `parts` are in the order of the columns."""
    columns = torch.split(W, [part.codes.shape[1] for part in parts], 1)
    errors = [_misses(w.contiguous(), part) for w, part in zip(columns, parts, strict=True)]
    gradient = linear(torch.cat(errors, 1), H)
    end = 0
    for part in parts:
        start, end = end, end + part.codes.shape[1]
        before = part.scales.grid().values(part.codes)
        inside = H[start:end, start:end].contiguous()
        _improve(part, gradient[:, start:end].clone(), inside, _SWEEP_ROUNDS)
        moves = part.scales.grid().values(part.codes) - before
        gradient -= linear(moves, H[:, start:end].contiguous())


def _improve(part: _Part, gradient: torch.Tensor, H: torch.Tensor, rounds: int) -> None:
    """Refit the scales to the codes and move the codes to their best, `rounds` times; gradient is lost."""
    levels = _levels(part.scales.shape)
    for k in range(rounds):
        part.scales, moves = refit_blocks(part.codes, part.scales, gradient, H)
        gradient -= linear(moves, H)
        changed = part.codes.numpy(), moves.numpy()
        block_kernels.move_block(gradient.numpy(), H.numpy(), *levels, *_pair(part.scales), *changed)
        if k + 1 < rounds:
            gradient -= linear(moves, H)


def refit_blocks(
    codes: torch.Tensor, scales: BlockScales, gradient: torch.Tensor, H: torch.Tensor
) -> tuple[BlockScales, torch.Tensor]:
    """Return scales that are better for the codes, and what they add to Ŵ, f32 (N, w).

    `gradient`, f32 (N, w), is (W - Ŵ) H with H f32 (w, w). d and dmin stay where integers stand beside them.
    """
    shape, fields = scales.shape, _fields(scales)
    moves = torch.empty_like(gradient)
    levels = array(shape.levels() - shape.middle)
    outputs = fields.numpy(), moves.numpy()
    refit_kernels.refit_block(
        array(gradient), codes.numpy(), array(H), levels, shape.based, _limits(shape), *outputs
    )
    return _changed(scales, fields), moves


def search_beside(goal: torch.Tensor, scales: BlockScales, step: BlockStep, tries: int) -> BlockScales:
    """Return scales that round each sub-block better, if it is rounded for itself.

    `goal`, f32 (N, w), is what is rounded. Each sub-block is judged by its own part of S_b, as
    quantize/solver/scales.py judges groups, on `tries` grids, the first of which is the one it has: 19 at the
    most where there are minima, else 7.
    """
    shape, fields = scales.shape, _fields(scales)
    order, feedback, weights = step.subs[shape.sub]
    beside = _beside(shape, tries)
    middle, limits = np.float32(shape.middle), _limits(shape)
    factors = order.numpy(), feedback.numpy(), weights.numpy()
    outputs = beside, fields.numpy()
    search_kernels.search_block(
        goal.numpy(), *factors, *_levels(shape), middle, shape.based, limits, *outputs
    )
    return _changed(scales, fields)


def _levels(shape: BlockShape) -> tuple[Floats, Floats]:
    """Return the levels and, of uneven ones, the middles between them."""
    levels = shape.levels()
    middles = (levels[1:] + levels[:-1]) / 2 if shape.uneven else levels[:0]
    return array(levels), array(middles)


def _beside(shape: BlockShape, tries: int) -> Floats:
    """Return what each try adds to step and drop, f32 (C, 2): the likeliest first, after nothing."""
    unit = max(1, (shape.steps or (0, 0))[1] // 31)
    ways = _WAYS if shape.based else _WAYS_OF_STEPS
    found = [(0, 0)] + [(far * unit * x, far * unit * y) for far in (1, 2, 3) for x, y in ways]
    return np.array(found[:tries], np.float32)


def _fields(scales: BlockScales) -> torch.Tensor:
    """Return d, dmin, step, drop, scale and base of each sub-block, f32 (6, N, G)."""
    grid = scales.grid()
    return torch.stack([*scales.units(), scales.steps, scales.drops, grid.scale, grid.base])


def _limits(shape: BlockShape) -> Floats:
    low, high = shape.steps or (1, 1)
    return np.array([low, high, shape.drop, shape.steps is None], np.float32)


def _changed(scales: BlockScales, fields: torch.Tensor) -> BlockScales:
    if scales.shape.steps is None:
        return replace(scales, d=fields[4], dmin=-fields[5] if scales.shape.based else scales.dmin)
    return replace(scales, steps=fields[2], drops=fields[3])


def _pair(scales: BlockScales) -> tuple[Floats, Floats]:
    """Return scale and base of each sub-block, f32 (N, G)."""
    grid = scales.grid()
    return array(grid.scale), array(grid.base)


def _misses(W: torch.Tensor, part: _Part) -> torch.Tensor:
    """Return W - Ŵ, f32 (N, w)."""
    out, levels = torch.empty_like(W), array(part.scales.shape.levels())
    block_kernels.misses(W.numpy(), part.codes.numpy(), *_pair(part.scales), levels, out.numpy())
    return out
