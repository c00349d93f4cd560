"""Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 weights.

With importances 64 blocks are searched at a time. The codes are those of the search, which measured with the
unrounded scale; nothing is rounded again. The variance in the weights is that of the whole row.

Without, there is nothing to search: the scale follows from the largest magnitude or from the range. So little
is computed then that laying the blocks side by side would take longer; each is done by itself, and its
extremes are found as integers, for the compiler gives up on the order of floats. A positive float's bits
grow with it; flipping all but the sign bit of the negative ones makes that true of every float.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.affine import affine
from quantize.codecs.native.arithmetic import HALF, ONE, ZERO, Bytes, Floats
from quantize.codecs.native.compiled import native
from quantize.codecs.native.symmetric import symmetric
from quantize.codecs.native.tiles import (
    LANES,
    byte_tile,
    float_tile,
    lanes,
    load,
    load_importance,
    store,
    store_lanes,
    weigh_by_importance,
)

_WIDE_LADDER = (np.float32(-0.9), np.float32(0.05), 36)
_SIZE = np.int32(0x7FFFFFFF)
_SIGN = np.int32(-0x80000000)


@native
def _row_variances(blocks: Floats, n_columns: int) -> Any:
    """Return the mean square of every row of `n_columns`, summed in order."""
    per_row = n_columns // 32
    variances = np.empty(len(blocks) // per_row, np.float32)
    for row in range(len(variances)):
        total = ZERO
        for block in range(row * per_row, (row + 1) * per_row):
            for i in range(32):
                total += blocks[block, i] * blocks[block, i]
        variances[row] = total / np.float32(n_columns)
    return variances


@native
def _weigh(x: Floats, importance: Floats, first: int, variances: Floats, weights: Floats) -> None:
    """Set importance * sqrt(variance of the row + x²)."""
    variance, per_row = lanes(), len(importance) // 32
    for lane in range(LANES):
        row = min((first + lane) // per_row, len(variances) - 1)
        variance[lane] = variances[row]
    load_importance(importance, first, weights)
    weigh_by_importance(x, variance, weights)


@native
def symmetric_blocks(blocks: Floats, importance: Floats, top: int, out_d: Floats, out_codes: Bytes) -> None:
    """Search the blocks (B, 32) of Q4_0 (top 8) or Q5_0 (top 16)."""
    x, weights, codes, d = float_tile(32), float_tile(32), byte_tile(32), lanes()
    variances = _row_variances(blocks, len(importance))
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        _weigh(x, importance, first, variances, weights)
        symmetric(x, weights, top, codes, d)
        store_lanes(d, first, out_d)
        store(codes, first, out_codes)


@native
def affine_blocks(
    blocks: Floats, importance: Floats, top: int, out_d: Floats, out_m: Floats, out_codes: Bytes
) -> None:
    """Search the blocks (B, 32) of Q4_1 (top 15) or Q5_1 (top 31)."""
    x, weights, codes, d, drop = float_tile(32), float_tile(32), byte_tile(32), lanes(), lanes()
    variances = _row_variances(blocks, len(importance))
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        _weigh(x, importance, first, variances, weights)
        affine(x, weights, top, _WIDE_LADDER, False, codes, d, drop)
        for lane in range(LANES):
            drop[lane] = -drop[lane]
        store_lanes(d, first, out_d)
        store_lanes(drop, first, out_m)
        store(codes, first, out_codes)


@native
def _inverse(d: Any) -> Any:
    """Return 1 / d, and d itself where that is zero."""
    return ONE / d if d != ZERO else d


@native
def _write_codes(blocks: Floats, b: int, low: Any, d: Any, offset: Any, top: int, codes: Bytes) -> None:
    """Write trunc((x - low) / d + offset), at most top; zeros where a tiny d has no finite inverse."""
    inverse = _inverse(d)
    for i in range(blocks.shape[1]):
        code = min(np.int32(np.float32((blocks[b, i] - low) * inverse) + offset), np.int32(top))
        codes[b, i] = np.uint8(0) if np.isinf(inverse) else np.uint8(code)


@native
def _extreme(blocks: Floats, bits: Any, b: int) -> Any:
    """Return the weight of largest magnitude with its sign; of x and -x the one that comes first."""
    size = np.int32(0)
    for i in range(blocks.shape[1]):
        size = max(size, np.int32(bits[b, i] & _SIZE))
    positive, negative = np.int32(0), np.int32(0)
    for i in range(blocks.shape[1]):
        positive |= np.int32(bits[b, i] == size)
        negative |= np.int32(bits[b, i] == np.int32(size | _SIGN))
    if positive != negative:
        magnitude = np.int32(size).view(np.float32)
        return magnitude if positive else -magnitude
    for i in range(blocks.shape[1]):
        if np.int32(bits[b, i] & _SIZE) == size:
            return blocks[b, i]
    return ZERO


@native
def plain_symmetric_blocks(blocks: Floats, top: int, out_d: Floats, out_codes: Bytes) -> None:
    """Round the blocks (B, 32) of Q4_0 (top 8) or Q5_0 (top 16) by their weight of largest magnitude."""
    bits, offset = blocks.view(np.int32), np.float32(top) + HALF
    for b in range(len(blocks)):
        # No negative zero: ggml's search starts from a positive one.
        d = (_extreme(blocks, bits, b) + ZERO) / -np.float32(top)
        out_d[b] = d
        _write_codes(blocks, b, ZERO, d, offset, 2 * top - 1, out_codes)


@native
def _ordered(bits: Any) -> Any:
    """Map a float's bits to an integer that grows with the float, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _SIZE))


@native
def plain_affine_blocks(blocks: Floats, top: int, out_d: Floats, out_m: Floats, out_codes: Bytes) -> None:
    """Round the blocks (B, 32) of Q4_1 (top 15) or Q5_1 (top 31) by their smallest weight and their range."""
    bits = blocks.view(np.int32)
    for b in range(len(blocks)):
        smallest, largest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(blocks.shape[1]):
            key = _ordered(bits[b, i])
            smallest, largest = min(smallest, key), max(largest, key)
        low = np.int32(_ordered(smallest)).view(np.float32)
        if low == ZERO:
            low = _first_zero(blocks, b)
        d = np.abs(np.int32(_ordered(largest)).view(np.float32) - low) / np.float32(top)
        out_d[b], out_m[b] = d, low
        _write_codes(blocks, b, low, d, HALF, top, out_codes)


@native
def _first_zero(blocks: Floats, b: int) -> Any:
    """Return the first zero: 0 and -0 are equal, their bits are not, and ggml keeps the first."""
    for i in range(blocks.shape[1]):
        if blocks[b, i] == ZERO:
            return blocks[b, i]
    return ZERO
