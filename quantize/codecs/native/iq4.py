"""IQ4_NL and IQ4_XS: codes into a fixed ladder of 16 values that lie closer together near zero.

Each sub-block of 32 tries 16 inverse scales and keeps the best weighted fit; the codes are then found once
more with the scale that is kept. Scales stay unrounded in that last step. The nearest of the 16 values is
the number of midpoints that are not above, ties going up (ggml `best_index_int8`).
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, TINY, ZERO, Bytes, Floats, clamp, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.symmetric import extremes
from quantize.codecs.native.tiles import (
    LANES,
    byte_tile,
    float_tile,
    lanes,
    load,
    load_importance,
    store,
    store_lanes,
    sum_squares,
    weigh_by_importance,
    weigh_by_square,
)

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2
_GAPS = VALUES[1:] - VALUES[:-1]
_LOWEST = np.float32(-127)
_TRIES = 7


@native
def _products(x: Floats, weights: Floats, inverse: Floats, sum_qx: Floats, sum_qq: Floats) -> None:
    """Set Σwqx and Σwq² of the values q nearest to the scaled weights."""
    for lane in range(LANES):
        sum_qx[lane] = sum_qq[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            scaled = inverse[lane] * x[i, lane]
            value = _LOWEST
            for k in range(15):
                value += _GAPS[k] if scaled >= _MIDPOINTS[k] else ZERO
            weighted = weights[i, lane] * value
            sum_qx[lane] += weighted * x[i, lane]
            sum_qq[lane] += weighted * value


@native
def _recode(x: Floats, inverse: Floats, codes: Bytes) -> None:
    """Write the codes of the values nearest to the scaled weights."""
    for i in range(len(x)):
        for lane in range(LANES):
            scaled = inverse[lane] * x[i, lane]
            code = np.uint8(0)
            for k in range(15):
                code += np.uint8(1) if scaled >= _MIDPOINTS[k] else np.uint8(0)
            codes[i, lane] = code


@native
def _search(x: Floats, weights: Floats, scale: Floats) -> None:
    """Set the best scale of each lane of a tile (32, 64), zero for a lane of zeros."""
    extreme, inverse, best, sum_qx, sum_qq = lanes(), lanes(), lanes(), lanes(), lanes()
    extremes(x, extreme)
    for lane in range(LANES):
        inverse[lane] = ONE / (-extreme[lane] / _LOWEST)
    _products(x, weights, inverse, sum_qx, sum_qq)
    for lane in range(LANES):
        scale[lane] = sum_qx[lane] / sum_qq[lane] if sum_qq[lane] > ZERO else ZERO
        best[lane] = scale[lane] * sum_qx[lane]
    for k in range(-_TRIES, _TRIES + 1):
        for lane in range(LANES):
            inverse[lane] = (np.float32(k) + _LOWEST) / extreme[lane]
        _products(x, weights, inverse, sum_qx, sum_qq)
        for lane in range(LANES):
            wins = (sum_qq[lane] > ZERO) & (sum_qx[lane] * sum_qx[lane] > best[lane] * sum_qq[lane])
            scale[lane] = sum_qx[lane] / sum_qq[lane] if wins else scale[lane]
            best[lane] = scale[lane] * sum_qx[lane] if wins else best[lane]
    for lane in range(LANES):
        scale[lane] = ZERO if abs(extreme[lane]) < TINY else scale[lane]


@native
def _weigh(x: Floats, importance: Floats, first: int, weights: Floats) -> None:
    """Set x², or importance * sqrt(2 * mean square of the block + x²)."""
    if len(importance) == 0:
        weigh_by_square(x, weights)
        return
    variance = lanes()
    load_importance(importance, first, weights)
    sum_squares(x, variance)
    for lane in range(LANES):
        variance[lane] *= np.float32(2) / np.float32(len(x))
    weigh_by_importance(x, variance, weights)


@native
def nl_blocks(blocks: Floats, importance: Floats, out_d: Floats, out_codes: Bytes) -> None:
    """Search the blocks (B, 32) of IQ4_NL."""
    x, weights, codes, d, inverse = float_tile(32), float_tile(32), byte_tile(32), lanes(), lanes()
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        _weigh(x, importance, first, weights)
        _search(x, weights, d)
        for lane in range(LANES):
            inverse[lane] = ONE / d[lane] if d[lane] != ZERO else ZERO
        _recode(x, inverse, codes)
        store_lanes(d, first, out_d)
        store(codes, first, out_codes)


@native
def _round_scales(scales: Floats, codes: Any, d: Floats, inverse: Floats) -> None:
    """Round eight scales a lane to multiples -32..31 of d, and set what each weight is multiplied with."""
    extremes(scales, d)
    for lane in range(LANES):
        d[lane] = -d[lane] / np.float32(32)
        inverse_d = ONE / d[lane] if d[lane] != ZERO else ZERO
        for j in range(len(scales)):
            code = clamp(nearest(inverse_d * scales[j, lane]), -32, 31)
            step = d[lane] * code
            codes[j, lane] = np.int8(code)
            inverse[j, lane] = ONE / step if step != ZERO else ZERO


@native
def xs_blocks(blocks: Floats, importance: Floats, out_d: Floats, out_scales: Any, out_codes: Bytes) -> None:
    """Search the blocks (B, 256) of IQ4_XS: signed scale codes -32..31 for each 32 weights."""
    x, weights, codes, d = float_tile(256), float_tile(256), byte_tile(256), lanes()
    x_subs, weight_subs = x.reshape(8, 32, LANES), weights.reshape(8, 32, LANES)
    code_subs = codes.reshape(8, 32, LANES)
    scales, inverse, scale_codes = float_tile(8), float_tile(8), np.empty((8, LANES), np.int8)
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        _weigh(x, importance, first, weights)
        for j in range(8):
            _search(x_subs[j], weight_subs[j], scales[j])
        _round_scales(scales, scale_codes, d, inverse)
        for j in range(8):
            _recode(x_subs[j], inverse[j], code_subs[j])
        store_lanes(d, first, out_d)
        store(scale_codes, first, out_scales)
        store(codes, first, out_codes)
