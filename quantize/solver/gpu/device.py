"""What several kernels share: codes nearest to a goal, rounding, the shape of a launch."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 1024
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point


def kernel(function: Callable[..., Any]) -> Any:
    """Make a function one of Triton's, compiled when it is first launched."""
    return triton.jit(function)


def tile(n_rows: int, n_columns: int) -> tuple[int, int]:
    """Return how many rows a program holds, and n_columns rounded up to a power of two."""
    columns = triton.next_power_of_2(n_columns)
    return min(max(_TILE // columns, 1), triton.next_power_of_2(n_rows)), columns


def warps(columns: int) -> int:
    """Return the warps of a program: as few as hold a tile in registers, for a sum within a warp is fast."""
    return min(max(columns // _TILE, 1), 8)


def inverted(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, or zero where the scale is zero."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


@kernel
def whole(value: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, ties to even, numbers below 2^22."""
    return (value + _ROUNDER) - _ROUNDER


@kernel
def limited(value: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Keep a number in low..high."""
    return tl.minimum(tl.maximum(value, low), high)


@kernel
def half(value: tl.tensor) -> tl.tensor:
    """Round to half precision, as f32."""
    return value.to(tl.float16).to(tl.float32)


@kernel
def level_of(code: tl.tensor, levels: tl.tensor, MIDDLES: tl.constexpr) -> tl.tensor:
    """Return the level of codes, f32: the code itself where levels are 0, 1, 2, ..."""
    return code if MIDDLES == 0 else tl.load(levels + code.to(tl.int32))


@kernel
def nearest(
    goal: tl.tensor,
    inverse: tl.tensor,
    base: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    top: tl.tensor,
    MIDDLES: tl.constexpr,
) -> tl.tensor:
    """Return the code, f32, whose value on a grid is nearest to the goal.

    MIDDLES is how many middles there are between uneven levels; none where the levels are 0, 1, ..., top.
    """
    units = (goal - base) * inverse
    if MIDDLES == 0:
        code = whole(limited(units, 0.0, top))
    else:
        code = tl.zeros_like(units)
        for i in tl.static_range(MIDDLES):
            code += tl.where(units > tl.load(middles + i), 1.0, 0.0)
    return code
