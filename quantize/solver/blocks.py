"""Error-compensated rounding to ggml's block types: bytes that every reader of the type decodes.

A row's columns are taken 256 at a time: a super-block of the K-quants, or eight blocks of 32. H is factored
by such blocks as it is by columns in quantize/solver/factor.py, H = M S Mᵀ, M with identities on its diagonal
and otherwise zero on one side of it, S zero but for blocks of 256 × 256. The loss of a row's errors e is then

    e H eᵀ = Σ_b (e M)_b S_b (e M)_bᵀ        (e M)_b = e_b + Σ_{a before b} e_a M_ab

so that what is best for block b, given those before, is to round the target w_b + Σ e_a M_ab under S_b: which
is H_bb less all that later blocks can make up for. That is a small problem, whose matrices stay in the cache,
and it is solved with some care: scales searched by the type's own search on the target, codes by compensation
in the order of activation, then rounds of refitted scales and of coordinate descent (block_kernels, descend),
all under S_b. Only then the block's errors are handed on.

    fast      no round
    default   two rounds in each block
    high      four; then four times over all blocks again, under H itself, two rounds in each

The order of blocks is that of their largest diagonal element. Rows are independent of each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from quantize.codecs.base import Codec
from quantize.errors import UsageError
from quantize.products import linear
from quantize.solver import block_kernels
from quantize.solver.block_grids import SHAPES, BlockScales, join, packed, searched_scales
from quantize.solver.compensate import array, compensate
from quantize.solver.descend import in_place, move_codes
from quantize.solver.factor import Factor, prepare
from quantize.solver.linears import Effort

WIDTH = 256
"""Columns that are solved together: a super-block."""
ROUNDS: Mapping[str, int] = {"fast": 0, "default": 2, "high": 4}
SWEEPS: Mapping[str, int] = {"fast": 0, "default": 0, "high": 4}
_DEAD = 1e-3  # of the mean diagonal: what a column weighs that never has an input


@dataclass(frozen=True)
class BlockStep:
    """One block of the walk: columns start..start + w of H.

    `hessian` is S_b, f32 (w, w); `local` its factor in the order of activation; `feedback` M_bcᵀ, f32
    (K - end, w), for all columns c to come in the order of the walk.
    """

    start: int
    hessian: torch.Tensor
    local: Factor
    feedback: torch.Tensor


@dataclass(frozen=True)
class BlockFactor:
    """H made ready for rounding to blocks: f32 (K, K), damped, in the order of the columns; and the walk."""

    hessian: torch.Tensor
    importance: torch.Tensor
    steps: tuple[BlockStep, ...]
    log: tuple[str, ...]


def compensated_types() -> tuple[str, ...]:
    """Return the names of the quant types that `encode_compensated` writes."""
    return tuple(SHAPES)


def prepare_blocks(H: torch.Tensor, *, damp: float = 0.05, name: str = "") -> BlockFactor:
    """Factor a Hessian f32 (K, K) by blocks of 256 columns, for all linears that share its input.

    Raises what `prepare` raises: HessianError where H cannot be factored, UsageError for a wrong damping.
    """
    factor = prepare(H, damp=damp, order="group", group_size=WIDTH, name=name)
    damped = in_place(factor.hessian, factor.order)
    importance = H.diagonal().clamp(min=0).float()
    live = importance[~factor.dead]
    mean = float(live.mean()) if len(live) else 1.0
    damped.diagonal()[factor.dead] = _DEAD * mean
    return BlockFactor(damped, importance.clamp(min=_DEAD * mean), _walk(factor, _DEAD * mean), factor.log)


def _walk(factor: Factor, dead: float) -> tuple[BlockStep, ...]:
    """Return the blocks in the order of rounding; columns without an input weigh `dead`."""
    bounds = _bounds(factor.order)
    upper, feedback = factor.feedback, factor.feedback.clone()
    inside = [torch.argsort(factor.order[start:end]) for start, end in bounds]
    for start, end in bounds[1:]:
        feedback[:start, start:end] = torch.linalg.solve_triangular(
            upper[start:end, start:end], upper[:start, start:end], upper=True, left=False, unitriangular=True
        )
    # Inside a block the columns come as they lie: M and S do not depend on their order.
    place = torch.cat([start + nat for (start, _), nat in zip(bounds, inside, strict=True)])
    feedback = feedback[place][:, place]
    steps = []
    for (start, end), nat in zip(bounds, inside, strict=True):
        part = upper[start:end, start:end]
        S = linear(part * factor.weights[start:end], part.contiguous())[nat][:, nat].contiguous()
        first = int(factor.order[start]) // WIDTH * WIDTH
        S.diagonal()[factor.dead[first : first + end - start]] = dead
        local = prepare(S, damp=0.0, order="activation")
        steps.append(BlockStep(first, S, local, feedback[start:end, end:].T.contiguous()))
    return tuple(steps)


def _bounds(order: torch.Tensor) -> list[tuple[int, int]]:
    """Return where in the order of rounding each block of columns begins and ends."""
    blocks = order // WIDTH
    changes = ((blocks[1:] != blocks[:-1]).nonzero()[:, 0] + 1).tolist()
    return list(zip([0, *changes], [*changes, len(order)], strict=True))


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
    target = torch.cat([W[:, step.start : step.start + len(step.hessian)] for step in factor.steps], 1)
    parts: dict[int, _Part] = {}
    done = 0
    for step in factor.steps:
        width = len(step.hessian)
        goal = target[:, done : done + width].contiguous()
        part = _round(kind, goal, factor.importance[step.start : step.start + width].contiguous(), step)
        if ROUNDS[effort]:
            gradient = linear(_misses(goal, part), step.hessian)
            _improve(part, gradient, step.hessian, ROUNDS[effort])
        parts[step.start] = part
        done += width
        if done < target.shape[1]:
            errors = _misses(W[:, step.start : step.start + width].contiguous(), part)
            target[:, done:] += linear(errors, step.feedback)
    for _ in range(SWEEPS[effort]):
        _sweep(W, parts, factor.hessian)
    ordered = [parts[start] for start in sorted(parts)]
    return torch.cat([part.codes for part in ordered], 1), join([part.scales for part in ordered])


def _round(kind: Codec, goal: torch.Tensor, importance: torch.Tensor, step: BlockStep) -> _Part:
    """Search a block's scales and round its columns, each error handed on inside the block."""
    scales = searched_scales(kind, goal, importance)
    return _Part(compensate(goal, step.local, scales.grid()), scales)


def _sweep(W: torch.Tensor, parts: Mapping[int, _Part], H: torch.Tensor) -> None:
    """Improve each block once more under H, all others held."""
    ordered = [parts[start] for start in sorted(parts)]
    errors = [
        _misses(W[:, start : start + part.codes.shape[1]].contiguous(), part)
        for start, part in sorted(parts.items())
    ]
    gradient = linear(torch.cat(errors, 1), H)
    start = 0
    for part in ordered:
        end = start + part.codes.shape[1]
        before = part.scales.grid().values(part.codes)
        _improve(part, gradient[:, start:end].contiguous(), H[start:end, start:end].contiguous(), 2)
        moves = part.scales.grid().values(part.codes) - before
        gradient -= linear(moves, H[:, start:end].contiguous())
        start = end


def _improve(part: _Part, gradient: torch.Tensor, H: torch.Tensor, rounds: int) -> None:
    """Refit the scales to the codes and move the codes to their best, `rounds` times."""
    for _ in range(rounds):
        part.scales, moves = refit_blocks(part.codes, part.scales, gradient, H)
        gradient -= linear(moves, H)
        part.codes = move_codes(gradient, part.codes, H, part.scales.grid())


def refit_blocks(
    codes: torch.Tensor, scales: BlockScales, gradient: torch.Tensor, H: torch.Tensor
) -> tuple[BlockScales, torch.Tensor]:
    """Return scales that are better for the codes, and what they add to Ŵ, f32 (N, w).

    `gradient`, f32 (N, w), is (W - Ŵ) H with H f32 (w, w). d and dmin stay where integers stand beside them.
    """
    shape, grid = scales.shape, scales.grid()
    fields = torch.stack([*scales.units(), scales.steps, scales.drops, grid.scale, grid.base])
    moves = torch.empty_like(gradient)
    low, high = shape.steps or (1, 1)
    limits = np.array([low, high, shape.drop, shape.steps is None], np.float32)
    levels = array(grid.levels - shape.middle)
    block_kernels.refit_block(
        array(gradient), codes.numpy(), array(H), levels, shape.based, limits, fields.numpy(), moves.numpy()
    )
    if shape.steps is None:
        return replace(scales, d=fields[4], dmin=-fields[5] if shape.based else scales.dmin), moves
    return replace(scales, steps=fields[2], drops=fields[3]), moves


def _misses(W: torch.Tensor, part: _Part) -> torch.Tensor:
    """Return W - Ŵ, f32 (N, w)."""
    out, grid = torch.empty_like(W), part.scales.grid()
    levels = array(grid.levels)
    block_kernels.misses(
        W.numpy(), part.codes.numpy(), array(grid.scale), array(grid.base), levels, out.numpy()
    )
    return out
