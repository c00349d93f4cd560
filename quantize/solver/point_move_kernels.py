"""A super-block's integers, signs and points moved to their best on the CPU, each with all others held.

Sub-blocks follow one another in the order of the columns, and in them the octets, each seeing what those
before have changed. A sub-block's integer moves first, then each octet turns signs, and takes the best of all
points for them, its own among these: so no move raises the loss. Rows are lanes, as in
quantize/solver/kernels.py.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats, nearest
from quantize.codecs.native.compiled import fused
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.block_kernels import _gather_ahead, gather, invert
from quantize.solver.kernels import _load_group, _store, load
from quantize.solver.point_kernels import (
    Book,
    flip,
    load_lanes,
    load_values,
    make_room,
    multiply,
    place,
    store_signs,
)

_HALF, _TWO = np.float32(0.5), np.float32(2)


@fused
def _load_signs(signs: Bytes, first: int, tile: Floats) -> None:
    """Set -1 or 1 for the bits of sign bytes (N, 32), of lanes without a row 1."""
    for lane in range(LANES):
        for i in range(len(tile)):
            tile[i, lane] = ONE
            if first + lane < len(signs) and signs[first + lane, i // 8] >> (i % 8) & 1:
                tile[i, lane] = -ONE


@fused
def _load_points(points: Any, first: int, tile: Floats) -> None:
    """Set the numbers of points (N, n) as floats, of lanes without a row 0."""
    for lane in range(LANES):
        for i in range(len(tile)):
            tile[i, lane] = np.float32(points[first + lane, i]) if first + lane < len(points) else ZERO


@fused
def _along(S: Floats, slope: Floats, values: Floats, room: Floats) -> Any:
    """Return q (W - Ŵ) S and q S q of the signed values q, (n_sub, 64)."""
    along, curve, product = room[0], room[1], room[2:3]
    for lane in range(LANES):
        along[lane] = curve[lane] = ZERO
    for i in range(len(values)):
        _row_product(S[i], values, product[0])
        for lane in range(LANES):
            along[lane] += slope[i, lane] * values[i, lane]
            curve[lane] += product[0, lane] * values[i, lane]
    return along, curve


@fused
def _row_product(row: Floats, values: Floats, product: Floats) -> None:
    """Set Σ row_k q_k."""
    for lane in range(LANES):
        product[lane] = ZERO
    gather(values, row, len(values), product)


@fused
def _refit_step(
    S: Floats, slope: Floats, values: Floats, unit: Floats, top: Any, now: Floats, room: Floats
) -> None:
    """Move a sub-block's integer scale to its best for the signed values, (n_sub, 64).

    `S` is the sub-block's, `slope` what (W - Ŵ) S is there. `now` has the rows integer, scale, inverse, and
    takes the new ones and the scale's change; `room` is a tile of three.
    """
    along, curve = _along(S, slope, values, room)
    for lane in range(LANES):
        base, scale = unit[lane], now[1, lane]
        best = scale + along[lane] / curve[lane] if curve[lane] > ZERO else scale
        inverse = ONE / base if base != ZERO else ZERO
        step = np.float32(nearest(min(max(_HALF * (best * inverse - ONE), ZERO), top)))
        new = base * (ONE + _TWO * step)
        move = new - scale
        helps = move * (_TWO * along[lane] - move * curve[lane]) > ZERO
        now[0, lane] = step if helps else now[0, lane]
        now[1, lane] = new if helps else scale
        now[3, lane] = move if helps else ZERO
    invert(now[1], now[2])


@fused
def _move_octet(
    S: Floats,
    groups: Floats,
    h: Floats,
    parity: bool,
    book: Book,
    room: Any,
    signs: Floats,
    values: Floats,
    points: Floats,
) -> None:
    """Move an octet's signs, and its one or two points, to their best, each given the others.

    `S` (8, 8) is its part of the Hessian, `groups` those of its points, and h what a target would have been
    made: its slope over the scale and S q.
    """
    search, _, part, found, spare, _ = room
    n = book.points.shape[1]
    flip(S, h, parity, signs, values, spare)
    for start in range(0, 8, n):
        for i in range(n):
            for lane in range(LANES):
                part[i, lane] = h[start + i, lane]
            for k in range(8):
                if k < start or k >= start + n:
                    s = S[start + i, k]
                    for lane in range(LANES):
                        part[i, lane] -= s * values[k, lane]
        chosen = place(groups[start // n], signs[start : start + n], part, book, search, found)
        for lane in range(LANES):
            points[start // n, lane] = chosen[lane]
        for i in range(n):
            for lane in range(LANES):
                values[start + i, lane] = found[i, lane]


@fused
def _move_octets(
    at: int, parts: Any, book: Book, parity: bool, now: Floats, tiles: Any, values: Floats, room: Any
) -> None:
    """Move the octets of a sub-block that begins `at`, whose signed values are given, one after another.

    Adds to `back` what that takes from Ŵ.
    """
    (subs, octets, groups), (slope, back, signs, points) = parts, tiles
    n, before, h = book.points.shape[1], room[1], room[5]
    inside, scale, inverse = subs[at // len(values)], now[1], now[2]
    for start in range(0, len(values), 8):
        first, own = at + start, values[start : start + 8]
        S, marks = octets[first // 8], slice(first // n, (first + 8) // n)
        multiply(S, own, h)
        for i in range(8):
            for lane in range(LANES):
                before[i, lane] = own[i, lane]
                h[i, lane] += slope[first + i, lane] * inverse[lane]
        _move_octet(S, groups[marks], h, parity, book, room, signs[first : first + 8], own, points[marks])
        for i in range(8):
            for lane in range(LANES):
                before[i, lane] = scale[lane] * (before[i, lane] - own[i, lane])
                back[first + i, lane] += before[i, lane]
        for i in range(start + 8, len(values)):
            gather(before, inside[i, start:], 8, slope[at + i])


@fused
def _move_step(
    at: int, parts: Any, top: Any, units: Floats, now: Floats, tiles: Any, values: Floats, room: Any
) -> None:
    """Move the integer of a sub-block that begins `at`, and set in `back` what that takes from Ŵ."""
    slope, back = tiles[0], tiles[1]
    inside, n = parts[0][at // len(values)], len(values)
    for lane in range(LANES):
        now[1, lane] = units[lane] * (ONE + _TWO * now[0, lane])
    _refit_step(inside, slope[at : at + n], values, units, top, now, room[4])
    for i in range(n):
        for lane in range(LANES):
            back[at + i, lane] = -now[3, lane] * values[i, lane]
    for i in range(n):
        gather(back[at:], inside[i], n, slope[at + i])


@fused
def move_points(
    gradient: Floats,
    hessian: Floats,
    parts: Any,
    book: Book,
    parity: bool,
    top: Any,
    unit: Floats,
    steps: Floats,
    points: Any,
    signs: Bytes,
    out_moves: Floats,
) -> None:
    """Move each sub-block's integer scale, then its signs and points, to their best, all else held.

    `gradient` (N, 256) is (W - Ŵ) H, `hessian` (256, 256), and `parts` are the blocks on its diagonal of
    sub-blocks, of eight and of n weights; the other arrays are those of `round_points`. Sets what was added
    to Ŵ, (N, 256).
    """
    n, width = book.points.shape[1], gradient.shape[1]
    n_sub = width // steps.shape[1]
    slope, back, values = float_tile(width), float_tile(width), float_tile(n_sub)
    all_signs, all_points = float_tile(width), float_tile(width // n)
    tiles = slope, back, all_signs, all_points
    room = make_room(book), float_tile(8), float_tile(8), float_tile(8), float_tile(12), float_tile(8)
    units, now = lanes(), float_tile(4)
    for first in range(0, len(gradient), LANES):
        load(gradient, first, slope)
        load_lanes(unit, first, units)
        _load_signs(signs, first, all_signs)
        _load_points(points, first, all_points)
        for j in range(steps.shape[1]):
            at = j * n_sub
            for i in range(0, n_sub, n):
                chosen, given = all_points[(at + i) // n], all_signs[at + i : at + i + n]
                load_values(book.points, chosen, given, values[i : i + n])
            for i in range(at, at + n_sub, 8):
                _gather_ahead(back, hessian[i : i + 8], at, slope[i : i + 8])
            _load_group(steps, first, j, now[0])
            _move_step(at, parts, top, units, now, tiles, values, room)
            _move_octets(at, parts, book, parity, now, tiles, values, room)
            for lane in range(min(LANES, len(steps) - first)):
                steps[first + lane, j] = now[0, lane]
        for i in range(width):
            for lane in range(LANES):
                back[i, lane] = -back[i, lane]
        _store(all_points, first, points)
        store_signs(all_signs, first, signs)
        _store(back, first, out_moves)
