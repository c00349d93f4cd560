"""Q2_K to Q6_K: from rows to the fields of their blocks, 64 super-blocks of 256 weights at a time.

Three steps: each sub-block finds its scale (and minimum), the sub-blocks' scales are rounded to integer
multiples of one half-precision number, and the weights are rounded again by what the rounding has left of
the scales. A sub-block whose scale has become zero keeps the codes of the search: they decode to the same
number whatever they are, but ggml leaves them, and so the bytes are equal.

`importance` is one number for each column, or an array of no elements where there is none; ggml has another
search for each case. `blocks` are the rows cut into blocks: float32 (B, 256).
"""

from typing import Any

import numpy as np

from quantize.codecs.native.affine import affine, positive
from quantize.codecs.native.arithmetic import ZERO, Bytes, Floats, clamp, half, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.symmetric import descend, symmetric
from quantize.codecs.native.tiles import (
    LANES,
    byte_tile,
    float_tile,
    lanes,
    load,
    load_importance,
    store,
    store_lanes,
    sum_lanes,
    sum_squares,
    weigh_by_importance,
    weigh_by_size,
    weigh_by_square,
)

_SUPER = np.float32(256)
_WIDE_LADDER = (np.float32(-0.9), np.float32(0.05), 36)


@native
def weigh(x: Floats, importance: Floats, first: int, factor: Any, weights: Floats) -> None:
    """Set importance * sqrt(variance + x²); the variance is factor * Σx² / 256 of the super-block."""
    variance = lanes()
    load_importance(importance, first, weights)
    sum_squares(x, variance)
    for lane in range(LANES):
        variance[lane] = factor * variance[lane] / _SUPER
    weigh_by_importance(x, variance, weights)


@native
def _weigh_affine(x: Floats, weights: Floats) -> None:
    """Set |x| for 16 weights that share a scale, and |x| + root mean square for 32 of them."""
    offset = lanes()
    sum_squares(x, offset)
    for lane in range(LANES):
        offset[lane] = ZERO if len(x) == 16 else np.sqrt(offset[lane] / np.float32(32))
    weigh_by_size(x, offset, weights)


@native
def _by_largest(x: Floats, top: int, codes: Bytes, scale: Floats) -> None:
    """Round numbers that are not negative to multiples of the largest / top."""
    largest = lanes()
    for lane in range(LANES):
        largest[lane] = ZERO
    for i in range(len(x)):
        for lane in range(LANES):
            largest[lane] = x[i, lane] if x[i, lane] > largest[lane] else largest[lane]
    for lane in range(LANES):
        inverse = np.float32(top) / largest[lane] if largest[lane] > ZERO else ZERO
        scale[lane] = largest[lane] / np.float32(top)
        for i in range(len(x)):
            codes[i, lane] = min(nearest(inverse * x[i, lane]) & 0xFF, top)


@native
def _round_affine(
    x: Floats, d: Floats, dmin: Floats, scale: Bytes, drop: Bytes, top: int, codes: Bytes
) -> None:
    """Round one sub-block's weights by its rounded scale and minimum, except where the scale is zero."""
    step, offset = lanes(), lanes()
    for lane in range(LANES):
        step[lane] = d[lane] * np.float32(scale[lane])
        offset[lane] = dmin[lane] * np.float32(drop[lane])
    for i in range(len(x)):
        for lane in range(LANES):
            code = np.uint8(clamp(nearest((x[i, lane] + offset[lane]) / step[lane]), 0, top))
            codes[i, lane] = code if step[lane] != ZERO else codes[i, lane]


@native
def affine_blocks(
    blocks: Floats,
    importance: Floats,
    shape: Any,
    ladder: Any,
    out_d: Floats,
    out_dmin: Floats,
    out_scales: Bytes,
    out_mins: Bytes,
    out_codes: Bytes,
) -> None:
    """Search the blocks of Q2_K, Q4_K or Q5_K.

    `shape` is (sub-blocks, largest code, largest scale code); `ladder` the rungs without importances.
    """
    subs, top, scale_top = shape
    n = 256 // subs
    plain = len(importance) == 0
    x, weights, codes = float_tile(256), float_tile(256), byte_tile(256)
    x_subs, weight_subs = x.reshape(subs, n, LANES), weights.reshape(subs, n, LANES)
    code_subs = codes.reshape(subs, n, LANES)
    scales, drops, sums = float_tile(subs), float_tile(subs), float_tile(subs)
    scale_codes, drop_codes, d, dmin = byte_tile(subs), byte_tile(subs), lanes(), lanes()
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        if not plain:
            weigh(x, importance, first, np.float32(1 if n == 16 else 2), weights)
        for j in range(subs):
            if plain:
                _weigh_affine(x_subs[j], weight_subs[j])
                affine(x_subs[j], weight_subs[j], top, ladder, n == 16, code_subs[j], scales[j], drops[j])
            else:
                sum_lanes(weight_subs[j], sums[j])
                affine(x_subs[j], weight_subs[j], top, _WIDE_LADDER, False, code_subs[j], scales[j], drops[j])
        if plain:
            _by_largest(scales, scale_top, scale_codes, d)
            _by_largest(drops, scale_top, drop_codes, dmin)
        else:
            positive(scales, sums, scale_top, scale_codes, d)
            positive(drops, sums, scale_top, drop_codes, dmin)
        _halve(d)
        _halve(dmin)
        for j in range(subs):
            _round_affine(x_subs[j], d, dmin, scale_codes[j], drop_codes[j], top, code_subs[j])
        store_lanes(d, first, out_d)
        store_lanes(dmin, first, out_dmin)
        store(scale_codes, first, out_scales)
        store(drop_codes, first, out_mins)
        store(codes, first, out_codes)


@native
def _halve(values: Floats) -> None:
    """Round one number a lane to half precision."""
    for lane in range(LANES):
        values[lane] = half(values[lane])


@native
def _round_symmetric(x: Floats, d: Floats, scale: Any, top: int, codes: Bytes) -> None:
    """Round one sub-block's weights by its rounded scale, except where that is zero."""
    step = lanes()
    for lane in range(LANES):
        step[lane] = d[lane] * np.float32(scale[lane])
    for i in range(len(x)):
        for lane in range(LANES):
            code = np.uint8(clamp(nearest(x[i, lane] / step[lane]), -top, top - 1) + np.float32(top))
            codes[i, lane] = code if step[lane] != ZERO else codes[i, lane]


@native
def _by_extreme(scales: Floats, top: int, codes: Any, d: Floats) -> None:
    """Round the sub-blocks' scales so that the one of largest magnitude becomes -top; set the step d."""
    extreme = lanes()
    for lane in range(LANES):
        extreme[lane] = ZERO
    for j in range(len(scales)):
        for lane in range(LANES):
            larger = abs(scales[j, lane]) > abs(extreme[lane])
            extreme[lane] = scales[j, lane] if larger else extreme[lane]
    for lane in range(LANES):
        inverse = -np.float32(top) / extreme[lane]
        d[lane] = np.float32(1) / inverse if extreme[lane] != ZERO else ZERO
        for j in range(len(scales)):
            code = min(nearest(inverse * scales[j, lane]), 127)
            # Cut to a byte before it is limited, as C does: out of range only where a scale is denormal.
            code = np.int8(code)
            codes[j, lane] = np.int8(clamp(code, -top, top - 1)) if extreme[lane] != ZERO else np.int8(-top)


@native
def q3_k_blocks(blocks: Floats, importance: Floats, out_d: Floats, out_scales: Any, out_codes: Bytes) -> None:
    """Search the blocks of Q3_K: signed scale codes -32..31, weight codes 0..7."""
    plain = len(importance) == 0
    x, weights, codes = float_tile(256), float_tile(256), byte_tile(256)
    x_subs, weight_subs = x.reshape(16, 16, LANES), weights.reshape(16, 16, LANES)
    code_subs = codes.reshape(16, 16, LANES)
    scales, sums, d = float_tile(16), float_tile(16), lanes()
    scale_bytes, scale_codes = byte_tile(16), np.empty((16, LANES), np.int8)
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        if plain:
            weigh_by_square(x, weights)
        else:
            weigh(x, importance, first, np.float32(2), weights)
        for j in range(16):
            if plain:
                descend(x_subs[j], weight_subs[j], 4, code_subs[j], scales[j])
            else:
                sum_lanes(weight_subs[j], sums[j])
                symmetric(x_subs[j], weight_subs[j], 4, code_subs[j], scales[j])
        if plain:
            _by_extreme(scales, 32, scale_codes, d)
        else:
            symmetric(scales, sums, 32, scale_bytes, d)
            for j in range(16):
                for lane in range(LANES):
                    scale_codes[j, lane] = np.int8(np.int32(scale_bytes[j, lane]) - 32)
        _halve(d)
        for j in range(16):
            _round_symmetric(x_subs[j], d, scale_codes[j], 4, code_subs[j])
        store_lanes(d, first, out_d)
        store(scale_codes, first, out_scales)
        store(codes, first, out_codes)


@native
def q6_k_blocks(blocks: Floats, importance: Floats, out_d: Floats, out_scales: Any, out_codes: Bytes) -> None:
    """Search the blocks of Q6_K: signed scale codes -128..127, codes 0..63; a zero block is all zero."""
    plain = len(importance) == 0
    x, weights, codes = float_tile(256), float_tile(256), byte_tile(256)
    x_subs, weight_subs = x.reshape(16, 16, LANES), weights.reshape(16, 16, LANES)
    code_subs = codes.reshape(16, 16, LANES)
    scales, d, scale_codes = float_tile(16), lanes(), np.empty((16, LANES), np.int8)
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        if plain:
            weigh_by_square(x, weights)
        else:
            load_importance(importance, first, weights)
        for j in range(16):
            symmetric(x_subs[j], weight_subs[j], 32, code_subs[j], scales[j])
        _by_extreme(scales, 128, scale_codes, d)
        _clear_zero_blocks(scales, scale_codes, codes, d)
        _halve(d)
        for j in range(16):
            _round_symmetric(x_subs[j], d, scale_codes[j], 32, code_subs[j])
        store_lanes(d, first, out_d)
        store(scale_codes, first, out_scales)
        store(codes, first, out_codes)


@native
def _clear_zero_blocks(scales: Floats, scale_codes: Any, codes: Bytes, d: Floats) -> None:
    """Zero every field of a block whose scales are all below 1e-15."""
    for lane in range(LANES):
        largest = ZERO
        for j in range(len(scales)):
            largest = max(largest, abs(scales[j, lane]))
        if largest < np.float32(1e-15):
            d[lane] = ZERO
            scale_codes[:, lane] = 0
            codes[:, lane] = 0
