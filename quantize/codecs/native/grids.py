"""Points of a grid: which of them are near a combination of codes, and which is nearest to weights."""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ZERO, Floats
from quantize.codecs.native.compiled import native

CHUNK = 16


@native
def _unpack(packed: int, bits: int, codes: Any) -> int:
    """Set the codes of a packed combination and return the largest."""
    largest = 0
    for i in range(len(codes)):
        codes[i] = (packed >> (bits * i)) & ((1 << bits) - 1)
        largest = max(largest, codes[i])
    return largest


@native
def _near_distance(distance: Any, near: int) -> int:
    """Return the `near`-th smallest of the different distances."""
    bound = -1
    for _ in range(near):
        smallest = 1 << 30
        for d in distance:
            if bound < d < smallest:
                smallest = d
        bound = smallest
    return bound


@native
def _collect(distance: Any, bound: int, members: Any, start: int) -> int:
    """Write the points up to `bound` away, nearer ones first, equals by number; return how many."""
    found = 0
    for wanted in range(bound + 1):
        for j in range(len(distance)):
            if distance[j] == wanted:
                members[start + found] = j
                found += 1
    return found


@native
def neighbours(levels: Any, values: Any, bits: int, n_levels: int, near: int) -> Any:
    """Return the arrays of `quantize.codecs.grids.Grid` behind `levels`, in its order."""
    n_points, n = levels.shape
    size = 1 << (bits * n)
    point = np.full(size, -1, np.int32)
    first, chunks = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for j in range(n_points):
        packed = 0
        for i in range(n):
            packed |= int(levels[j, i]) << (bits * i)
        point[packed] = j
    members, used = np.zeros(1 << 22, np.int32), 0
    distance, codes = np.zeros(n_points, np.int64), np.zeros(n, np.int64)
    for packed in range(size):
        if point[packed] >= 0 or _unpack(packed, bits, codes) >= n_levels:
            continue
        for j in range(n_points):
            total = 0
            for i in range(n):
                apart = 2 * (levels[j, i] - codes[i])
                total += apart * apart
            distance[j] = total
        found = _collect(distance, _near_distance(distance, near), members, used)
        first[packed], chunks[packed] = used // CHUNK, (found + CHUNK - 1) // CHUNK
        for j in range(found, chunks[packed] * CHUNK):
            members[used + j] = members[used]
        used += chunks[packed] * CHUNK
    members = members[:used].copy()
    return point, first, chunks, members, _by_chunk(members, values)


@native
def _by_chunk(members: Any, values: Any) -> Any:
    """Return int8 (chunks, n, 16): the values of 16 members side by side."""
    n = values.shape[1]
    out = np.empty((len(members) // CHUNK, n, CHUNK), np.int8)
    for j in range(len(members)):
        for i in range(n):
            out[j // CHUNK, i, j % CHUNK] = values[members[j], i]
    return out


@native
def nearest_point(
    grid: Any, packed: int, x: Floats, weights: Floats, scale: Any, offset: Any, errors: Floats
) -> Any:
    """Return the neighbour of packed codes with the smallest Σ w (scale * (value + offset) - x)²."""
    best, chosen = np.float32(np.inf), grid.members[grid.first[packed] * CHUNK]
    for chunk in range(grid.first[packed], grid.first[packed] + grid.chunks[packed]):
        values = grid.values[chunk]
        for j in range(CHUNK):
            errors[j] = ZERO
        for i in range(len(x)):
            for j in range(CHUNK):
                miss = scale * (np.float32(values[i, j]) + offset) - x[i]
                errors[j] += weights[i] * miss * miss
        for j in range(CHUNK):
            if errors[j] < best:
                best = errors[j]
                chosen = grid.members[chunk * CHUNK + j]
    return chosen
