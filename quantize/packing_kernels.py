"""The loop over a packed triangle on the CPU: correlations to a symmetric matrix (quantize/statistics.py)."""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import Floats
from quantize.codecs.native.compiled import native

_TILE = 64  # 64 x 64 floats are 16 KB: both a tile and its mirror stay in the first-level cache


@native
def unpack_triangle(codes: Any, scales: Floats, steps: Any, out: Floats) -> None:
    """Set out_ik = out_ki = codes / steps * (scales_i scales_k), i < k, of int16 codes (n (n - 1) / 2,)."""
    n, at = len(scales), 0
    for i in range(n):
        for k in range(i + 1, n):
            out[i, k] = np.float32(codes[at]) / steps * (scales[i] * scales[k])
            at += 1
    for top in range(0, n, _TILE):
        for left in range(top, n, _TILE):
            for k in range(left, min(left + _TILE, n)):
                for i in range(top, min(top + _TILE, k)):
                    out[k, i] = out[i, k]
