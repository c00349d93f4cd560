"""The search of ggml's scales on a GPU: each sub-block rounded by itself on the grids beside its own.

It does what `search_block` of quantize/solver/search_kernels.py does. Sub-blocks are short, so here rows are
lanes: a thread holds what one row's columns have left to each other, and nothing passes between threads.
"""

import torch
import triton
import triton.language as tl

from quantize.solver.block_factor import SubFactors
from quantize.solver.block_grids import BlockShape
from quantize.solver.gpu import launching
from quantize.solver.gpu.device import half, kernel, level_of, limited, nearest

_ROWS = 32
# Of a scale that stands alone: what one step of a search adds to it, and of it to the base.
_SHARE, _LIFT = tl.constexpr(0.03), tl.constexpr(0.5)


def search_scales(
    goal: torch.Tensor, factors: SubFactors, shape: BlockShape, beside: torch.Tensor, fields: torch.Tensor
) -> torch.Tensor:
    """Return step, drop, scale and base, f32 (4, N, G), the best of those beside the sub-blocks' own.

    `goal` is f32 (N, B); `fields`, f32 (6, N, G), d, dmin and the four that are searched; `beside`, f32
    (C, 2), what candidates add to step and drop, the first of them nothing. The first of equals wins.
    """
    fields, beside = fields.contiguous(), beside.contiguous()
    order, feedback, weights = factors
    lanes = goal.T[order.flatten()]
    levels = shape.levels(goal.device)
    middles, n_middles = (levels[1:] + levels[:-1]) / 2, len(levels) - 1 if shape.uneven else 0
    low, high = shape.steps or (1, 1)
    limits = float(low), float(high), float(shape.drop)
    n_rows, n_groups = fields.shape[1:]
    out = torch.empty_like(fields[2:])
    with launching(goal):
        _search[(triton.cdiv(n_rows, _ROWS), n_groups)](
            lanes, feedback.mT.contiguous(), weights, levels, middles, beside, fields, out, n_rows, n_groups,
            n_rows * n_groups, float(len(levels) - 1), float(shape.middle), *limits,
            TRIES=len(beside), ROWS=_ROWS, SUB=shape.sub, MIDDLES=n_middles,
            AFFINE=shape.based, ALONE=shape.steps is None, num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


@kernel
def _search(
    target: tl.tensor,
    feedback: tl.tensor,
    weights: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    beside: tl.tensor,
    fields: tl.tensor,
    out: tl.tensor,
    n_rows: tl.tensor,
    n_groups: tl.tensor,
    stride: tl.tensor,
    top: tl.tensor,
    middle: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    largest_drop: tl.tensor,
    TRIES: tl.constexpr,
    ROWS: tl.constexpr,
    SUB: tl.constexpr,
    MIDDLES: tl.constexpr,
    AFFINE: tl.constexpr,
    ALONE: tl.constexpr,
) -> None:
    """Try all candidates on one sub-block of ROWS rows; `target` is (B, N), in the order of rounding,
    `feedback` Ũ, (G, n, n)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = tl.arange(0, SUB)
    present = rows < n_rows
    field = rows * n_groups + group
    unit = tl.load(fields + field, mask=present, other=0.0)
    drop_unit = tl.load(fields + stride + field, mask=present, other=0.0)
    now_step = tl.load(fields + 2 * stride + field, mask=present, other=0.0)
    now_drop = tl.load(fields + 3 * stride + field, mask=present, other=0.0)
    now_scale = tl.load(fields + 4 * stride + field, mask=present, other=0.0)
    now_base = tl.load(fields + 5 * stride + field, mask=present, other=0.0)
    best_step, best_drop, best_scale, best_base = now_step, now_drop, now_scale, now_base
    least = tl.zeros((ROWS,), tl.float32)
    for c in range(TRIES):
        add_step, add_drop = tl.load(beside + 2 * c), tl.load(beside + 2 * c + 1)
        if ALONE:
            step, drop = now_step, now_drop
            scale = half(now_scale * (1.0 + _SHARE * add_step))
            base = half(now_base - now_scale * add_drop * _LIFT)
        else:
            step = limited(now_step + add_step, low, high)
            drop = limited(now_drop + add_drop, 0.0, largest_drop)
            scale, base = unit * step, -(drop_unit * drop)
        if not AFFINE:
            base = -(middle * scale)
        inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, scale))
        fed, loss = tl.zeros((SUB, ROWS), tl.float32), tl.zeros((ROWS,), tl.float32)
        for j in range(SUB):
            at = group * SUB + j
            weight = tl.load(target + at.to(tl.int64) * n_rows + rows, mask=present, other=0.0)
            row = tl.load(feedback + at * SUB + columns, mask=columns > j, other=0.0)
            goal = weight + tl.sum(tl.where(columns[:, None] == j, fed, 0.0), axis=0)
            code = nearest(goal, inverse, base, levels, middles, top, MIDDLES)
            value = scale * level_of(code, levels, MIDDLES) + base
            loss += tl.load(weights + at) * (goal - value) * (goal - value)
            fed += (weight - value)[None, :] * row[:, None]
        wins = (loss < least) | (c == 0)
        least = tl.where(wins, loss, least)
        best_step, best_drop = tl.where(wins, step, best_step), tl.where(wins, drop, best_drop)
        best_scale, best_base = tl.where(wins, scale, best_scale), tl.where(wins, base, best_base)
    tl.store(out + field, best_step, mask=present)
    tl.store(out + stride + field, best_drop, mask=present)
    tl.store(out + 2 * stride + field, best_scale, mask=present)
    tl.store(out + 3 * stride + field, best_base, mask=present)
