"""The types' own searches of scales on a GPU: where the search beside them begins.

They do what `quantize.codecs.native` does for rows with importances: each sub-block tries a ladder of inverse
scales and keeps the best weighted least-squares fit, and the sub-blocks' scales are rounded to integers of a
super-block. Codes are not kept, for compensation finds others. So nothing here has bits to match, and sums
come as they are fastest; quantize/codecs/tensors.py, whose bits are ggml's, takes thousands of operations
where these are three kernels.

Rows are lanes, as in quantize/solver/gpu/beside.py: tiles are (n, 32), a sub-block of 32 rows.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from quantize.solver.block_grids import BlockShape
from quantize.solver.gpu import launching
from quantize.solver.gpu.device import kernel, limited, whole

_ROWS = 32
_TINY = 1e-15
_EMPTY = tl.constexpr(_TINY)
_LADDER = tl.constexpr(37)
_PASSES = tl.constexpr(5)
_SHARES: Mapping[str, float] = {
    **dict.fromkeys(("Q3_K", "Q4_K", "Q5_K", "IQ4_XS", "IQ4_NL"), 2.0),
    **dict.fromkeys(("Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), 1.0),
}
"""A weight counts importance * sqrt(share * mean square + its own square); in Q6_K importance alone."""

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""d and dmin, f32 (N, B), not rounded to half precision yet, and steps and drops, f32 (N, G)."""


def search_type(name: str, shape: BlockShape, W: torch.Tensor, importance: torch.Tensor) -> Found:
    """Return the scales that the search of a type, but Q8_0, finds for W, f32 (N, w); importances are f32
    (w,)."""
    lanes = W.T.contiguous()
    weights = _weights(name, shape, lanes, importance)
    if shape.based:
        found = _affine(lanes, weights, shape)
    else:
        scale, _ = _symmetric(lanes, weights, shape.sub, shape)
        found = scale, torch.zeros_like(scale)
    if shape.steps is None:
        ones = torch.ones_like(found[0].T)
        return found[0].T, found[1].T, ones, ones if shape.based else torch.zeros_like(ones)
    sums = weights.reshape(-1, shape.sub, len(W)).sum(1)
    if shape.based:
        (steps, d), (drops, dmin) = (_positive(part, sums, shape.steps[1]) for part in found)
        return d[:, None], dmin[:, None], steps.T, drops.T
    steps, d = _signed(name, shape.steps, found[0], sums)
    return d[:, None], torch.zeros_like(d[:, None]), steps.T, torch.zeros_like(steps.T)


def _weights(name: str, shape: BlockShape, lanes: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return what each weight counts, f32 (w, N), of lanes f32 (w, N)."""
    if name not in _SHARES:
        return importance[:, None].expand_as(lanes).contiguous()
    squares = lanes.square()
    if name == "IQ4_NL":  # the mean is the sub-block's, not the row's
        means = squares.reshape(-1, shape.sub, lanes.shape[1]).mean(1).repeat_interleave(shape.sub, 0)
    else:
        means = squares.mean(0, keepdim=True)
    return importance[:, None] * (_SHARES[name] * means + squares).sqrt()


def _signed(
    name: str, steps: tuple[int, int], scale: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integer scales, f32 (G, N), and d, f32 (N,), of scales f32 (G, N) of either sign."""
    low, high = steps
    if name == "Q3_K":  # alone searches for these too, sub-blocks weighed by their sums
        d, inverse = _symmetric(scale, sums, len(scale), BlockShape(len(scale), high - low + 1, -low))
    else:
        extreme = scale.gather(0, scale.abs().argmax(0, keepdim=True))
        d = torch.where(extreme.abs() < _TINY, 0.0, extreme / low)
        inverse = torch.where(d == 0, 0.0, 1.0 / d)
    return (inverse * scale).round().clamp(low, high), d[0]


def _affine(
    lanes: torch.Tensor, weights: torch.Tensor, shape: BlockShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and drop, the minimum's negative, of sub-blocks, f32 (G, N)."""
    (n_columns, n_rows), top = lanes.shape, float(shape.n_levels - 1)
    scale, drop = (torch.empty(n_columns // shape.sub, n_rows, device=lanes.device) for _ in range(2))
    with launching(lanes):
        _search_affine[(triton.cdiv(n_rows, _ROWS), len(scale))](
            lanes, weights, scale, drop, n_rows, top,
            ROWS=_ROWS, SUB=shape.sub, num_warps=1, num_stages=1,
        )  # fmt: skip
    return scale, drop


def _symmetric(
    lanes: torch.Tensor, weights: torch.Tensor, sub: int, shape: BlockShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale of sub-blocks of `sub`, f32 (G, N), and the inverse scale that it was fitted with.

    The levels are those of the shape, less its middle.
    """
    n_columns, n_rows = lanes.shape
    scale, inverse = (torch.empty(n_columns // sub, n_rows, device=lanes.device) for _ in range(2))
    levels = shape.levels(lanes.device)
    middles, n_middles = (levels[1:] + levels[:-1]) / 2, len(levels) - 1 if shape.uneven else 0
    # The first rung, then rungs from start - reach * stride on: what inverse scales are times the extreme.
    if shape.uneven:
        first, start, stride, reach = 127.0, -127.0, 1.0, 7
    else:
        first, start, stride, reach = -float(shape.middle), -float(shape.middle), -0.1, 9
    bounds = -float(shape.middle), float(shape.n_levels - 1 - shape.middle)
    with launching(lanes):
        _search_symmetric[(triton.cdiv(n_rows, _ROWS), len(scale))](
            lanes, weights, levels, middles, scale, inverse, n_rows, first, start, stride, *bounds,
            ROWS=_ROWS, SUB=sub, REACH=reach, MIDDLES=n_middles, num_warps=1, num_stages=1,
        )  # fmt: skip
    return scale, inverse


def _positive(scales: torch.Tensor, sums: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes 0..top, f32 (G, N), and d, f32 (N,), of scales f32 (G, N) not below zero."""
    n_groups, n_rows = scales.shape
    codes, d = torch.empty_like(scales), torch.empty(n_rows, device=scales.device)
    with launching(scales):
        _search_positive[(triton.cdiv(n_rows, _ROWS),)](
            scales, sums, codes, d, n_rows, float(top),
            ROWS=_ROWS, GROUPS=n_groups, num_warps=1, num_stages=1,
        )  # fmt: skip
    return codes, d


@kernel
def _search_affine(
    lanes: tl.tensor,
    weights: tl.tensor,
    out_scale: tl.tensor,
    out_drop: tl.tensor,
    n_rows: tl.tensor,
    top: tl.tensor,
    ROWS: tl.constexpr,
    SUB: tl.constexpr,
) -> None:
    """Search scale and minimum of one sub-block of ROWS rows (`quantize.codecs.native.affine`)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    present = rows < n_rows
    spot = (group * SUB + tl.arange(0, SUB))[:, None] * n_rows + rows[None, :]
    x = tl.load(lanes + spot, mask=present[None, :], other=0.0)
    w = tl.load(weights + spot, mask=present[None, :], other=0.0)
    low, high = tl.minimum(tl.min(x, axis=0), 0.0), tl.max(x, axis=0)
    sum_w, sum_x = tl.sum(w, axis=0), tl.sum(w * x, axis=0)
    spread, flat = high - low, high <= low
    code = whole(limited((top / spread)[None, :] * (x - low[None, :]), 0.0, top))
    scale = tl.where(flat, 0.0, spread / top)
    miss = scale[None, :] * code + low[None, :] - x
    best = tl.where(flat, -1.0, tl.sum(w * miss * miss, axis=0))
    for k in range(_LADDER):
        rung = (k * 0.05 - 0.9 + top) / (high - low)  # whose low is the best fit's by now
        code = whole(limited(rung[None, :] * (x - low[None, :]), 0.0, top))
        weighted = w * code
        sum_l, sum_ll = tl.sum(weighted, axis=0), tl.sum(weighted * code, axis=0)
        sum_lx = tl.sum(weighted * x, axis=0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        fit_low = (sum_ll * sum_x - sum_l * sum_lx) / determinant
        fit_scale = (sum_w * sum_lx - sum_x * sum_l) / determinant
        fit_scale = tl.where(fit_low > 0.0, sum_lx / sum_ll, fit_scale)
        fit_low = tl.where(fit_low > 0.0, 0.0, fit_low)
        miss = fit_scale[None, :] * code + fit_low[None, :] - x
        error = tl.sum(w * miss * miss, axis=0)
        wins = (determinant > 0.0) & (error < best)
        best, scale = tl.where(wins, error, best), tl.where(wins, fit_scale, scale)
        low = tl.where(wins, fit_low, low)
    out = group * n_rows + rows
    tl.store(out_scale + out, scale, mask=present)
    tl.store(out_drop + out, -low, mask=present)


@kernel
def _level(
    x: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    MIDDLES: tl.constexpr,
) -> tl.tensor:
    """Return the level nearest to each number, a whole one in low..high where there are no middles."""
    if MIDDLES == 0:
        level = whole(limited(x, low, high))
    else:
        level = tl.zeros_like(x) + tl.load(levels)
        for i in tl.static_range(MIDDLES):
            gap = tl.load(levels + i + 1) - tl.load(levels + i)
            level += tl.where(x > tl.load(middles + i), gap, 0.0)
    return level


@kernel
def _search_symmetric(
    lanes: tl.tensor,
    weights: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    out_scale: tl.tensor,
    out_inverse: tl.tensor,
    n_rows: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    ROWS: tl.constexpr,
    SUB: tl.constexpr,
    REACH: tl.constexpr,
    MIDDLES: tl.constexpr,
) -> None:
    """Search the scale of one sub-block of ROWS rows (`quantize.codecs.native.symmetric`, and of iq4)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    present = rows < n_rows
    spot = (group * SUB + tl.arange(0, SUB))[:, None] * n_rows + rows[None, :]
    x = tl.load(lanes + spot, mask=present[None, :], other=0.0)
    w = tl.load(weights + spot, mask=present[None, :], other=0.0)
    low, high = tl.min(x, axis=0), tl.max(x, axis=0)
    extreme = tl.where(high >= -low, high, low)
    empty = tl.abs(extreme) < _EMPTY
    best, scale = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    inverse = tl.zeros((ROWS,), tl.float32)
    for k in range(2 * REACH + 2):
        rung = tl.where(k == 0, first, start + (k - 1 - REACH) * stride) / extreme
        level = _level(rung[None, :] * x, lowest, highest, levels, middles, MIDDLES)
        weighted = w * level
        sum_lx, sum_ll = tl.sum(weighted * x, axis=0), tl.sum(weighted * level, axis=0)
        wins = (sum_ll > 0.0) & (sum_lx * sum_lx > best * sum_ll)
        fit = sum_lx / sum_ll
        scale, best = tl.where(wins, fit, scale), tl.where(wins, fit * sum_lx, best)
        inverse = tl.where(wins, rung, inverse)
    out = group * n_rows + rows
    tl.store(out_scale + out, tl.where(empty, 0.0, scale), mask=present)
    tl.store(out_inverse + out, tl.where(empty, 0.0, inverse), mask=present)


@kernel
def _search_positive(
    scales: tl.tensor,
    sums: tl.tensor,
    out_codes: tl.tensor,
    out_d: tl.tensor,
    n_rows: tl.tensor,
    top: tl.tensor,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Round the scales of ROWS rows' sub-blocks to multiples of d (`quantize.codecs.native.affine`)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups, present = tl.arange(0, GROUPS), rows < n_rows
    spot = groups[:, None] * n_rows + rows[None, :]
    x = tl.load(scales + spot, mask=present[None, :], other=0.0)
    w = tl.load(sums + spot, mask=present[None, :], other=0.0)
    largest = tl.maximum(tl.max(x, axis=0), 0.0)
    empty = largest < _EMPTY
    best, inverse = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for k in range(10):
        rung = (tl.where(k == 0, 0.0, (k - 5) * 0.1) + top) / largest
        miss = x - whole(limited(rung[None, :] * x, 0.0, top)) * (1.0 / rung)[None, :]
        error = tl.sum(w * miss * miss, axis=0)
        wins = (error < best) | (k == 0)
        best, inverse = tl.where(wins, error, best), tl.where(wins, rung, inverse)
    code = whole(limited(inverse[None, :] * x, 0.0, top))
    sum_lx, sum_ll = tl.sum(w * x * code, axis=0), tl.sum(w * code * code, axis=0)
    for turn in range(_PASSES * GROUPS):
        here = groups[:, None] == turn % GROUPS
        value = tl.sum(tl.where(here, x, 0.0), axis=0)
        weight = tl.sum(tl.where(here, w, 0.0), axis=0)
        old = tl.sum(tl.where(here, code, 0.0), axis=0)
        rest_lx, rest_ll = sum_lx - weight * value * old, sum_ll - weight * old * old
        new = whole(limited(value * rest_ll / rest_lx, 0.0, top))
        new_lx, new_ll = rest_lx + weight * value * new, rest_ll + weight * new * new
        better = new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll
        moves = (rest_lx > 0.0) & (rest_ll > 0.0) & better
        sum_lx, sum_ll = tl.where(moves, new_lx, sum_lx), tl.where(moves, new_ll, sum_ll)
        code = tl.where(here & moves[None, :], new[None, :], code)
    d = tl.where((sum_ll > 0.0) & (largest >= _EMPTY), sum_lx / sum_ll, 0.0)
    tl.store(out_d + rows, d, mask=present)
    tl.store(out_codes + spot, tl.where(empty[None, :], 0.0, code), mask=present[None, :])
