"""The best point of a grid for eight (or four) neighbouring weights, under all of their Hessian.

With the weights' signs σ taken out, a scale s, and h = A g / s for the target g under the Hessian A, the
point v that loses least has the smallest

    Σ_ik σ_i σ_k A_ik v_i v_k - 2 Σ_i σ_i h_i v_i

A point is two halves, of which there are few: 81 of four weights with three levels, 64 of two with eight.
What each half costs by itself, and what a first half adds to each weight of the second, is summed up weight
by weight, from one half to the next only where they differ; a point then takes one product for each weight of
its second half. All points are tried, four at a time. Rows are lanes, as in quantize/solver/kernels.py.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quantize.codecs.native.arithmetic import ONE, ZERO, Floats
from quantize.codecs.native.compiled import fused
from quantize.codecs.native.tiles import LANES, float_tile

_TWO, _FOUR, _EIGHT = np.float32(2), np.float32(4), np.float32(8)
_SECOND_OF_EIGHT = 5 * LANES  # where in a row of `Room.sums` the sums of the second half begin
_SECOND_OF_FOUR = 3 * LANES
Numbers = npt.NDArray[np.int64]


class Book(NamedTuple):
    """The points of a grid, sorted by their first half; there are H halves of m weights, and G points.

    `values` f32 (L,) are the levels' magnitudes; `halves` int64 (H, m) the levels of each half, in the order
    of the numbers that they make, and `changed` (H,) the first place where a half differs from the one
    before. The points with the first half h are `first[h]:first[h + 1]` of `second`, their second halves,
    `tails` f32 (P, m), these halves' magnitudes, and `number` f32 (P,), what the format calls them: multiples
    of four, some given twice. `points` f32 (G, 2 m) are the magnitudes by number.
    """

    values: Floats
    halves: Numbers
    changed: Numbers
    first: Numbers
    second: Numbers
    tails: Floats
    number: Floats
    points: Floats


@fused
def make_room(book: Book) -> Any:
    """Return room for a search: signed terms of A, sums along a half, costs of second halves, the best."""
    n = book.points.shape[1]
    sums = np.empty((n // 2 + 1, (n + 1) * LANES), np.float32)
    return float_tile(n * n), sums, float_tile(len(book.halves)), np.empty(2 * LANES, np.float32)


@fused
def _climb(A: Floats, at: int, top: int, book: Book, half: int, terms: Floats, sums: Floats) -> None:
    """Sum up one half, weights `at`... of A; the sums behind its first weights are those of the half before.

    A row of `sums` holds, after so many weights, the cost, and behind it what each weight before `top` adds.
    """
    n, m = len(A), book.halves.shape[1]
    for d in range(book.changed[half], m):
        i = at + d
        value = book.values[book.halves[half, d]]
        square = A[i, i] * value
        old, new = sums[d], sums[d + 1]
        cost, new_cost, own = old[:LANES], new[:LANES], old[(1 + i) * LANES : (2 + i) * LANES]
        for lane in range(LANES):
            new_cost[lane] = cost[lane] + value * (own[lane] + square)
        for k in range(i + 1, top):
            term, share = terms[i * n + k], old[(1 + k) * LANES : (2 + k) * LANES]
            new_share = new[(1 + k) * LANES : (2 + k) * LANES]
            for lane in range(LANES):
                new_share[lane] = share[lane] + value * term[lane]


# Both of the next functions are one loop whose vectors stay in registers: each array is flat, so that the
# compiler sees with few comparisons that none of them overlap, and no row is an argument twice.
@fused
def _four_octets(
    sums: Floats,
    tail0: Floats,
    tail1: Floats,
    tail2: Floats,
    tail3: Floats,
    values: Floats,
    number: Floats,
    best: Floats,
) -> None:
    """Let four points with the same first half compete with the best: (cost, number), flat."""
    v00, v01, v02, v03 = values[0, 0], values[0, 1], values[0, 2], values[0, 3]
    v10, v11, v12, v13 = values[1, 0], values[1, 1], values[1, 2], values[1, 3]
    v20, v21, v22, v23 = values[2, 0], values[2, 1], values[2, 2], values[2, 3]
    v30, v31, v32, v33 = values[3, 0], values[3, 1], values[3, 2], values[3, 3]
    n0, n1, n2, n3 = number[0], number[1], number[2], number[3]
    for lane in range(LANES):
        s0, s1 = sums[_SECOND_OF_EIGHT + lane], sums[_SECOND_OF_EIGHT + LANES + lane]
        s2, s3 = sums[_SECOND_OF_EIGHT + 2 * LANES + lane], sums[_SECOND_OF_EIGHT + 3 * LANES + lane]
        c0 = tail0[lane] + s0 * v00 + s1 * v01 + s2 * v02 + s3 * v03
        c1 = tail1[lane] + s0 * v10 + s1 * v11 + s2 * v12 + s3 * v13
        c2 = tail2[lane] + s0 * v20 + s1 * v21 + s2 * v22 + s3 * v23
        c3 = tail3[lane] + s0 * v30 + s1 * v31 + s2 * v32 + s3 * v33
        left, left_number = c1 if c1 < c0 else c0, n1 if c1 < c0 else n0
        right, right_number = c3 if c3 < c2 else c2, n3 if c3 < c2 else n2
        winner = right_number if right < left else left_number
        cost = (right if right < left else left) + sums[lane]
        least, before = best[lane], best[LANES + lane]
        best[LANES + lane] = winner if cost < least else before
        best[lane] = cost if cost < least else least


@fused
def _four_quartets(
    sums: Floats,
    tail0: Floats,
    tail1: Floats,
    tail2: Floats,
    tail3: Floats,
    values: Floats,
    number: Floats,
    best: Floats,
) -> None:
    """Do what `_four_octets` does, for points of four weights."""
    v00, v01, v10, v11 = values[0, 0], values[0, 1], values[1, 0], values[1, 1]
    v20, v21, v30, v31 = values[2, 0], values[2, 1], values[3, 0], values[3, 1]
    n0, n1, n2, n3 = number[0], number[1], number[2], number[3]
    for lane in range(LANES):
        s0, s1 = sums[_SECOND_OF_FOUR + lane], sums[_SECOND_OF_FOUR + LANES + lane]
        c0 = tail0[lane] + s0 * v00 + s1 * v01
        c1 = tail1[lane] + s0 * v10 + s1 * v11
        c2 = tail2[lane] + s0 * v20 + s1 * v21
        c3 = tail3[lane] + s0 * v30 + s1 * v31
        left, left_number = c1 if c1 < c0 else c0, n1 if c1 < c0 else n0
        right, right_number = c3 if c3 < c2 else c2, n3 if c3 < c2 else n2
        winner = right_number if right < left else left_number
        cost = (right if right < left else left) + sums[lane]
        least, before = best[lane], best[LANES + lane]
        best[LANES + lane] = winner if cost < least else before
        best[lane] = cost if cost < least else least


@fused
def _prepare(A: Floats, signs: Floats, h: Floats, terms: Floats, sums: Floats, best: Floats) -> None:
    """Set what a search starts from: 2 σ_i σ_k A_ik, and no weights summed up."""
    n = len(A)
    for i in range(n):
        for k in range(i + 1, n):
            double, term = _TWO * A[i, k], terms[i * n + k]
            for lane in range(LANES):
                term[lane] = double * signs[i, lane] * signs[k, lane]
        own = sums[0, (1 + i) * LANES : (2 + i) * LANES]
        for lane in range(LANES):
            own[lane] = -_TWO * signs[i, lane] * h[i, lane]
    for lane in range(LANES):
        sums[0, lane] = ZERO
        best[lane] = np.float32(np.inf)
        best[LANES + lane] = ZERO


@fused
def place(A: Floats, signs: Floats, h: Floats, book: Book, room: Any, values: Floats) -> Any:
    """Find the point that loses least for given signs (n, 64) and h; set its signed values, (n, 64).

    Returns the points' numbers, f32 (64,), which stand in the room until the next search. Of points that lose
    alike the first in the book's order wins.
    """
    terms, sums, tails, best = room
    n, m = len(A), len(A) // 2
    first, second, number = book.first, book.second, book.number
    _prepare(A, signs, h, terms, sums, best)
    for half in range(len(tails)):
        _climb(A, m, n, book, half, terms, sums)
        tail = tails[half]
        for lane in range(LANES):
            tail[lane] = sums[m, lane]
    sums[0, (1 + m) * LANES :] = ZERO
    for half in range(len(tails)):
        _climb(
            A, 0, n, book, half, terms, sums
        )  # also where no point begins so: the next one goes on from it
        for p in range(first[half], first[half + 1], 4):
            t0, t1, t2, t3 = (
                tails[second[p]],
                tails[second[p + 1]],
                tails[second[p + 2]],
                tails[second[p + 3]],
            )
            if m == 4:
                _four_octets(sums[m], t0, t1, t2, t3, book.tails[p : p + 4], number[p : p + 4], best)
            else:
                _four_quartets(sums[m], t0, t1, t2, t3, book.tails[p : p + 4], number[p : p + 4], best)
    chosen = best[LANES:]
    load_values(book.points, chosen, signs, values)
    return chosen


@fused
def load_values(points: Floats, chosen: Floats, signs: Floats, values: Floats) -> None:
    """Set the signed values (n, 64) of the points with these numbers, f32 (64,)."""
    for lane in range(LANES):
        point = points[np.int64(chosen[lane])]
        for i in range(len(values)):
            values[i, lane] = signs[i, lane] * point[i]


@fused
def multiply(A: Floats, values: Floats, product: Floats) -> None:
    """Set A q of the lanes' vectors q, (n, 64)."""
    for i in range(len(A)):
        row = product[i]
        for lane in range(LANES):
            row[lane] = ZERO
        for k in range(len(A)):
            a, value = A[i, k], values[k]
            for lane in range(LANES):
                row[lane] += a * value[lane]


@fused
def flip(A: Floats, h: Floats, parity: bool, signs: Floats, values: Floats, room: Floats) -> None:
    """Turn signs where that loses less, the magnitudes as they are: one by one, or with parity the best pair.

    Changes `signs` and the signed `values`, (n, 64); `room` is a tile of n + 3.
    """
    n = len(A)
    slope, turned = room[:n], room[n]
    multiply(A, values, slope)
    for i in range(n):
        for lane in range(LANES):
            slope[i, lane] = h[i, lane] - slope[i, lane]
    if parity:
        _flip_pair(A, signs, values, slope, room[n:])
        return
    for i in range(n):
        square = A[i, i]
        for lane in range(LANES):
            value = values[i, lane]
            turn = value if value * (value * square + slope[i, lane]) < ZERO else ZERO
            signs[i, lane] = signs[i, lane] if turn == ZERO else -signs[i, lane]
            values[i, lane] = value - _TWO * turn
            turned[lane] = turn
        for k in range(i + 1, n):
            double = _TWO * A[i, k]
            for lane in range(LANES):
                slope[k, lane] += double * turned[lane]


@fused
def _flip_pair(A: Floats, signs: Floats, values: Floats, change: Floats, room: Floats) -> None:
    """Turn the two signs whose turning together lowers the loss most, if any do; `change` is lost."""
    n = len(A)
    least, one, other = room[0], room[1], room[2]
    for i in range(n):
        square = A[i, i]
        for lane in range(LANES):
            value = values[i, lane]
            change[i, lane] = _FOUR * value * (value * square + change[i, lane])
    for lane in range(LANES):
        least[lane], one[lane], other[lane] = ZERO, -ONE, -ONE
    for i in range(n):
        for k in range(i + 1, n):
            eight, first, second = _EIGHT * A[i, k], np.float32(i), np.float32(k)
            for lane in range(LANES):
                both = change[i, lane] + change[k, lane] + eight * values[i, lane] * values[k, lane]
                wins = both < least[lane]
                least[lane] = both if wins else least[lane]
                one[lane] = first if wins else one[lane]
                other[lane] = second if wins else other[lane]
    for i in range(n):
        at = np.float32(i)
        for lane in range(LANES):
            sign = -ONE if one[lane] == at or other[lane] == at else ONE
            signs[i, lane] *= sign
            values[i, lane] *= sign


@fused
def load_lanes(values: Floats, first: int, out: Floats) -> None:
    """Copy one number a row, of (N,) from `first` on, into lanes; no row has zero."""
    for lane in range(LANES):
        out[lane] = values[first + lane] if first + lane < len(values) else ZERO


@fused
def store_signs(tile: Floats, first: int, signs: Any) -> None:
    """Set the sign bytes (N, 32) of a tile of -1 and 1, the first of eight lowest."""
    for lane in range(min(LANES, len(signs) - first)):
        for octet in range(signs.shape[1]):
            bits = 0
            for i in range(8):
                bits |= int(tile[8 * octet + i, lane] < ZERO) << i
            signs[first + lane, octet] = np.uint8(bits)
