"""The search of ggml's scales on the CPU: each sub-block rounded by itself on the grids beside its own.

The judge is what compensation would leave inside the sub-block, Σ D_k (target_k - value_k)², as in
quantize/solver/scales.py; the candidates are integers, or halves, that the format can store.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Floats, half
from quantize.codecs.native.compiled import fused
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.block_kernels import gather, invert, nearest_levels
from quantize.solver.refit_kernels import load_scales, store_scales

# Of a scale that stands alone: what one step of a search adds to it, and of it to the base.
_SHARE, _LIFT = np.float32(0.03), np.float32(0.5)


@fused
def _candidate(now: Floats, limits: Floats, middle: Any, affine: bool, add: Any, trial: Floats) -> None:
    """Set step, drop, scale and base that lie `add` beside those of now (see `refit_block`)."""
    for lane in range(LANES):
        if limits[3] != ZERO:
            scale = half(now[4, lane] * (ONE + _SHARE * add[0]))
            base = half(now[5, lane] - now[4, lane] * add[1] * _LIFT)
            step, drop = now[2, lane], now[3, lane]
        else:
            step = min(max(now[2, lane] + add[0], limits[0]), limits[1])
            drop = min(max(now[3, lane] + add[1], ZERO), limits[2])
            scale, base = now[0, lane] * step, -(now[1, lane] * drop)
        trial[2, lane], trial[3, lane], trial[4, lane] = step, drop, scale
        trial[5, lane] = base if affine else -(middle * scale)


@fused
def _loss(
    target: Floats,
    feedback: Floats,
    weights: Floats,
    trial: Floats,
    levels: Floats,
    middles: Floats,
    loss: Floats,
) -> None:
    """Set Σ weights_k (target_k - value_k)² of a sub-block that is compensated on a trial's grid."""
    errors, goal, codes, values = float_tile(len(target)), lanes(), lanes(), lanes()
    inverse = lanes()
    invert(trial[4], inverse)
    grid = trial[4], inverse, trial[5]
    for lane in range(LANES):
        loss[lane] = ZERO
    for j in range(len(target)):
        for lane in range(LANES):
            goal[lane] = target[j, lane]
        gather(errors, feedback[j], j, goal)
        nearest_levels(goal, grid, levels, middles, codes, values)
        weight = weights[j]
        for lane in range(LANES):
            miss = goal[lane] - values[lane]
            loss[lane] += weight * miss * miss
            errors[j, lane] = target[j, lane] - values[lane]


@fused
def _load_ordered(target: Floats, first: int, order: Any, tile: Floats) -> None:
    """Copy a sub-block's columns, in an order, of rows (N, B) from `first` on into lanes."""
    present = min(LANES, len(target) - first)
    for i in range(len(order)):
        for lane in range(LANES):
            tile[i, lane] = target[first + lane, order[i]] if lane < present else ZERO


@fused
def _keep_better(trial: Floats, loss: Floats, is_first: bool, best: Floats, least: Floats) -> None:
    """Let a trial take the place of the best where it lost less; the first trial always does."""
    for f in range(2, 6):
        for lane in range(LANES):
            wins = is_first or loss[lane] < least[lane]
            best[f, lane] = trial[f, lane] if wins else best[f, lane]
    for lane in range(LANES):
        least[lane] = loss[lane] if is_first else min(loss[lane], least[lane])


@fused
def search_block(
    target: Floats,
    order: Any,
    feedback: Floats,
    weights: Floats,
    levels: Floats,
    middles: Floats,
    middle: Any,
    affine: bool,
    limits: Floats,
    beside: Floats,
    scales: Floats,
) -> None:
    """Move the scales of each sub-block of a block (N, B) to the best of those beside them.

    Each candidate rounds the sub-block with compensation inside it: columns in `order`, (G, n), with its own
    factor `feedback` (G, n, n), Ũᵀ, and `weights` (G, n). `beside`, f32 (C, 2), is what candidates add to
    step and drop, the first of them nothing; where d stands alone, a share of it. `scales` and `limits` are
    those of `refit_block`. The first of equals wins.
    """
    n_groups, n = order.shape
    goal, now, trial, best = float_tile(n), float_tile(6), float_tile(6), float_tile(6)
    loss, least = lanes(), lanes()
    for first in range(0, len(target), LANES):
        for j in range(n_groups):
            _load_ordered(target, first, order[j], goal)
            load_scales(scales, first, j, now)
            for c in range(len(beside)):
                _candidate(now, limits, middle, affine, beside[c], trial)
                _loss(goal, feedback[j], weights[j], trial, levels, middles, loss)
                _keep_better(trial, loss, c == 0, best, least)
            store_scales(best, first, j, scales)
