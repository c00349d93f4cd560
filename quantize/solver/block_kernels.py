"""The loops over a block's columns on the CPU: codes rounded with compensation, codes moved to their best.

As in quantize/solver/kernels.py rows are lanes, 64 side by side. But blocks are longer here, and a tile of
all their columns does not stay in the first-level cache: so columns gather what those before have left for
them, eight together, instead of handing their own share to all that follow. Products and sums may be fused:
there are no bits of another program to match; what a code stands for is computed elsewhere (`Grid.values`).
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats
from quantize.codecs.native.compiled import fused, inlined
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.kernels import _load_codes, _store, _values, load

_AHEAD = 8  # columns that gather together: what they read of all before is read once
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point


@inlined
def gather(changes: Floats, factors: Floats, count: int, goal: Floats) -> None:
    """Add Σ factors_k * changes_k of the first `count` columns to a column's goal."""
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        for lane in range(LANES):
            first = changes[k, lane] * f0 + changes[k + 1, lane] * f1
            goal[lane] += first + (changes[k + 2, lane] * f2 + changes[k + 3, lane] * f3)
    for k in range(whole, count):
        factor = factors[k]
        for lane in range(LANES):
            goal[lane] += changes[k, lane] * factor


@fused
def _gather_ahead(changes: Floats, factors: Floats, count: int, goals: Floats) -> None:
    """Add to some columns' goals what the first `count` columns, a multiple of four, have left for them."""
    for k in range(0, count, 4):
        for c in range(len(goals)):
            f0, f1, f2, f3 = factors[c, k], factors[c, k + 1], factors[c, k + 2], factors[c, k + 3]
            for lane in range(LANES):
                first = changes[k, lane] * f0 + changes[k + 1, lane] * f1
                goals[c, lane] += first + (changes[k + 2, lane] * f2 + changes[k + 3, lane] * f3)


@fused
def invert(scale: Floats, inverse: Floats) -> None:
    """Set 1 / scale, or zero where the scale is zero."""
    for lane in range(LANES):
        inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO


@inlined
def nearest_levels(
    goal: Floats, grid: Any, levels: Floats, middles: Floats, codes: Floats, values: Floats
) -> None:
    """Set the codes nearest to a lane's goal, and their values; `grid` is scale, its inverse and base."""
    scale, inverse, base = grid
    if len(middles) == 0:
        top = np.float32(len(levels) - 1)
        for lane in range(LANES):
            units = (goal[lane] - base[lane]) * inverse[lane]
            code = np.float32(min(max(units, ZERO), top) + _ROUNDER) - _ROUNDER
            codes[lane] = code
            values[lane] = scale[lane] * code + base[lane]
        return
    for lane in range(LANES):
        codes[lane] = ZERO
        values[lane] = levels[0]
    for i in range(len(middles)):
        gap = levels[i + 1] - levels[i]
        for lane in range(LANES):
            above = goal[lane] * inverse[lane] > middles[i]
            codes[lane] += ONE if above else ZERO
            values[lane] += gap if above else ZERO
    for lane in range(LANES):
        values[lane] *= scale[lane]


@fused
def round_block(
    target: Floats,
    order: Any,
    feedback: Floats,
    levels: Floats,
    middles: Floats,
    scale: Floats,
    base: Floats,
    out_codes: Bytes,
) -> None:
    """Round the columns of a block (N, B) in an order, each error handed on to the columns to come.

    `feedback` (B, B) is Ũᵀ in that order; scale and base are (N, G).
    """
    n, group = len(order), len(order) // scale.shape[1]
    weight, errors, codes, column = float_tile(n), float_tile(n), float_tile(n), lanes()
    goals, values = float_tile(_AHEAD), lanes()
    scales, bases = float_tile(scale.shape[1]), float_tile(scale.shape[1])
    inverses = float_tile(scale.shape[1])
    for first in range(0, len(target), LANES):
        load(target, first, weight)
        load(scale, first, scales)
        load(base, first, bases)
        for i in range(len(scales)):
            invert(scales[i], inverses[i])
        for j in range(n):
            at = order[j]
            if j % _AHEAD == 0:
                end = min(j + _AHEAD, n)
                for c in range(j, end):
                    for lane in range(LANES):
                        goals[c - j, lane] = weight[order[c], lane]
                _gather_ahead(errors, feedback[j:end], j, goals[: end - j])
            start = j // _AHEAD * _AHEAD
            goal = goals[j - start]
            gather(errors[start:], feedback[j, start:], j - start, goal)
            grid = scales[at // group], inverses[at // group], bases[at // group]
            nearest_levels(goal, grid, levels, middles, column, values)
            for lane in range(LANES):
                codes[at, lane] = column[lane]
                errors[j, lane] = weight[at, lane] - values[lane]
        _store(codes, first, out_codes)


@fused
def move_block(
    gradient: Floats,
    hessian: Floats,
    levels: Floats,
    middles: Floats,
    scale: Floats,
    base: Floats,
    codes: Bytes,
    out_moves: Floats,
) -> None:
    """Move each code of a block (N, B) to its best, the others held; set what was added to Ŵ.

    `gradient` is (W - Ŵ) H, `hessian` (B, B), scale and base (N, G).
    """
    n = gradient.shape[1]
    group = n // scale.shape[1]
    slope, old, back = float_tile(n), float_tile(n), float_tile(n)
    goal, before, new, after = lanes(), lanes(), lanes(), lanes()
    scales, bases = float_tile(scale.shape[1]), float_tile(scale.shape[1])
    inverses = float_tile(scale.shape[1])
    for first in range(0, len(gradient), LANES):
        load(gradient, first, slope)
        _load_codes(codes, first, old)
        load(scale, first, scales)
        load(base, first, bases)
        for i in range(len(scales)):
            invert(scales[i], inverses[i])
        for j in range(n):
            grid = scales[j // group], inverses[j // group], bases[j // group]
            start = j // _AHEAD * _AHEAD
            if j == start:
                end = min(j + _AHEAD, n)
                _gather_ahead(back, hessian[j:end], j, slope[j:end])
            gather(back[start:], hessian[j, start:], j - start, slope[j])
            step = ONE / hessian[j, j]
            _values(old[j], grid[0], grid[2], levels, len(middles) == 0, before)
            for lane in range(LANES):
                goal[lane] = before[lane] + slope[j, lane] * step
            nearest_levels(goal, grid, levels, middles, new, after)
            for lane in range(LANES):
                nearer = abs(goal[lane] - after[lane]) < abs(goal[lane] - before[lane])
                back[j, lane] = before[lane] - after[lane] if nearer else ZERO
                old[j, lane] = new[lane] if nearer else old[j, lane]
        for i in range(n):
            for lane in range(LANES):
                back[i, lane] = -back[i, lane]
        _store(old, first, codes)
        _store(back, first, out_moves)


@fused
def misses(W: Floats, codes: Bytes, scale: Floats, base: Floats, levels: Floats, out: Floats) -> None:
    """Set W - Ŵ, (N, B), of codes on a grid whose sub-blocks lie side by side."""
    n_groups = scale.shape[1]
    n = W.shape[1] // n_groups
    for row in range(len(W)):
        for j in range(n_groups):
            step, start = scale[row, j], base[row, j]
            for i in range(j * n, j * n + n):
                out[row, i] = W[row, i] - (step * levels[codes[row, i]] + start)
