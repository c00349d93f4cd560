"""IQ1_S and IQ1_M: weights of -1, 0 or 1, all shifted by an eighth up or down, eight of them a grid point.

With only three values the best split of a sub-block can be found exactly: sort the weights; every pair of
boundaries gives the groups that become -1, 0 and 1; the sums that judge a pair come from running sums. Then
groups of eight that are no point of the grid go to the best neighbour, and the scale is fitted once more.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ZERO, Floats, half
from quantize.codecs.native.compiled import native
from quantize.codecs.native.grids import nearest_member, set_terms
from quantize.codecs.native.i_quants import round_scales
from quantize.codecs.native.k_quants import weigh
from quantize.codecs.native.tiles import LANES, float_tile, load, weigh_by_square

_DELTA = np.float32(0.125)
_TINY_S = np.float32(1e-12)
_TINY_M = np.float32(1e-7)
_LOWEST = -np.float32(3.4028234663852886e38)


@native
def _order(x: Floats, order: Any) -> None:
    """Set the numbers of the weights in ascending order of the weights; equal ones keep their order."""
    for i in range(len(x)):
        j = i
        while j > 0 and x[order[j - 1]] > x[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@native
def _column(tile: Floats, lane: int, first: int, out: Floats) -> Any:
    """Copy a sub-block of a lane, and return its largest magnitude."""
    largest = ZERO
    for i in range(len(out)):
        out[i] = tile[first + i, lane]
        largest = max(largest, abs(out[i]))
    return largest


@native
def _level(code: int, delta: Any) -> Any:
    """Return what a code 0, 1, 2 stands for."""
    return np.float32(code - 1) + delta


@native
def _recode(order: Any, low: int, high: int, flip: bool, codes: Any) -> None:
    """Give 0 to the sorted weights before `low`, 1 before `high`, 2 to the rest; or the other way round."""
    for j in range(len(order)):
        code = 0 if j < low else (1 if j < high else 2)
        codes[order[j]] = 2 - code if flip else code


@native
def _snap(
    grid: Any, x: Floats, weights: Floats, codes: Any, deltas: Any, scale: Any, points: Any, room: Any
) -> Any:
    """Move every group of eight to the grid, and return the scale, fitted again if a group had to move."""
    values, table = room
    moved = False
    for k in range(len(points)):
        packed = 0
        for i in range(8):
            packed += int(codes[8 * k + i]) * 3**i
        points[k] = grid.point[packed]
        if points[k] < 0:
            moved = True
            for level in range(3):
                values[level] = _level(level, deltas[k])
            set_terms(x, weights, 8 * k, 8, scale, values, table)
            points[k] = nearest_member(grid.terms, grid.members, grid.first[packed], grid.last[packed], table)
    if not moved:
        return scale
    sum_qx, sum_qq = ZERO, ZERO
    for k in range(len(points)):
        for i in range(8):
            value = _level(grid.levels[points[k], i], deltas[k])
            weighted = weights[8 * k + i] * value
            sum_qx += weighted * x[8 * k + i]
            sum_qq += weighted * value
    return sum_qx / sum_qq if sum_qx > ZERO and sum_qq > ZERO else scale


@native
def _best_split(x: Floats, weights: Floats, order: Any, sum_x: Floats, sum_w: Floats, start: Any) -> Any:
    """Return scale, both boundaries and the shift's sign of the best split; sign 0 if there is none."""
    n = len(x)
    u0, u1, u2 = _level(0, _DELTA), _level(1, _DELTA), _level(2, _DELTA)
    d0, d1, d2 = _level(0, -_DELTA), _level(1, -_DELTA), _level(2, -_DELTA)
    sum_x[0] = sum_w[0] = ZERO
    for j in range(n):
        sum_x[j + 1] = sum_x[j] + weights[order[j]] * x[order[j]]
        sum_w[j + 1] = sum_w[j] + weights[order[j]]
    best, scale, best_low, best_high, sign = _LOWEST, start, 0, 0, 0
    for low in range(n + 1):
        head_x, head_w = sum_x[low] - sum_x[0], sum_w[low] - sum_w[0]
        for high in range(low, n + 1):
            mid_x, mid_w = sum_x[high] - sum_x[low], sum_w[high] - sum_w[low]
            tail_x, tail_w = sum_x[n] - sum_x[high], sum_w[n] - sum_w[high]
            qx = head_x * u0 + mid_x * u1 + tail_x * u2
            qq = head_w * u0 * u0 + mid_w * u1 * u1 + tail_w * u2 * u2
            if qq > ZERO and qx * qx > best * qq:
                scale = qx / qq
                best, best_low, best_high, sign = scale * qx, low, high, 1
            qx = head_x * d0 + mid_x * d1 + tail_x * d2
            qq = head_w * d0 * d0 + mid_w * d1 * d1 + tail_w * d2 * d2
            if qq > ZERO and qx * qx > best * qq:
                scale = qx / qq
                best, best_low, best_high, sign = scale * qx, low, high, -1
    return scale, best_low, best_high, sign


@native
def s_blocks(
    blocks: Floats,
    importance: Floats,
    grid: Any,
    out_d: Floats,
    out_scales: Any,
    out_points: Any,
    out_shifts: Any,
) -> None:
    """Search the blocks (B, 256) of IQ1_S: 3-bit scales, points, and 1 where a sub-block is shifted down."""
    x, weights = float_tile(256), float_tile(256)
    sum_x, sum_w = np.empty(33, np.float32), np.empty(33, np.float32)
    sub_x, sub_w, scales = np.empty(32, np.float32), np.empty(32, np.float32), np.empty(8, np.float32)
    order, codes, deltas = np.empty(32, np.int64), np.empty(32, np.int64), np.empty(4, np.float32)
    room = np.empty(3, np.float32), np.empty(24, np.float32)
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        weigh(x, importance, first, np.float32(2), weights)
        for lane in range(min(LANES, len(blocks) - first)):
            block = first + lane
            for j in range(8):
                points = out_points[block, 4 * j : 4 * j + 4]
                points[:] = 0
                out_shifts[block, j] = 0
                scales[j] = ZERO
                largest = _column(x, lane, 32 * j, sub_x)
                _column(weights, lane, 32 * j, sub_w)
                if largest < _TINY_S:
                    continue
                _order(sub_x, order)
                scale, low, high, sign = _best_split(sub_x, sub_w, order, sum_x, sum_w, largest)
                if sign == 0:
                    continue
                _recode(order, low, high, scale < ZERO, codes)
                sign = -sign if scale < ZERO else sign
                deltas[:] = _DELTA * np.float32(sign)
                scales[j] = _snap(grid, sub_x, sub_w, codes, deltas, abs(scale), points, room)
                out_shifts[block, j] = 1 if sign < 0 else 0
            out_scales[block] = 0
            d = round_scales(scales, np.float32(15), 7, out_scales[block])
            if d == ZERO:
                out_shifts[block] = 0
            out_d[block] = half(d * np.float32(1.125))


@native
def _half_sums(x: Floats, weights: Floats, order: Any, sum_x: Floats, sum_w: Floats) -> None:
    """Set running sums, in sorted order, of the weights of each half of a sub-block."""
    n = len(x)
    for side in range(2):
        sum_x[side, 0] = sum_w[side, 0] = ZERO
    for j in range(n):
        i = order[j]
        for side in range(2):
            mine = (i >= n // 2) == (side == 1)
            sum_x[side, j + 1] = sum_x[side, j] + weights[i] * x[i] if mine else sum_x[side, j]
            sum_w[side, j + 1] = sum_w[side, j] + weights[i] if mine else sum_w[side, j]


@native
def _judge(sum_x: Floats, sum_w: Floats, low: int, high: int, side: int, delta: Any) -> Any:
    """Return Σwqx and Σwq² of one half for two boundaries: the total less what they take off."""
    n = sum_x.shape[1] - 1
    q0, q1, q2 = _level(0, delta), _level(1, delta), _level(2, delta)
    qx = sum_x[side, n] * q2 - (sum_x[side, low] + sum_x[side, high])
    qq = sum_w[side, n] * q2 * q2 + sum_w[side, low] * (q0 * q0 - q1 * q1)
    return qx, qq + sum_w[side, high] * (q1 * q1 - q2 * q2)


@native
def _best_halves(sum_x: Floats, sum_w: Floats, start: Any) -> Any:
    """Return scale, boundaries and shifts (bit 1: first half down, bit 0: second; -1: no split)."""
    n = sum_x.shape[1] - 1
    best, scale, best_low, best_high, shifts = _LOWEST, start, 0, 0, -1
    for low in range(n + 1):
        for high in range(low, n + 1):
            up_x0, up_q0 = _judge(sum_x, sum_w, low, high, 0, _DELTA)
            up_x1, up_q1 = _judge(sum_x, sum_w, low, high, 1, _DELTA)
            down_x0, down_q0 = _judge(sum_x, sum_w, low, high, 0, -_DELTA)
            down_x1, down_q1 = _judge(sum_x, sum_w, low, high, 1, -_DELTA)
            for k in range(4):
                qx = (up_x0 if k < 2 else down_x0) + (up_x1 if k % 2 == 0 else down_x1)
                qq = (up_q0 if k < 2 else down_q0) + (up_q1 if k % 2 == 0 else down_q1)
                if qq > ZERO and qx * qx > best * qq:
                    scale = qx / qq
                    best = scale * qx
                    best_low, best_high, shifts = low, high, k
    return scale, best_low, best_high, shifts


@native
def _fit_block(
    grid: Any, x: Floats, weights: Floats, lane: int, scales: Any, points: Any, down: Any, d: Any
) -> Any:
    """Return the d that fits the whole block best for its scales and points; d where there is none."""
    sum_qx, sum_qq = ZERO, ZERO
    for e in range(256):
        k = e // 8
        delta = -_DELTA if down[k] else _DELTA
        value = _level(grid.levels[points[k], e % 8], delta) * np.float32(2 * int(scales[e // 16]) + 1)
        weighted = weights[e, lane] * value
        sum_qx += weighted * x[e, lane]
        sum_qq += weighted * value
    return sum_qx / sum_qq if sum_qq > ZERO else d


@native
def m_blocks(
    blocks: Floats,
    importance: Floats,
    grid: Any,
    out_d: Floats,
    out_scales: Any,
    out_points: Any,
    out_shifts: Any,
) -> None:
    """Search the blocks (B, 256) of IQ1_M: 3-bit scales, points, and 1 for eight weights shifted down."""
    x, weights = float_tile(256), float_tile(256)
    sum_x, sum_w = np.empty((2, 17), np.float32), np.empty((2, 17), np.float32)
    sub_x, sub_w, scales = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    order, codes, deltas = np.empty(16, np.int64), np.empty(16, np.int64), np.empty(2, np.float32)
    room = np.empty(3, np.float32), np.empty(24, np.float32)
    for first in range(0, len(blocks), LANES):
        load(blocks, first, x)
        if len(importance) == 0:
            weigh_by_square(x, weights)
        else:
            weigh(x, importance, first, np.float32(2), weights)
        for lane in range(min(LANES, len(blocks) - first)):
            block = first + lane
            for j in range(16):
                points = out_points[block, 2 * j : 2 * j + 2]
                points[:] = 0
                out_shifts[block, 2 * j : 2 * j + 2] = 0
                scales[j] = ZERO
                largest = _column(x, lane, 16 * j, sub_x)
                _column(weights, lane, 16 * j, sub_w)
                if largest < _TINY_M:
                    continue
                _order(sub_x, order)
                _half_sums(sub_x, sub_w, order, sum_x, sum_w)
                scale, low, high, shifts = _best_halves(sum_x, sum_w, largest)
                if shifts < 0:
                    continue
                _recode(order, low, high, scale < ZERO, codes)
                shifts = 3 - shifts if scale < ZERO else shifts
                for k in range(2):
                    down = (shifts >> (1 - k)) & 1
                    deltas[k] = -_DELTA if down else _DELTA
                    out_shifts[block, 2 * j + k] = down
                scales[j] = _snap(grid, sub_x, sub_w, codes, deltas, abs(scale), points, room)
            out_scales[block] = 0
            d = round_scales(scales, np.float32(15), 7, out_scales[block])
            if d == ZERO:
                out_shifts[block] = 0
            else:
                d = _fit_block(
                    grid, x, weights, lane, out_scales[block], out_points[block], out_shifts[block], d
                )
            out_d[block] = half(d * np.float32(1.1125))
