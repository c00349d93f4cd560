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

IQ2 and IQ3, whose codes are points of eight or four weights, are solved inside a block by
quantize/solver/points.py, in the same walk, with the same efforts: one, three or five integer scales beside
each other.

The order of blocks is that of their largest diagonal element. Rows are independent of each other, up to how
the matrix products sum (then a near-tie may fall to the other side).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from quantize.codecs.base import Codec
from quantize.codecs.fields import FieldCodec
from quantize.errors import UsageError
from quantize.products import linear
from quantize.solver import block_loops, gpu
from quantize.solver.block_factor import WIDTH, BlockFactor, BlockStep
from quantize.solver.block_grids import SHAPES, BlockScales, BlockShape, join, packed, searched_scales
from quantize.solver.linears import Effort
from quantize.solver.points import POINT_SHAPES, PointPart, solve_points

TRIES: Mapping[str, int] = {"fast": 1, "default": 3, "high": 19}
POINT_TRIES: Mapping[str, int] = {"fast": 1, "default": 3, "high": 5}
ROUNDS: Mapping[str, int] = {"fast": 0, "default": 1, "high": 2}
SWEEPS: Mapping[str, int] = {"fast": 0, "default": 0, "high": 2}
_SWEEP_ROUNDS = 2
_WAYS = ((-1, -1), (-1, 0), (1, 1), (0, 1), (0, -1), (1, 0))
_WAYS_OF_STEPS = ((-1, 0), (1, 0))


def compensated_types() -> tuple[str, ...]:
    """Return the names of the quant types that `encode_compensated` writes."""
    return (*SHAPES, *POINT_SHAPES)


def compensates_on(kind: Codec, device: torch.device) -> bool:
    """Return whether `encode_compensated` has loops for a type on a device: on CPUs for all that it writes,
    on CUDA, with Triton, for all but IQ2 and IQ3."""
    return kind.name in (SHAPES if gpu.takes(device) else compensated_types() if device.type == "cpu" else ())


def encode_compensated(
    kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: Effort = "default"
) -> torch.Tensor:
    """Return the blocks, uint8 (N, row_bytes), of W f32 (N, K) on the factor's device, with a small loss
    under H.

    K is a multiple of the type's block size. Rows may be handed in slices, from several threads, with one
    factor; a slice of 256 rows or more keeps the matrix products of a CPU busy, a GPU needs thousands. Raises
    UsageError for a type that is not one of `compensated_types`, or not compensated on the device (see
    `compensates_on`), an unknown effort, or a matrix that does not fit.
    """
    _check(kind, W, factor, effort)
    if not len(W):
        return torch.empty(0, kind.row_bytes(W.shape[1]), dtype=torch.uint8, device=W.device)
    parts = _solve(kind, W.float().contiguous(), factor, effort)
    levels, points = (
        [p for p in parts if isinstance(p, _Part)],
        [p for p in parts if isinstance(p, PointPart)],
    )
    if points:
        return torch.cat([part.blocks() for part in points], 1)
    return packed(kind, torch.cat([part.codes for part in levels], 1), join([part.scales for part in levels]))


def _check(kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: str) -> None:
    reasons = []
    if kind.name not in compensated_types():
        reasons.append(f"{kind.name}: error-compensated types are {', '.join(compensated_types())}")
    elif W.device != factor.hessian.device or not compensates_on(kind, W.device):
        places = f"a matrix on {W.device} and a Hessian on {factor.hessian.device}"
        reasons.append(f"{kind.name}: not compensated with {places}")
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


class Part(Protocol):
    """A block's columns of some rows, rounded."""

    def values(self) -> torch.Tensor:
        """Return the weights, f32 (N, w), as they are decoded."""

    def misses(self, W: torch.Tensor) -> torch.Tensor:
        """Return W - Ŵ, f32 (N, w)."""

    def improve(self, gradient: torch.Tensor, H: torch.Tensor, rounds: int) -> None:
        """Refit scales to codes and move codes to their best; gradient f32 (N, w), (W - Ŵ) H, is lost."""


@dataclass
class _Part:
    """Codes, uint8 (N, w), and scales."""

    codes: torch.Tensor
    scales: BlockScales

    def values(self) -> torch.Tensor:
        return self.scales.grid().values(self.codes)

    def misses(self, W: torch.Tensor) -> torch.Tensor:
        return block_loops.misses(W, self.codes, self.scales)

    def improve(self, gradient: torch.Tensor, H: torch.Tensor, rounds: int) -> None:
        for k in range(rounds):
            self.scales, moves = refit_blocks(self.codes, self.scales, gradient, H)
            gradient -= linear(moves, H)
            self.codes, moves = block_loops.move_codes(gradient, H, self.scales, self.codes)
            if k + 1 < rounds:
                gradient -= linear(moves, H)


def _solve(kind: Codec, W: torch.Tensor, factor: BlockFactor, effort: str) -> list[Part]:
    """Walk over the blocks, then sweep over them; return them in the order of the columns."""
    target = torch.cat([_columns(W, step) for step in factor.steps], 1)
    parts: dict[int, Part] = {}
    end = 0
    for step in factor.steps:
        start, end = end, end + len(step.hessian)
        part = _solve_block(kind, target[:, start:end].contiguous(), factor, step, effort)
        parts[step.start] = part
        if end < target.shape[1]:
            target[:, end:] += linear(part.misses(_columns(W, step).contiguous()), step.feedback)
    ordered = [parts[start] for start in sorted(parts)]
    for _ in range(SWEEPS[effort]):
        _sweep(W, ordered, factor.hessian)
    return ordered


def _columns(W: torch.Tensor, step: BlockStep) -> torch.Tensor:
    return W[:, step.start : step.start + len(step.hessian)]


def _solve_block(kind: Codec, goal: torch.Tensor, factor: BlockFactor, step: BlockStep, effort: str) -> Part:
    """Round one block's columns to what is best given all blocks before."""
    importance = factor.importance[step.start : step.start + goal.shape[1]].contiguous()
    part: Part
    if kind.name in POINT_SHAPES:
        assert isinstance(kind, FieldCodec)
        part = solve_points(kind, goal, importance, step, POINT_TRIES[effort])
    else:
        scales = searched_scales(kind, goal, importance)
        if TRIES[effort] > 1:
            scales = search_beside(goal, scales, step, TRIES[effort])
        part = _round(goal, scales, step)
    if ROUNDS[effort]:
        part.improve(linear(part.misses(goal), step.hessian), step.hessian, ROUNDS[effort])
    return part


def _round(goal: torch.Tensor, scales: BlockScales, step: BlockStep) -> _Part:
    """Round a block's columns, each error handed on inside the block."""
    return _Part(block_loops.round_codes(goal, step.local, scales), scales)


def _sweep(W: torch.Tensor, parts: Sequence[Part], H: torch.Tensor) -> None:
    """Improve each block once more under H, all others held; `parts` are in the order of the columns."""
    columns = torch.split(W, WIDTH, 1)
    errors = [part.misses(w.contiguous()) for w, part in zip(columns, parts, strict=True)]
    gradient = linear(torch.cat(errors, 1), H)
    for start, part in zip(range(0, len(H), WIDTH), parts, strict=True):
        end = min(start + WIDTH, len(H))
        before = part.values()
        inside = H[start:end, start:end].contiguous()
        part.improve(gradient[:, start:end].clone(), inside, _SWEEP_ROUNDS)
        gradient -= linear(part.values() - before, H[:, start:end].contiguous())


def refit_blocks(
    codes: torch.Tensor, scales: BlockScales, gradient: torch.Tensor, H: torch.Tensor
) -> tuple[BlockScales, torch.Tensor]:
    """Return scales that are better for the codes, and what they add to Ŵ, f32 (N, w).

    `gradient`, f32 (N, w), is (W - Ŵ) H with H f32 (w, w). d and dmin stay where integers stand beside them.
    """
    fields, moves = block_loops.refit(gradient, codes, H, scales.shape, _fields(scales))
    return _changed(scales, fields), moves


def search_beside(goal: torch.Tensor, scales: BlockScales, step: BlockStep, tries: int) -> BlockScales:
    """Return scales that round each sub-block better, if it is rounded for itself.

    `goal`, f32 (N, w), is what is rounded. Each sub-block is judged by its own part of S_b, as
    quantize/solver/scales.py judges groups, on `tries` grids, the first of which is the one it has: 19 at the
    most where there are minima, else 7.
    """
    shape = scales.shape
    factors, beside = step.subs[shape.sub], _beside(shape, tries)
    return _changed(scales, block_loops.search(goal, factors, shape, beside, _fields(scales)))


def _beside(shape: BlockShape, tries: int) -> list[tuple[int, int]]:
    """Return what each try adds to step and drop: the likeliest first, after nothing."""
    unit = max(1, (shape.steps or (0, 0))[1] // 31)
    ways = _WAYS if shape.based else _WAYS_OF_STEPS
    found = [(0, 0)] + [(far * unit * x, far * unit * y) for far in (1, 2, 3) for x, y in ways]
    return found[:tries]


def _fields(scales: BlockScales) -> torch.Tensor:
    """Return d, dmin, step, drop, scale and base of each sub-block, f32 (6, N, G)."""
    grid = scales.grid()
    return torch.stack([*scales.units(), scales.steps, scales.drops, grid.scale, grid.base])


def _changed(scales: BlockScales, fields: torch.Tensor) -> BlockScales:
    """Return scales with other steps, drops, scales and bases, f32 (4, N, G)."""
    if scales.shape.steps is None:
        return replace(scales, d=fields[2], dmin=-fields[3] if scales.shape.based else scales.dmin)
    return replace(scales, steps=fields[0], drops=fields[1])
