"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: eight (or four) neighbouring weights become one point of a grid.

The signs are taken out first. Types that store seven signs of eight flip one where their number is odd, that
of the weight where it costs least. Then a sub-block tries a ladder of scales: each rounds the weights to
codes, each group of codes that is no point of the grid goes to the best of its neighbours, and the fit of
the scale to those points is judged. The winner's groups are rounded once more by its fitted scale.
"""

from typing import Any, NamedTuple

import numpy as np

from quantize.codecs.native.affine import positive
from quantize.codecs.native.arithmetic import ONE, ZERO, Floats, clamp, half, nearest
from quantize.codecs.native.compiled import native
from quantize.codecs.native.grids import nearest_member, set_terms
from quantize.codecs.native.k_quants import weigh
from quantize.codecs.native.tiles import LANES, byte_tile, float_tile, lanes, load, sum_squares

_HALF = np.float32(0.5)


class Search(NamedTuple):
    """What the search of a type goes by.

    `n` weights share a scale, a code is at most `top`; the ladder has rungs -reach..reach of `step`, and
    `first_fit` takes its middle from a fit; `parity` stores seven signs of eight; below `tiny`
    a sub-block is zero; `factor` is the variance's, and `floor` its share in weights without importances;
    `again` says which groups are rounded once more: 0 those off the grid, 1 all if one is off it, 2 all;
    `start_on_grid` what holds if no rung wins; `fudge` goes to d.
    """

    n: int
    top: int
    reach: int
    step: Any
    parity: bool
    tiny: Any
    factor: Any
    floor: Any
    first_fit: bool
    again: int
    start_on_grid: bool
    fudge: Any


@native
def _weigh_plain(x: Floats, factor: Any, floor: Any, weights: Floats) -> None:
    """Set floor * variance + x²."""
    variance = lanes()
    sum_squares(x, variance)
    for i in range(len(x)):
        for lane in range(LANES):
            base = floor * (factor * variance[lane] / np.float32(256))
            weights[i, lane] = base + x[i, lane] * x[i, lane]


@native
def _take_signs(x: Floats, weights: Floats, lane: int, first: int, parity: bool) -> int:
    """Make eight weights of a lane positive, in place, and return their signs, the first lowest."""
    signs, flips, cheapest = 0, 0, 0
    least = np.float32(np.inf)
    for i in range(8):
        value = x[first + i, lane]
        cost = weights[first + i, lane] * value * value
        if i == 0 or cost < least:
            least, cheapest = cost, i
        if not value >= ZERO:
            x[first + i, lane] = -value
            signs |= 1 << i
            flips += 1
    if parity and flips % 2 == 1:
        x[first + cheapest, lane] = -x[first + cheapest, lane]
        signs ^= 1 << cheapest
    return signs & 127 if parity else signs


@native
def _place(grid: Any, search: Any, x: Floats, roots: Floats, scale: Any, k: int, table: Floats) -> int:
    """Return the point of the k-th group of weights at a scale."""
    n, inverse, packed = grid.levels.shape[1], ONE / scale, 0
    for i in range(n):
        code = nearest(_HALF * (inverse * x[n * k + i] - ONE))
        packed += max(0, min(search.top, int(code))) * (search.top + 1) ** i
    if grid.point[packed] >= 0:
        return int(grid.point[packed])
    set_terms(x, roots, n * k, n, scale, grid.values, table)
    return nearest_member(grid.terms, grid.members, grid.first[packed], grid.last[packed], table)


def _climber(n: int, n_levels: int) -> Any:
    """Return the innermost loop of these types, for groups of `n` weights with `n_levels` levels.

    It places all groups at one rung of the ladder, and returns Σwqx and Σwq² of the points' values q. The
    sizes are constants, so that loops over them unroll; and the grid's arrays come one by one, because to
    take them out of a tuple costs more than the work.
    """

    @native
    def climb(
        levels: Any,
        values: Floats,
        point: Any,
        first: Any,
        last: Any,
        members: Any,
        terms: Any,
        x: Floats,
        weights: Floats,
        roots: Floats,
        inverse: Any,
        trial: Any,
        trial_on: Any,
        table: Floats,
    ) -> Any:
        scale, sum_qx, sum_qq = ONE / inverse, ZERO, ZERO
        for k in range(len(trial)):
            packed, place = 0, 1
            for i in range(n):
                code = nearest(_HALF * (inverse * x[n * k + i] - ONE))
                packed += max(0, min(n_levels - 1, int(code))) * place
                place *= n_levels
            chosen = int(point[packed])
            trial_on[k] = chosen >= 0
            if chosen < 0:
                for i in range(n):
                    for level in range(n_levels):
                        miss = scale * values[level] - x[n * k + i]
                        table[i * n_levels + level] = roots[n * k + i] * miss * miss
                chosen = nearest_member(terms, members, first[packed], last[packed], table)
            trial[k] = chosen
            for i in range(n):
                value = values[levels[chosen, i]]
                weighted = weights[n * k + i]
                sum_qx += weighted * x[n * k + i] * value
                sum_qq += weighted * value * value
        return sum_qx, sum_qq

    return climb


_climb_octets = _climber(8, 3)
_climb_quartets = _climber(4, 8)


@native
def _fit(grid: Any, x: Floats, weights: Floats, points: Any, scale: Any) -> Any:
    """Return the scale that fits the points best; the one given where no weight counts."""
    sum_qx, sum_qq, n = ZERO, ZERO, grid.levels.shape[1]
    for k in range(len(points)):
        for i in range(n):
            value = grid.values[grid.levels[points[k], i]]
            weighted = weights[n * k + i]
            sum_qx += weighted * x[n * k + i] * value
            sum_qq += weighted * value * value
    return sum_qx / sum_qq if sum_qq > ZERO else scale


@native
def _search(
    grid: Any, search: Any, x: Floats, weights: Floats, largest: Any, scale: Any, points: Any, room: Any
) -> Any:
    """Find the points of one sub-block and return its scale; `largest` is what the ladder divides by."""
    roots, trial, on_grid, trial_on, table = room
    odd = np.float32(2 * search.top + 1)
    best = ZERO
    on_grid[:] = search.start_on_grid
    points[:] = grid.point[0]
    levels, values, point, first, last, members, terms = grid
    for rung in range(-search.reach, search.reach + 1):
        inverse = (odd + np.float32(rung) * search.step) / largest
        if search.top == 2:
            sum_qx, sum_qq = _climb_octets(
                levels, values, point, first, last, members, terms,
                x, weights, roots, inverse, trial, trial_on, table,
            )  # fmt: skip
        else:
            sum_qx, sum_qq = _climb_quartets(
                levels, values, point, first, last, members, terms,
                x, weights, roots, inverse, trial, trial_on, table,
            )  # fmt: skip
        if sum_qq > ZERO and sum_qx * sum_qx > best * sum_qq:
            scale = sum_qx / sum_qq
            best = scale * sum_qx
            points[:] = trial
            on_grid[:] = trial_on
    if scale > ZERO and (search.again == 2 or not on_grid.all()):
        for k in range(len(points)):
            if search.again > 0 or not on_grid[k]:
                points[k] = _place(grid, search, x, roots, scale, k, table)
        scale = _fit(grid, x, weights, points, scale)
    return scale


@native
def _column(tile: Floats, lane: int, first: int, out: Floats) -> Any:
    """Copy a sub-block of a lane, and return its largest number."""
    largest = tile[first, lane]
    for i in range(len(out)):
        out[i] = tile[first + i, lane]
        largest = max(largest, out[i])
    return largest


@native
def round_scales(scales: Any, divisor: Any, top: int, out: Any) -> Any:
    """Round scales to d * (2 s + 1), the largest about divisor * d, and return d; 0 if all are 0."""
    largest = ZERO
    for j in range(len(scales)):
        largest = max(largest, scales[j])
    if largest == ZERO:
        return ZERO
    d = largest / divisor
    inverse = ONE / d
    for j in range(len(scales)):
        out[j] = np.uint8(clamp(nearest(_HALF * (inverse * scales[j] - ONE)), 0, top))
    return d


@native
def _sub_block(
    grid: Any,
    search: Any,
    x: Floats,
    weights: Floats,
    start: Any,
    largest: Any,
    points: Any,
    signs: Any,
    room: Any,
) -> Any:
    """Find points, signs and scale of one sub-block whose signs are out; all zero where it is."""
    eff = start * np.float32(search.top + 1)
    odd = np.float32(2 * search.top + 1)
    if largest < search.tiny or largest == ZERO or (search.first_fit and eff <= ZERO):
        points[:] = 0
        signs[:] = 0
        return ZERO
    roots = room[0]
    for i in range(len(x)):
        roots[i] = np.sqrt(weights[i])
    if search.first_fit:
        scale = _search(grid, search, x, weights, eff, start, points, room)
    else:
        scale = _search(grid, search, x, weights, largest, largest / odd, points, room)
    if scale < ZERO:
        for k in range(len(signs)):
            signs[k] = ~signs[k] & (127 if search.parity else 255)
        return -scale
    return scale


@native
def grid_blocks(
    blocks: Floats,
    importance: Floats,
    grid: Any,
    search: Any,
    out_d: Floats,
    out_scales: Any,
    out_points: Any,
    out_signs: Any,
) -> None:
    """Search the blocks (B, 256): d, scale codes, points and sign bytes."""
    n, per_group = search.n, grid.levels.shape[1]
    subs, groups, octets = 256 // n, n // per_group, n // 8
    x, weights = float_tile(256), float_tile(256)
    x_subs, weight_subs = x.reshape(subs, n, LANES), weights.reshape(subs, n, LANES)
    starts, codes = float_tile(subs), byte_tile(n)
    scales, sub_x, sub_w = np.empty(subs, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    room = (
        np.empty(n, np.float32),
        np.empty(groups, np.int32),
        np.empty(groups, np.bool_),
        np.empty(groups, np.bool_),
        np.empty(32, np.float32),
    )
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        if len(importance) == 0:
            _weigh_plain(x, search.factor, search.floor, weights)
        else:
            weigh(x, importance, first, search.factor, weights)
        for lane in range(min(LANES, len(blocks) - first)):
            for k in range(32):
                out_signs[first + lane, k] = _take_signs(x, weights, lane, 8 * k, search.parity)
        if search.first_fit:
            for j in range(subs):
                positive(x_subs[j], weight_subs[j], search.top + 2, codes, starts[j])
        for lane in range(min(LANES, len(blocks) - first)):
            block = first + lane
            for j in range(subs):
                largest = _column(x, lane, n * j, sub_x)
                _column(weights, lane, n * j, sub_w)
                points = out_points[block, groups * j : groups * j + groups]
                signs = out_signs[block, octets * j : octets * j + octets]
                start = starts[j, lane]
                scales[j] = _sub_block(grid, search, sub_x, sub_w, start, largest, points, signs, room)
            out_scales[block] = 0
            d = round_scales(scales, np.float32(31), 15, out_scales[block])
            if d == ZERO and search.parity:
                out_points[block] = 0
                out_signs[block] = 0
            out_d[block] = half(d * search.fudge)
