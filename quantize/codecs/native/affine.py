"""Scale and minimum of a sub-block: x ≈ scale * code + minimum, codes 0..top, minimum never above zero.

Tries a ladder of inverse scales. Each gives codes, and the codes give the weighted least-squares fit of
scale and minimum; the fit with the smallest weighted error wins (ggml `make_qkx2_quants` and
`make_qkx3_quants`, which differ in nothing that finite weights can show). One trait must be kept for equal
bits: a fit that wins replaces the minimum from which all later rungs of the ladder measure.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats, clamp, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.tiles import LANES, float_tile, lanes


@native
def _ranges(x: Floats, weights: Floats, low: Floats, high: Floats, sums: Floats) -> None:
    """Set smallest (not above zero) and largest weight of each lane, Σw and Σwx."""
    for lane in range(LANES):
        low[lane] = high[lane] = x[0, lane]
        sums[0, lane] = weights[0, lane]
        sums[1, lane] = weights[0, lane] * x[0, lane]
    for i in range(1, len(x)):
        for lane in range(LANES):
            value, weight = x[i, lane], weights[i, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
            sums[0, lane] += weight
            sums[1, lane] += weight * value
    for lane in range(LANES):
        low[lane] = ZERO if low[lane] > ZERO else low[lane]


@native
def _round(
    x: Floats, weights: Floats, low: Floats, inverse: Floats, top: int, codes: Floats, sums: Floats
) -> None:
    """Round all weights by one inverse scale a lane, and set Σwl, Σwl², Σwlx of the codes l."""
    sum_l, sum_ll, sum_lx = sums[2], sums[3], sums[4]
    for lane in range(LANES):
        sum_l[lane] = sum_ll[lane] = sum_lx[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            code = clamp(nearest(inverse[lane] * (x[i, lane] - low[lane])), 0, top)
            weighted = weights[i, lane] * code
            codes[i, lane] = code
            sum_l[lane] += weighted
            sum_ll[lane] += weighted * code
            sum_lx[lane] += weighted * x[i, lane]


@native
def _fit(sums: Floats, scale: Floats, low: Floats, determinant: Floats) -> None:
    """Solve for the best scale and minimum of the codes; a minimum above zero is held at zero."""
    for lane in range(LANES):
        sum_w, sum_x = sums[0, lane], sums[1, lane]
        sum_l, sum_ll, sum_lx = sums[2, lane], sums[3, lane], sums[4, lane]
        det = sum_w * sum_ll - sum_l * sum_l
        free_low = (sum_ll * sum_x - sum_l * sum_lx) / det
        free_scale = (sum_w * sum_lx - sum_x * sum_l) / det
        above = free_low > ZERO
        determinant[lane] = det
        scale[lane] = sum_lx / sum_ll if above else free_scale
        low[lane] = ZERO if above else free_low


@native
def _error(
    x: Floats, weights: Floats, codes: Floats, scale: Floats, low: Floats, absolute: bool, error: Floats
) -> None:
    """Set the weighted sum of the squared, or of the absolute, differences."""
    for lane in range(LANES):
        error[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            miss = scale[lane] * codes[i, lane] + low[lane] - x[i, lane]
            error[lane] += weights[i, lane] * (abs(miss) if absolute else miss * miss)


@native
def _recode(x: Floats, low: Floats, inverse: Floats, best: Floats, top: int, codes: Bytes) -> None:
    """Write the codes of the rung that won; a lane without a range (best = -inf) gets zeros."""
    for i in range(len(x)):
        for lane in range(LANES):
            code = clamp(nearest(inverse[lane] * (x[i, lane] - low[lane])), 0, top)
            codes[i, lane] = np.uint8(code) if best[lane] >= ZERO else np.uint8(0)


@native
def affine(
    x: Floats,
    weights: Floats,
    top: int,
    ladder: Any,
    absolute: bool,
    codes: Bytes,
    scale: Floats,
    drop: Floats,
) -> None:
    """Search each lane of a tile (n, 64) for codes 0..top, scale and drop, the minimum's negative.

    The ladder is (first, step, count): its rungs are the inverse scales (first + step * k + top) / range
    for k = 0..count. `absolute` measures by absolute instead of squared differences.
    """
    first, step, count = ladder
    low, high, best, inverse, rung_low = lanes(), lanes(), lanes(), lanes(), lanes()
    fit_scale, fit_low, determinant, error = lanes(), lanes(), lanes(), lanes()
    rung = lanes()
    sums, trial = float_tile(5), float_tile(len(x))
    _ranges(x, weights, low, high, sums)
    for lane in range(LANES):
        inverse[lane] = np.float32(top) / (high[lane] - low[lane])
        scale[lane] = ONE / inverse[lane]
        rung_low[lane] = low[lane]
    _round(x, weights, low, inverse, top, trial, sums)
    _error(x, weights, trial, scale, low, absolute, best)
    for lane in range(LANES):
        flat = high[lane] <= low[lane]
        best[lane] = -np.float32(np.inf) if flat else best[lane]
        scale[lane] = ZERO if flat else scale[lane]
    for k in range(count + 1):
        stretched = first + step * np.float32(k) + np.float32(top)
        for lane in range(LANES):
            rung[lane] = stretched / (high[lane] - low[lane])
        _round(x, weights, low, rung, top, trial, sums)
        _fit(sums, fit_scale, fit_low, determinant)
        _error(x, weights, trial, fit_scale, fit_low, absolute, error)
        for lane in range(LANES):
            wins = (determinant[lane] > ZERO) & (error[lane] < best[lane])
            best[lane] = error[lane] if wins else best[lane]
            scale[lane] = fit_scale[lane] if wins else scale[lane]
            inverse[lane] = rung[lane] if wins else inverse[lane]
            rung_low[lane] = low[lane] if wins else rung_low[lane]
            low[lane] = fit_low[lane] if wins else low[lane]
    _recode(x, rung_low, inverse, best, top, codes)
    for lane in range(LANES):
        drop[lane] = -low[lane]


@native
def _misses(x: Floats, weights: Floats, inverse: Floats, limit: int, wrap: bool, error: Floats) -> None:
    """Set Σ w (x - l / inverse)² for the codes l of one inverse scale a lane, cut to a byte if `wrap`."""
    for lane in range(LANES):
        error[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            code = min(nearest(inverse[lane] * x[i, lane]), np.int32(limit))
            code = np.float32(np.uint8(code) if wrap else code)
            miss = x[i, lane] - ONE / inverse[lane] * code
            error[lane] += weights[i, lane] * miss * miss


@native
def _positive_start(
    x: Floats, weights: Floats, top: int, trial: Floats, sum_lx: Floats, sum_ll: Floats, largest: Floats
) -> None:
    """Round by the best of nine inverse scales, and set Σwlx and Σwl²."""
    inverse, rung, best, error = lanes(), lanes(), lanes(), lanes()
    for lane in range(LANES):
        largest[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            largest[lane] = x[i, lane] if x[i, lane] > largest[lane] else largest[lane]
    for lane in range(LANES):
        inverse[lane] = np.float32(top) / largest[lane]
        sum_lx[lane] = sum_ll[lane] = ZERO
    _misses(x, weights, inverse, 1 << 22, True, best)
    for k in range(-4, 5):
        for lane in range(LANES):
            rung[lane] = (np.float32(0.1) * np.float32(k) + np.float32(top)) / largest[lane]
        _misses(x, weights, rung, top, False, error)
        for lane in range(LANES):
            wins = (error[lane] < best[lane]) & (k != 0)
            best[lane] = error[lane] if wins else best[lane]
            inverse[lane] = rung[lane] if wins else inverse[lane]
    for i in range(len(x)):
        for lane in range(LANES):
            rounded = min(nearest(inverse[lane] * x[i, lane]), np.int32(top))
            code = np.float32(rounded)
            trial[i, lane] = np.float32(np.uint8(rounded))
            sum_lx[lane] += weights[i, lane] * x[i, lane] * code
            sum_ll[lane] += weights[i, lane] * code * code


@native
def positive(x: Floats, weights: Floats, top: int, codes: Bytes, scale: Floats) -> None:
    """Search each lane for codes 0..top and a scale of numbers that are not negative: the sub-blocks' scales.

    The best of nine inverse scales, then up to five passes in which each code may move to where it is best
    with all others held (ggml `make_qp_quants`). A code is kept as a byte: where a type hands in a number
    below zero all the same, ggml's codes wrap, and so do these.
    """
    trial, sum_lx, sum_ll, largest = float_tile(len(x)), lanes(), lanes(), lanes()
    _positive_start(x, weights, top, trial, sum_lx, sum_ll, largest)
    for _ in range(5):
        moves = 0
        for i in range(len(x)):
            for lane in range(LANES):
                value, weight, old = x[i, lane], weights[i, lane], trial[i, lane]
                rest_lx = sum_lx[lane] - weight * value * old
                rest_ll = sum_ll[lane] - weight * old * old
                rounded = min(nearest(value * rest_ll / rest_lx), np.int32(top))
                new = np.float32(rounded)
                new_lx = rest_lx + weight * value * new
                new_ll = rest_ll + weight * new * new
                better = new_lx * new_lx * sum_ll[lane] > sum_lx[lane] * sum_lx[lane] * new_ll
                moved = (rest_lx > ZERO) & (rest_ll > ZERO) & (new != old) & better
                trial[i, lane] = np.float32(np.uint8(rounded)) if moved else old
                sum_lx[lane] = new_lx if moved else sum_lx[lane]
                sum_ll[lane] = new_ll if moved else sum_ll[lane]
                moves += 1 if moved else 0
        if moves == 0:
            break
    for lane in range(LANES):
        empty = largest[lane] < np.float32(1e-15)
        scale[lane] = sum_lx[lane] / sum_ll[lane] if (sum_ll[lane] > ZERO) & (not empty) else ZERO
        for i in range(len(x)):
            codes[i, lane] = np.uint8(0) if empty else np.uint8(np.int32(trial[i, lane]))
