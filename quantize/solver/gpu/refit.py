"""The refit of ggml's scales on a GPU: each sub-block's integers moved to their best for the codes.

It does what `refit_block` of quantize/solver/refit_kernels.py does, whose head has the formulas. A program
holds the gradient of a few rows by sub-blocks; these follow one another, each seeing what those before have
changed.
"""

import torch
import triton
import triton.language as tl

from quantize.solver.block_grids import BlockShape
from quantize.solver.gpu import launching
from quantize.solver.gpu.device import half, kernel, level_of, limited, tile, warps, whole

_TOO_SMALL = tl.constexpr(1e-5)
_LARGEST = tl.constexpr(65504.0)


def refit_scales(
    gradient: torch.Tensor, codes: torch.Tensor, H: torch.Tensor, shape: BlockShape, fields: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step, drop, scale and base, f32 (4, N, G), that are better for the codes, uint8 (N, B), and what
    they add to Ŵ, f32 (N, B).

    `gradient`, f32 (N, B), is (W - Ŵ) H with H f32 (B, B); `fields`, f32 (6, N, G), has d and dmin, which
    stay, before the four.
    """
    gradient, codes, H, fields = (each.contiguous() for each in (gradient, codes, H, fields))
    levels = shape.levels(codes.device)
    n_levels = len(levels) if shape.uneven else 0
    low, high = shape.steps or (1, 1)
    limits = float(low), float(high), float(shape.drop)
    (n_rows, n_columns), n_groups = codes.shape, fields.shape[2]
    rows, columns = tile(n_rows, n_columns)
    out, moves = torch.empty_like(fields[2:]), torch.empty_like(gradient)
    with launching(gradient):
        _refit[(triton.cdiv(n_rows, rows),)](
            gradient, codes, H, levels, fields, out, moves, n_rows, n_columns,
            n_rows * n_groups, float(shape.middle), *limits,
            COUNT=n_groups, ROWS=rows, GROUPS=columns // shape.sub, SUB=shape.sub, LEVELS=n_levels,
            AFFINE=shape.based, ALONE=shape.steps is None, num_warps=warps(columns), num_stages=1,
        )  # fmt: skip
    return out, moves


@kernel
def _refit(
    gradient: tl.tensor,
    codes: tl.tensor,
    hessian: tl.tensor,
    levels: tl.tensor,
    fields: tl.tensor,
    out: tl.tensor,
    out_moves: tl.tensor,
    n_rows: tl.tensor,
    n_columns: tl.tensor,
    stride: tl.tensor,
    middle: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    largest_drop: tl.tensor,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SUB: tl.constexpr,
    LEVELS: tl.constexpr,
    AFFINE: tl.constexpr,
    ALONE: tl.constexpr,
) -> None:
    """Refit all sub-blocks of ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups, columns = tl.arange(0, GROUPS), tl.arange(0, SUB)
    present, there = rows < n_rows, (groups < COUNT)[:, None]
    within = groups[:, None] * SUB + columns[None, :]
    slopes = tl.load(
        gradient + (rows * n_columns)[:, None, None] + within[None, :, :],
        mask=present[:, None, None] & there[None, :, :],
        other=0.0,
    )
    for g in range(COUNT):
        first = g * SUB
        slope = tl.sum(tl.where(groups[None, :, None] == g, slopes, 0.0), axis=1)
        line = rows * n_columns + first
        spot = line[:, None] + columns[None, :]
        code = tl.load(codes + spot, mask=present[:, None], other=0).to(tl.float32)
        level = level_of(code, levels, LEVELS) - middle
        product, inside = tl.zeros((ROWS, SUB), tl.float32), tl.zeros((SUB,), tl.float32)
        for k in range(SUB):
            code_k = tl.load(codes + line + k, mask=present, other=0).to(tl.float32)
            row = tl.load(hessian + (first + k) * n_columns + first + columns)
            product += (level_of(code_k, levels, LEVELS) - middle)[:, None] * row[None, :]
            inside += row
        along, curve = tl.sum(slope * level, axis=1), tl.sum(product * level, axis=1)
        field = rows * COUNT + g
        unit = tl.load(fields + field, mask=present, other=0.0)
        step = tl.load(fields + 2 * stride + field, mask=present, other=0.0)
        drop = tl.load(fields + 3 * stride + field, mask=present, other=0.0)
        scale = tl.load(fields + 4 * stride + field, mask=present, other=0.0)
        base = tl.load(fields + 5 * stride + field, mask=present, other=0.0)
        best_step, best_drop, best_scale, best_base = step, drop, scale, base
        move, lift = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        per_unit = tl.where(unit == 0.0, 0.0, tl.div_rn(1.0, unit))
        if AFFINE:
            drop_unit = tl.load(fields + stride + field, mask=present, other=0.0)
            per_drop_unit = tl.where(drop_unit == 0.0, 0.0, tl.div_rn(1.0, drop_unit))
            lifting, cross = tl.sum(slope, axis=1), tl.sum(product, axis=1)
            ones = tl.sum(inside, axis=0)
            determinant = curve * ones - cross * cross
            known = determinant > _TOO_SMALL * curve * ones
            free = tl.where(known, (along * ones - lifting * cross) / determinant, 0.0)
            central = whole(limited(step + free * per_unit, low, high))
            gain = tl.zeros((ROWS,), tl.float32)
            for i in tl.static_range(3):
                if ALONE:
                    new_step, new_scale = step, half(limited(scale + free, -_LARGEST, _LARGEST))
                else:
                    new_step = limited(central + (i - 1.0), low, high)
                    new_scale = unit * new_step
                up = new_scale - scale
                goal = base + (lifting - cross * up) / ones
                if ALONE:
                    new_drop, new_base = drop, half(limited(goal, -_LARGEST, _LARGEST))
                else:
                    new_drop = whole(limited(-goal * per_drop_unit, 0.0, largest_drop))
                    new_base = -(drop_unit * new_drop)
                raised = new_base - base
                lowered = 2.0 * (up * along + raised * lifting) - (
                    up * up * curve + 2.0 * up * raised * cross + raised * raised * ones
                )
                wins = lowered > gain
                gain = tl.where(wins, lowered, gain)
                move, lift = tl.where(wins, up, move), tl.where(wins, raised, lift)
                best_step, best_drop = (
                    tl.where(wins, new_step, best_step),
                    tl.where(wins, new_drop, best_drop),
                )
                best_scale = tl.where(wins, new_scale, best_scale)
                best_base = tl.where(wins, new_base, best_base)
        else:
            free = tl.where(curve > 0.0, along / curve, 0.0)
            if ALONE:
                new_step, new_scale = step, half(limited(scale + free, -_LARGEST, _LARGEST))
            else:
                new_step = whole(limited(step + free * per_unit, low, high))
                new_scale = unit * new_step
            up = new_scale - scale
            wins = up * (2.0 * along - up * curve) > 0.0
            move = tl.where(wins, up, move)
            best_step, best_scale = tl.where(wins, new_step, best_step), tl.where(wins, new_scale, best_scale)
        tl.store(out + field, best_step, mask=present)
        tl.store(out + stride + field, best_drop, mask=present)
        tl.store(out + 2 * stride + field, best_scale, mask=present)
        tl.store(out + 3 * stride + field, best_base, mask=present)
        tl.store(out_moves + spot, move[:, None] * level + lift[:, None], mask=present[:, None])
        for k in range(SUB):
            code_k = tl.load(codes + line + k, mask=present, other=0).to(tl.float32)
            row = tl.load(hessian + (first + k) * n_columns + within, mask=there, other=0.0)
            change = move * (level_of(code_k, levels, LEVELS) - middle) + lift
            slopes -= change[:, None, None] * row[None, :, :]
