"""The loops over columns on the CPU: 64 rows side by side, their columns one after another.

What a column hands on depends on the code that it got, so columns cannot be done at once; rows can. A tile
holds the block's column i of 64 rows beside each other, and every row gets the same sums whatever rows are
beside it. Blocks are short, so that a tile stays in the first-level cache; what a block hands on to later
blocks is one ordinary matrix product, made by the caller.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.tiles import LANES, float_tile, lanes


@native
def load(matrix: Floats, first: int, tile: Floats) -> None:
    """Copy rows (N, B) from `first` on into the lanes of a tile (B, 64); no row is a row of zeros."""
    present = min(LANES, len(matrix) - first)
    tile[:, present:] = ZERO
    for lane in range(present):
        row = matrix[first + lane]
        for i in range(len(tile)):
            tile[i, lane] = row[i]


@native
def _store(tile: Floats, first: int, matrix: Any) -> None:
    for lane in range(min(LANES, len(matrix) - first)):
        for i in range(len(tile)):
            matrix[first + lane, i] = tile[i, lane]


@native
def _load_group(values: Floats, first: int, group: int, out: Floats) -> None:
    """Copy one group's scales or bases, of (N, G), into lanes."""
    for lane in range(LANES):
        out[lane] = values[first + lane, group] if first + lane < len(values) else ZERO


@native
def _invert(scale: Floats, inverse: Floats) -> None:
    for lane in range(LANES):
        inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO


@native
def _round(
    target: Floats, inverse: Floats, base: Floats, levels: Floats, middles: Floats, codes: Floats
) -> None:
    """Set the codes nearest to a lane's target; without `middles`, levels are 0, 1, 2, ..."""
    if len(middles) == 0:
        top = np.float32(len(levels) - 1)
        for lane in range(LANES):
            units = (target[lane] - base[lane]) * inverse[lane]
            codes[lane] = np.float32(nearest(min(max(units, ZERO), top)))
        return
    for lane in range(LANES):
        codes[lane] = ZERO
    for i in range(len(middles)):
        for lane in range(LANES):
            units = (target[lane] - base[lane]) * inverse[lane]
            codes[lane] += ONE if units > middles[i] else ZERO


@native
def _values(
    codes: Floats, scale: Floats, base: Floats, levels: Floats, uniform: bool, values: Floats
) -> None:
    if uniform:
        for lane in range(LANES):
            values[lane] = scale[lane] * codes[lane] + base[lane]
        return
    for lane in range(LANES):
        values[lane] = scale[lane] * levels[np.int32(codes[lane])] + base[lane]


@native
def _hand_on(tile: Floats, j: int, step: Floats, row: Floats) -> None:
    """Add step * row[k] to all columns k after j."""
    for k in range(j + 1, len(tile)):
        factor = row[k]
        for lane in range(LANES):
            tile[k, lane] += step[lane] * factor


@native
def compensate_block(
    W: Floats,
    target: Floats,
    feedback: Floats,
    scale: Floats,
    base: Floats,
    group: Any,
    levels: Floats,
    middles: Floats,
    out_codes: Bytes,
    out_errors: Floats,
) -> None:
    """Round the columns of a block (N, B), each to what is nearest to its target, which takes feedback.

    Sets the codes and the errors W - Ŵ. scale and base are (N, G), group (B,), feedback (B, B).
    """
    n = W.shape[1]
    weight, goal, codes, errors = float_tile(n), float_tile(n), float_tile(n), float_tile(n)
    scales, bases, inverse, values = lanes(), lanes(), lanes(), lanes()
    uniform = len(middles) == 0
    for first in range(0, len(W), LANES):
        load(W, first, weight)
        load(target, first, goal)
        for j in range(n):
            if j == 0 or group[j] != group[j - 1]:
                _load_group(scale, first, group[j], scales)
                _load_group(base, first, group[j], bases)
                _invert(scales, inverse)
            _round(goal[j], inverse, bases, levels, middles, codes[j])
            _values(codes[j], scales, bases, levels, uniform, values)
            for lane in range(LANES):
                errors[j, lane] = weight[j, lane] - values[lane]
            _hand_on(goal, j, errors[j], feedback[j])
        _store(codes, first, out_codes)
        _store(errors, first, out_errors)


@native
def descend_block(
    gradient: Floats,
    hessian: Floats,
    scale: Floats,
    base: Floats,
    group: Any,
    levels: Floats,
    middles: Floats,
    codes: Bytes,
    out_moves: Floats,
) -> None:
    """Move each code of a block (N, B) to its best, the others held; gradient is (W - Ŵ) H.

    Changes the codes, and sets what was added to Ŵ. hessian is (B, B); the gradient is left as it was.
    """
    n = gradient.shape[1]
    slope, old, moves = float_tile(n), float_tile(n), float_tile(n)
    scales, bases, inverse = lanes(), lanes(), lanes()
    goal, new, before, after, back = lanes(), lanes(), lanes(), lanes(), lanes()
    uniform = len(middles) == 0
    for first in range(0, len(gradient), LANES):
        load(gradient, first, slope)
        _load_codes(codes, first, old)
        for j in range(n):
            if j == 0 or group[j] != group[j - 1]:
                _load_group(scale, first, group[j], scales)
                _load_group(base, first, group[j], bases)
                _invert(scales, inverse)
            _values(old[j], scales, bases, levels, uniform, before)
            step = ONE / hessian[j, j]
            for lane in range(LANES):
                goal[lane] = before[lane] + slope[j, lane] * step
            _round(goal, inverse, bases, levels, middles, new)
            _values(new, scales, bases, levels, uniform, after)
            for lane in range(LANES):
                nearer = abs(goal[lane] - after[lane]) < abs(goal[lane] - before[lane])
                moves[j, lane] = after[lane] - before[lane] if nearer else ZERO
                back[lane] = -moves[j, lane]
                old[j, lane] = new[lane] if nearer else old[j, lane]
            _hand_on(slope, j, back, hessian[j])
        _store(old, first, codes)
        _store(moves, first, out_moves)


@native
def _load_codes(codes: Bytes, first: int, tile: Floats) -> None:
    tile[:, :] = ZERO
    for lane in range(min(LANES, len(codes) - first)):
        for i in range(len(tile)):
            tile[i, lane] = np.float32(codes[first + lane, i])


@native
def lose(
    weight: Floats,
    feedback: Floats,
    weights: Floats,
    scales: Floats,
    bases: Floats,
    levels: Floats,
    goal: Floats,
    work: Floats,
    loss: Floats,
) -> None:
    """Set what each lane loses, Σ weights_k * (target_k - value_k)², when a group's tile (B, 64) is rounded.

    `levels` are 0, 1, 2, ...; `goal`, (B, 64), and `work`, (4, 64), are there to be written in.
    """
    inverse, codes, values, error = work[0], work[1], work[2], work[3]
    middles = np.empty(0, np.float32)
    loss[:] = ZERO
    _invert(scales, inverse)
    goal[:, :] = weight
    for j in range(len(weight)):
        _round(goal[j], inverse, bases, levels, middles, codes)
        _values(codes, scales, bases, levels, True, values)
        for lane in range(LANES):
            miss = goal[j, lane] - values[lane]
            loss[lane] += weights[j] * miss * miss
            error[lane] = weight[j, lane] - values[lane]
        _hand_on(goal, j, error, feedback[j])


@native
def choose_block(
    W: Floats,
    feedback: Floats,
    weights: Floats,
    scale: Floats,
    base: Floats,
    levels: Floats,
    out_best: Any,
    out_loss: Floats,
) -> None:
    """Set, for each row of a group (N, B), which of C candidates has the least loss under compensation.

    scale and base are (C, N); the loss is Σ weights_k * (target_k - value_k)². Levels are 0, 1, 2, ...
    The first of equals wins.
    """
    n = W.shape[1]
    weight, goal, work = float_tile(n), float_tile(n), float_tile(4)
    scales, bases, loss = lanes(), lanes(), lanes()
    for first in range(0, len(W), LANES):
        load(W, first, weight)
        present = min(LANES, len(W) - first)
        for candidate in range(len(scale)):
            for lane in range(LANES):
                scales[lane] = scale[candidate, first + lane] if lane < present else ZERO
                bases[lane] = base[candidate, first + lane] if lane < present else ZERO
            lose(weight, feedback, weights, scales, bases, levels, goal, work, loss)
            for lane in range(present):
                if candidate == 0 or loss[lane] < out_loss[first + lane]:
                    out_best[first + lane] = candidate
                    out_loss[first + lane] = loss[lane]
