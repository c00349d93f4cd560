"""Points of a grid: which of them are near a combination of codes, and which is nearest to weights.

A search asks for neighbours millions of times, at combinations that nobody can foretell; what it asks must
lie in the processor's nearest caches. So combinations are numbered without gaps, to the base of the number
of levels, and a neighbour is the two bytes of its point, whose terms stand in a table of some kilobytes.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import Floats
from quantize.codecs.native.compiled import inlined, native


@native
def _unpack(packed: int, n_levels: int, codes: Any) -> None:
    """Set the codes of a packed combination: its digits, the lowest first."""
    for i in range(len(codes)):
        codes[i] = packed % n_levels
        packed //= n_levels


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
def neighbours(levels: Any, n_levels: int, near: int) -> Any:
    """Return the arrays of `quantize.codecs.grids.Grid` behind `values`, in its order."""
    n_points, n = levels.shape
    size = n_levels**n
    point = np.full(size, -1, np.int16)
    first, last = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for j in range(n_points):
        packed = 0
        for i in range(n):
            packed += int(levels[j, i]) * n_levels**i
        point[packed] = j
    members, used = np.zeros(1 << 22, np.uint16), 0
    distance, codes = np.zeros(n_points, np.int64), np.zeros(n, np.int64)
    for packed in range(size):
        if point[packed] >= 0:
            continue
        _unpack(packed, n_levels, codes)
        for j in range(n_points):
            total = 0
            for i in range(n):
                apart = 2 * (levels[j, i] - codes[i])
                total += apart * apart
            distance[j] = total
        first[packed] = used
        used += _collect(distance, _near_distance(distance, near), members, used)
        last[packed] = used
    return point, first, last, members[:used].copy(), _terms(levels, n_levels)


@native
def _terms(levels: Any, n_levels: int) -> Any:
    """Return uint8 (G, n): where in a table (n, levels) the term of each weight of a point lies."""
    n_points, n = levels.shape
    terms = np.empty((n_points, n), np.uint8)
    for j in range(n_points):
        for i in range(n):
            terms[j, i] = i * n_levels + levels[j, i]
    return terms


@native
def set_terms(
    x: Floats, weights: Floats, start: int, n: int, scale: Any, values: Floats, table: Floats
) -> None:
    """Set table[i * levels + l] to weights[i] * (scale * values[l] - x[i])², i from `start` on."""
    n_levels = len(values)
    for i in range(n):
        for level in range(n_levels):
            miss = scale * values[level] - x[start + i]
            table[i * n_levels + level] = weights[start + i] * miss * miss


@inlined
def nearest_member(terms: Any, members: Any, first: int, last: int, table: Floats) -> int:
    """Return the point among members first..last-1 with the smallest sum of terms, the first of equals."""
    best, chosen = np.float32(np.inf), int(members[first])
    wide = terms.shape[1] == 8
    for place in range(first, last):
        j = int(members[place])
        # All terms of all members: a branch that leaves early is foretold wrongly too often to save time.
        error = table[terms[j, 0]] + table[terms[j, 1]] + table[terms[j, 2]] + table[terms[j, 3]]
        if wide:
            error = error + table[terms[j, 4]] + table[terms[j, 5]] + table[terms[j, 6]] + table[terms[j, 7]]
        better = error < best
        best = error if better else best
        chosen = j if better else chosen
    return chosen
