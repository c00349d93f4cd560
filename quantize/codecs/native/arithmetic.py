"""Float32 and half precision as ggml computes them, to the bit.

The compiler neither reorders sums nor fuses a product with an addition unless it is told to, and nothing
here tells it: that is what makes the bits those of ggml's plain C. Constants are float32 objects, because
Numba follows NumPy's promotion, where a Python float, or an int32 beside a float32, would make it double.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.codecs.native.compiled import native

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
TENTH = np.float32(0.1)
# Below this largest magnitude ggml calls a block zero (GROUP_MAX_EPS).
TINY = np.float32(1e-15)

_ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point
_MANTISSA = np.int32(0x7FFFFF)
_MIDDLE = np.int32(0x400000)
_HALF_OVERFLOW = np.float32(65520)
_HALF_NORMAL = np.float32(2.0**-14)
_HALF_STEP = np.float32(2.0**-24)
_HALF_STEPS = np.float32(2.0**24)


@native
def nearest(value: Any) -> Any:
    """Round to the nearest integer, ties to even, as an int32: ggml's `nearest_int`.

    Also outside its domain (above 2^22, where it is arbitrary) the result is the one of ggml.
    """
    bits = np.float32(value + _ROUNDER).view(np.int32)
    return np.int32(np.int32(bits & _MANTISSA) - _MIDDLE)


@native
def clamp(value: Any, low: Any, high: Any) -> Any:
    """Limit an int32 to low..high and return it as float32."""
    return np.float32(min(max(value, np.int32(low)), np.int32(high)))


@native
def half(value: Any) -> Any:
    """Round a float32 to half precision, ties to even, and return the float32 that the half stands for."""
    size = abs(value)
    if size >= _HALF_OVERFLOW:
        return np.float32(np.copysign(np.float32(np.inf), value))
    if size < _HALF_NORMAL:
        steps = np.float32(np.float32(size * _HALF_STEPS) + _ROUNDER) - _ROUNDER
        return np.float32(np.copysign(np.float32(steps * _HALF_STEP), value))
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(bits >> np.uint32(13)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
    return np.uint32(rounded).view(np.float32)
