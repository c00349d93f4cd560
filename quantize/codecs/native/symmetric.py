"""Scale of a sub-block around zero: x ≈ scale * code, codes -top..top-1, stored as 0..2*top-1.

The largest magnitude goes to -top, so the scale takes the other sign. `symmetric` tries 19 inverse scales
and keeps the best weighted least-squares fit (ggml `make_qx_quants`); `descend` starts from one and moves
single codes (ggml `make_q3_quants`). A fit is better by (Σwlx)² / Σwl², compared crosswise without division.
"""

import numpy as np

from quantize.codecs.native.arithmetic import TENTH, TINY, ZERO, Bytes, Floats, clamp, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.tiles import LANES, float_tile, lanes


@native
def extremes(x: Floats, extreme: Floats) -> None:
    """Set each lane's weight of largest magnitude, the first of equals, with its sign."""
    for lane in range(LANES):
        extreme[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            larger = abs(x[i, lane]) > abs(extreme[lane])
            extreme[lane] = x[i, lane] if larger else extreme[lane]


@native
def _products(x: Floats, weights: Floats, inverse: Floats, top: int, sum_lx: Floats, sum_ll: Floats) -> None:
    """Set Σwlx and Σwl² of the codes l of one inverse scale a lane."""
    for lane in range(LANES):
        sum_lx[lane] = sum_ll[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            code = clamp(nearest(inverse[lane] * x[i, lane]), -top, top - 1)
            sum_lx[lane] += weights[i, lane] * x[i, lane] * code
            sum_ll[lane] += weights[i, lane] * code * code


@native
def symmetric(x: Floats, weights: Floats, top: int, codes: Bytes, scale: Floats) -> None:
    """Search each lane of a tile (n, 64) for its codes and scale; a lane of zeros gets zeros."""
    extreme, inverse, rung, best = lanes(), lanes(), lanes(), lanes()
    sum_lx, sum_ll = lanes(), lanes()
    extremes(x, extreme)
    for lane in range(LANES):
        inverse[lane] = -np.float32(top) / extreme[lane]
    _products(x, weights, inverse, top, sum_lx, sum_ll)
    for lane in range(LANES):
        scale[lane] = sum_lx[lane] / sum_ll[lane] if sum_ll[lane] != ZERO else ZERO
        best[lane] = scale[lane] * sum_lx[lane]
    for k in range(-9, 10):
        stretched = -(np.float32(top) + TENTH * np.float32(k))
        for lane in range(LANES):
            rung[lane] = stretched / extreme[lane]
        _products(x, weights, rung, top, sum_lx, sum_ll)
        for lane in range(LANES):
            better = sum_lx[lane] * sum_lx[lane] > best[lane] * sum_ll[lane]
            wins = (sum_ll[lane] > ZERO) & better & (k != 0)
            scale[lane] = sum_lx[lane] / sum_ll[lane] if wins else scale[lane]
            best[lane] = scale[lane] * sum_lx[lane] if wins else best[lane]
            inverse[lane] = rung[lane] if wins else inverse[lane]
    _store_codes(x, extreme, inverse, top, codes, scale)


@native
def _store_codes(x: Floats, extreme: Floats, inverse: Floats, top: int, codes: Bytes, scale: Floats) -> None:
    """Write the codes of one inverse scale a lane, or zeros where a lane is zero."""
    for lane in range(LANES):
        scale[lane] = ZERO if abs(extreme[lane]) < TINY else scale[lane]
    for i in range(len(x)):
        for lane in range(LANES):
            code = clamp(nearest(inverse[lane] * x[i, lane]), -top, top - 1) + np.float32(top)
            codes[i, lane] = np.uint8(0) if abs(extreme[lane]) < TINY else np.uint8(code)


@native
def descend(x: Floats, weights: Floats, top: int, codes: Bytes, scale: Floats) -> None:
    """Search each lane from the plain rounding on, in up to five passes that move one code after another."""
    extreme, sum_lx, sum_ll, trial = lanes(), lanes(), lanes(), float_tile(len(x))
    extremes(x, extreme)
    for lane in range(LANES):
        sum_lx[lane] = sum_ll[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            code = clamp(nearest(-np.float32(top) / extreme[lane] * x[i, lane]), -top, top - 1)
            trial[i, lane] = code
            sum_lx[lane] += weights[i, lane] * x[i, lane] * code
            sum_ll[lane] += weights[i, lane] * code * code
    for _ in range(5):
        if _pass(x, weights, top, trial, sum_lx, sum_ll) == 0:
            break
    for lane in range(LANES):
        empty = abs(extreme[lane]) < TINY
        scale[lane] = sum_lx[lane] / sum_ll[lane] if (sum_ll[lane] > ZERO) & (not empty) else ZERO
        for i in range(len(x)):
            codes[i, lane] = np.uint8(0) if empty else np.uint8(trial[i, lane] + np.float32(top))


@native
def _pass(x: Floats, weights: Floats, top: int, trial: Floats, sum_lx: Floats, sum_ll: Floats) -> int:
    """Move every code to where it fits best with the others held, if that is better; return the moves."""
    moves = 0
    for i in range(len(x)):
        for lane in range(LANES):
            value, weight, old = x[i, lane], weights[i, lane], trial[i, lane]
            rest_lx = sum_lx[lane] - weight * value * old
            rest_ll = sum_ll[lane] - weight * old * old
            new = clamp(nearest(value * rest_ll / rest_lx), -top, top - 1)
            new_lx = rest_lx + weight * value * new
            new_ll = rest_ll + weight * new * new
            better = new_lx * new_lx * sum_ll[lane] > sum_lx[lane] * sum_lx[lane] * new_ll
            moved = (rest_lx > ZERO) & (new != old) & (new_ll > ZERO) & better
            trial[i, lane] = new if moved else old
            sum_lx[lane] = new_lx if moved else sum_lx[lane]
            sum_ll[lane] = new_ll if moved else sum_ll[lane]
            moves += 1 if moved else 0
    return moves
