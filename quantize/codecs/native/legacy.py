"""Q4_0, Q4_1, Q5_0 and Q5_1 with importances: blocks of 32 weights, 64 of them at a time.

The codes are those of the search, which measured with the unrounded scale; nothing is rounded again. The
variance in the weights is that of the whole row.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.affine import affine
from quantize.codecs.native.arithmetic import ZERO, Bytes, Floats
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
