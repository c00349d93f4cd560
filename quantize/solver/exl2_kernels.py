"""The loops over a group of EXL2's columns on the CPU: steps searched, and fitted to codes.

What `quantize/solver/exl2.py` does in many short operations of torch is one call here. On small matrices the
short operations took longer to be started than to be done, and threads spent their time waiting for each
other's turn in the interpreter.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ZERO, Bytes, Floats, half
from quantize.codecs.native.compiled import native
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.kernels import load, lose

STEPS = 16


@native
def offer(m: float, table: Floats) -> None:
    """Set the sixteen steps that a maximum offers: scale² m, as halves hold them."""
    share = half(half(np.float32(m * np.float32(256))) * np.float32(2.0**-8))
    for i in range(STEPS):
        table[i] = half(np.float32((i + 1) * (i + 1)) * share)


@native
def _nearest(table: Floats, wanted: Any) -> int:
    """Return which step is nearest, the smaller of equals."""
    found = 0
    for i in range(STEPS - 1):
        found += 1 if wanted > (table[i] + table[i + 1]) / np.float32(2) else 0
    return found


@native
def widest(target: Floats, feedback: Floats, weights: Floats, shares: Floats, bits: int, out: Floats) -> None:
    """Set each output's best step, f32 (N,), of those that span a share of its range in a group (N, B)."""
    n, base = target.shape[1], np.float32(2.0 ** (bits - 1))
    levels = np.arange(2**bits).astype(np.float32)
    weight, goal, work = float_tile(n), float_tile(n), float_tile(4)
    peak, scales, bases, loss, least = lanes(), lanes(), lanes(), lanes(), lanes()
    for first in range(0, len(target), LANES):
        load(target, first, weight)
        peak[:] = ZERO
        for j in range(n):
            for lane in range(LANES):
                peak[lane] = max(peak[lane], abs(weight[j, lane]))
        for candidate in range(len(shares)):
            for lane in range(LANES):
                wide = shares[candidate] * peak[lane] * np.float32(2) / np.float32(2**bits - 1)
                scales[lane] = half(min(max(wide, np.float32(2.0**-24)), np.float32(65504)))
                bases[lane] = -scales[lane] * base
            lose(weight, feedback, weights, scales, bases, levels, goal, work, loss)
            for lane in range(min(LANES, len(target) - first)):
                if candidate == 0 or loss[lane] < least[lane]:
                    least[lane], out[first + lane] = loss[lane], scales[lane]


@native
def best_scales(
    target: Floats,
    feedback: Floats,
    weights: Floats,
    ideal: Floats,
    maxima: Floats,
    bits: int,
    out_scales: Bytes,
    out_losses: Floats,
) -> None:
    """Set for each of M maxima each output's best scale of the three around its ideal step, and the loss.

    target is a group (N, B), ideal (N,); the results are (M, N), scales 1..16. Of equals the nearest wins,
    then the smaller.
    """
    n, base = target.shape[1], np.float32(2.0 ** (bits - 1))
    levels = np.arange(2**bits).astype(np.float32)
    weight, goal, work = float_tile(n), float_tile(n), float_tile(4)
    scales, bases, loss = lanes(), lanes(), lanes()
    table, nearest = np.empty(STEPS, np.float32), np.zeros(LANES, np.int64)
    for first in range(0, len(target), LANES):
        load(target, first, weight)
        present = min(LANES, len(target) - first)
        for number in range(len(maxima)):
            offer(maxima[number], table)
            for lane in range(present):
                nearest[lane] = _nearest(table, ideal[first + lane])
            for shift in (0, -1, 1):
                for lane in range(LANES):
                    scales[lane] = table[min(max(nearest[lane] + shift, 0), STEPS - 1)]
                    bases[lane] = -scales[lane] * base
                lose(weight, feedback, weights, scales, bases, levels, goal, work, loss)
                for lane in range(present):
                    if shift == 0 or loss[lane] < out_losses[number, first + lane]:
                        out_losses[number, first + lane] = loss[lane]
                        scale = min(max(nearest[lane] + shift, 0), STEPS - 1) + 1
                        out_scales[number, first + lane] = scale


@native
def fit(
    slope: Floats,
    shape: Floats,
    product: Floats,
    maxima: Floats,
    scales: Any,
    out_sizes: Floats,
    out_moved: Floats,
) -> int:
    """Choose the one of M maxima, and scales (N,), which fit a group's codes best; return its number.

    slope is (W - Ŵ) H at the group's columns, (N, B), shape their levels, product shape H. The present
    maximum comes first, another must be better. Sets the scales, each output's step and what was added to
    it, and in the slope what is left of it. An output without curvature keeps its scale.
    """
    n_rows, n = slope.shape
    best, curvature = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
    tables = np.empty((len(maxima), STEPS), np.float32)
    for number in range(len(maxima)):
        offer(maxima[number], tables[number])
    for row in range(n_rows):
        along = curved = ZERO
        for j in range(n):
            along += slope[row, j] * shape[row, j]
            curved += product[row, j] * shape[row, j]
        before = tables[0, scales[row] - 1]
        best[row] = before + along / curved if curved > ZERO else before
        curvature[row] = max(curved, ZERO)
    chosen, lowest = 0, np.inf
    for number in range(len(maxima)):
        total = 0.0
        for row in range(n_rows):
            miss = tables[number, _nearest(tables[number], best[row])] - best[row]
            total += curvature[row] * miss * miss
        if total < lowest:
            chosen, lowest = number, total
    for row in range(n_rows):
        before = tables[0, scales[row] - 1]
        if curvature[row] > ZERO:
            scales[row] = _nearest(tables[chosen], best[row]) + 1
        out_sizes[row] = tables[chosen, scales[row] - 1]
        moved = out_sizes[row] - before
        out_moved[row] = moved
        for j in range(n):
            slope[row, j] -= moved * product[row, j]
    return chosen
