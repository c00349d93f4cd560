"""The refit of ggml's scales on the CPU: each sub-block's integers moved to their best for the codes.

With the levels l of a sub-block and the gradient G = (W - Ŵ) H, a step of u in its scale and v in its base
lowers the loss by

    2 (u G·l + v G·1) - (u² lHl + 2 u v lH1 + v² 1H1)

The best u of both together is rounded to what can be stored, then the best v for it, and so for the integers
beside it; the largest gain is taken, none if none is above zero. Sub-blocks follow one another, each seeing
what those before have changed. Rows are lanes, as in quantize/solver/kernels.py.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats, half, nearest
from quantize.codecs.native.compiled import fused
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.block_kernels import gather
from quantize.solver.kernels import _store, load

_TOO_SMALL = np.float32(1e-5)
_LARGEST = np.float32(65504)


@fused
def load_scales(scales: Floats, first: int, group: int, now: Floats) -> None:
    """Copy the six fields of one sub-block, of (6, N, G), into lanes."""
    for f in range(6):
        for lane in range(LANES):
            now[f, lane] = scales[f, first + lane, group] if first + lane < scales.shape[1] else ZERO


@fused
def store_scales(now: Floats, first: int, group: int, scales: Floats) -> None:
    """Copy what may change of them, step, drop, scale and base, back."""
    for f in range(2, 6):
        for lane in range(min(LANES, scales.shape[1] - first)):
            scales[f, first + lane, group] = now[f, lane]


@fused
def _load_levels(codes: Bytes, first: int, column: int, levels: Floats, tile: Floats) -> None:
    """Set the levels of a sub-block's codes, from `column` on."""
    for lane in range(LANES):
        if first + lane < len(codes):
            row = codes[first + lane]
            for i in range(len(tile)):
                tile[i, lane] = levels[row[column + i]]
        else:
            for i in range(len(tile)):
                tile[i, lane] = ZERO


@fused
def _curve(level: Floats, slope: Floats, hessian: Floats, column: int, sums: Floats) -> None:
    """Set G·l, G·1, lHl and lH1 of one sub-block, whose columns of H start at `column`."""
    product = lanes()
    slope_level, slope_one, level_level, level_one = sums[0], sums[1], sums[2], sums[3]
    for lane in range(LANES):
        slope_level[lane] = slope_one[lane] = level_level[lane] = level_one[lane] = ZERO
    for i in range(len(level)):
        row, total = hessian[column + i], ZERO
        for lane in range(LANES):
            product[lane] = ZERO
        for k in range(len(level)):
            factor = row[column + k]
            total += factor
            for lane in range(LANES):
                product[lane] += factor * level[k, lane]
        for lane in range(LANES):
            slope_level[lane] += slope[column + i, lane] * level[i, lane]
            slope_one[lane] += slope[column + i, lane]
            level_level[lane] += product[lane] * level[i, lane]
            level_one[lane] += total * level[i, lane]


@fused
def _inside(hessian: Floats, column: int, n: int) -> Any:
    """Return 1H1 of the n columns from `column` on."""
    total = ZERO
    for i in range(column, column + n):
        for k in range(column, column + n):
            total += hessian[i, k]
    return total


@fused
def _limited(value: Any, low: Any, high: Any) -> Any:
    """Round to the nearest integer in low..high, as a float32."""
    return np.float32(nearest(min(max(value, low), high)))


@fused
def _step_symmetric(sums: Floats, limits: Floats, now: Floats, step: Floats) -> None:
    """Set the scale's step u; `now` is unit, drop unit, step, drop, scale, base, and takes the new ones."""
    unit, steps, scale = now[0], now[2], now[4]
    for lane in range(LANES):
        slope, curve = sums[0, lane], sums[2, lane]
        best = slope / curve if curve > ZERO else ZERO
        if limits[3] != ZERO:
            whole, new = ONE, half(min(max(scale[lane] + best, -_LARGEST), _LARGEST))
        else:
            inverse = ONE / unit[lane] if unit[lane] != ZERO else ZERO
            whole = _limited(steps[lane] + best * inverse, limits[0], limits[1])
            new = unit[lane] * whole
        move = new - scale[lane]
        helps = move * (np.float32(2) * slope - move * curve) > ZERO
        step[lane] = move if helps else ZERO
        steps[lane] = whole if helps else steps[lane]
        scale[lane] = new if helps else scale[lane]


@fused
def _step_affine(sums: Floats, ones: Any, limits: Floats, now: Floats, step: Floats, lift: Floats) -> None:
    """Set the steps u of the scale and v of the base; see `_step_symmetric`."""
    unit, drop_unit, steps, drops, scale, base = now[0], now[1], now[2], now[3], now[4], now[5]
    halves, two = limits[3] != ZERO, np.float32(2)
    for lane in range(LANES):
        slope, slope_one, curve, cross = sums[0, lane], sums[1, lane], sums[2, lane], sums[3, lane]
        determinant = curve * ones - cross * cross
        free = (
            (slope * ones - slope_one * cross) / determinant
            if determinant > _TOO_SMALL * curve * ones
            else ZERO
        )
        inverse = ONE / unit[lane] if unit[lane] != ZERO else ZERO
        drop_inverse = ONE / drop_unit[lane] if drop_unit[lane] != ZERO else ZERO
        middle = _limited(steps[lane] + free * inverse, limits[0], limits[1])
        gain, u, v = ZERO, ZERO, ZERO
        best_step, best_drop, best_scale, best_base = steps[lane], drops[lane], scale[lane], base[lane]
        for beside in range(-1, 2):
            if halves:
                whole, new = ONE, half(min(max(scale[lane] + free, -_LARGEST), _LARGEST))
            else:
                whole = min(max(middle + np.float32(beside), limits[0]), limits[1])
                new = unit[lane] * whole
            up = new - scale[lane]
            goal = base[lane] + (slope_one - cross * up) / ones
            if halves:
                drop, new_base = ONE, half(min(max(goal, -_LARGEST), _LARGEST))
            else:
                drop = _limited(-goal * drop_inverse, ZERO, limits[2])
                new_base = -(drop_unit[lane] * drop)
            raised = new_base - base[lane]
            gained = two * (up * slope + raised * slope_one) - (
                up * up * curve + two * up * raised * cross + raised * raised * ones
            )
            wins = gained > gain
            gain = gained if wins else gain
            u, v = up if wins else u, raised if wins else v
            best_step, best_drop = whole if wins else best_step, drop if wins else best_drop
            best_scale, best_base = new if wins else best_scale, new_base if wins else best_base
        step[lane], lift[lane] = u, v
        steps[lane], drops[lane], scale[lane], base[lane] = best_step, best_drop, best_scale, best_base


@fused
def refit_block(
    gradient: Floats,
    codes: Bytes,
    hessian: Floats,
    levels: Floats,
    affine: bool,
    limits: Floats,
    scales: Floats,
    out_moves: Floats,
) -> None:
    """Move the scales of every sub-block of a block (N, B) to their best; set what that added to Ŵ.

    `gradient` is (W - Ŵ) H, `hessian` (B, B), `levels` those of the codes less the middle. `scales`, f32
    (6, N, G), holds d, dmin, step, drop, scale and base of each sub-block; the last four are changed.
    `limits` are the smallest and largest step, the largest drop, and whether d and base are halves that stand
    alone, with no integers.
    """
    n_groups = scales.shape[2]
    n = gradient.shape[1] // n_groups
    slope, level, moves = float_tile(gradient.shape[1]), float_tile(n), float_tile(n)
    all_moves, sums, now = float_tile(gradient.shape[1]), float_tile(4), float_tile(6)
    step, lift = lanes(), lanes()
    ones = np.empty(n_groups, np.float32)
    for j in range(n_groups):
        ones[j] = _inside(hessian, j * n, n)
    for first in range(0, len(gradient), LANES):
        load(gradient, first, slope)
        for j in range(n_groups):
            column = j * n
            load_scales(scales, first, j, now)
            _load_levels(codes, first, column, levels, level)
            _curve(level, slope, hessian, column, sums)
            if affine:
                _step_affine(sums, ones[j], limits, now, step, lift)
            else:
                _step_symmetric(sums, limits, now, step)
                lift[:] = ZERO
            for i in range(n):
                for lane in range(LANES):
                    moves[i, lane] = -(step[lane] * level[i, lane] + lift[lane])
                    all_moves[column + i, lane] = -moves[i, lane]
            for k in range(column + n, len(slope)):
                gather(moves, hessian[k, column:], n, slope[k])
            store_scales(now, first, j, scales)
        _store(all_moves, first, out_moves)
