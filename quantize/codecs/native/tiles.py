"""A tile: 64 blocks side by side, the same position of all of them beside each other in memory.

A tile is an array (block_size, 64): row i holds the i-th weight of 64 blocks, its lanes. Loops run over
lanes inside and over positions outside, which the compiler turns into vector instructions. What is left of
the last tile is filled with zeros, whose results nobody reads.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ZERO, Bytes, Floats
from quantize.codecs.native.compiled import native

LANES = 64


@native
def load(blocks: Floats, first: int, tile: Floats) -> None:
    """Copy blocks (B, n) from `first` on into the lanes of a tile (n, 64)."""
    present = min(LANES, len(blocks) - first)
    tile[:, present:] = ZERO
    for lane in range(present):
        block = blocks[first + lane]
        for i in range(len(tile)):
            tile[i, lane] = block[i]


@native
def load_importance(importance: Floats, first: int, tile: Floats) -> None:
    """Copy the importances (K,) of the columns that 64 blocks cover, from block `first` on, into a tile."""
    n = len(tile)
    per_row = len(importance) // n
    for lane in range(LANES):
        column = (first + lane) % per_row * n
        for i in range(n):
            tile[i, lane] = importance[column + i]


@native
def store(tile: Any, first: int, blocks: Any) -> None:
    """Copy the lanes of a tile (n, 64) back to blocks (B, n) from `first` on."""
    for lane in range(min(LANES, len(blocks) - first)):
        for i in range(len(tile)):
            blocks[first + lane, i] = tile[i, lane]


@native
def store_lanes(lanes: Floats, first: int, values: Floats) -> None:
    """Copy one number a lane to values (B,) from `first` on."""
    for lane in range(min(LANES, len(values) - first)):
        values[first + lane] = lanes[lane]


@native
def sum_squares(tile: Floats, total: Floats) -> None:
    """Sum the squares of every lane in the order of the positions."""
    for lane in range(LANES):
        total[lane] = ZERO
    for i in range(len(tile)):
        for lane in range(LANES):
            total[lane] += tile[i, lane] * tile[i, lane]


@native
def sum_lanes(tile: Floats, total: Floats) -> None:
    """Sum every lane in the order of the positions."""
    for lane in range(LANES):
        total[lane] = ZERO
    for i in range(len(tile)):
        for lane in range(LANES):
            total[lane] += tile[i, lane]


@native
def weigh_by_size(x: Floats, offset: Floats, weights: Floats) -> None:
    """Set weights to offset + |x|."""
    for i in range(len(x)):
        for lane in range(LANES):
            weights[i, lane] = offset[lane] + abs(x[i, lane])


@native
def weigh_by_square(x: Floats, weights: Floats) -> None:
    """Set weights to x²."""
    for i in range(len(x)):
        for lane in range(LANES):
            weights[i, lane] = x[i, lane] * x[i, lane]


@native
def weigh_by_importance(x: Floats, variance: Floats, weights: Floats) -> None:
    """Turn importances into weights, times sqrt(variance + x²): ggml's blend of the block and the weight."""
    for i in range(len(x)):
        for lane in range(LANES):
            weights[i, lane] *= np.sqrt(variance[lane] + x[i, lane] * x[i, lane])


@native
def lanes() -> Floats:
    """Return an uninitialised float32 for every lane."""
    return np.empty(LANES, np.float32)


@native
def byte_tile(n: int) -> Bytes:
    """Return an uninitialised tile (n, 64) of bytes."""
    return np.empty((n, LANES), np.uint8)


@native
def float_tile(n: int) -> Floats:
    """Return an uninitialised tile (n, 64) of floats."""
    return np.empty((n, LANES), np.float32)
