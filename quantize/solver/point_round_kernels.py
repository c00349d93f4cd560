"""A super-block rounded to points on the CPU, with compensation and its integer scales searched.

Sub-block follows sub-block; in each the integers beside its own are tried, and on each the groups of eight
(or four) weights follow one another: a group is rounded to the point that loses least under what the Hessian
has left for it given all groups to come, and hands its errors on. Signs are those of the targets; where seven
of eight are stored, the one turns that costs least; then signs turn once more for the point that was found.
Rows are lanes, as in quantize/solver/kernels.py.
"""

from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats
from quantize.codecs.native.compiled import fused
from quantize.codecs.native.tiles import LANES, float_tile, lanes
from quantize.solver.block_kernels import _gather_ahead, gather, invert
from quantize.solver.kernels import _load_group, _store, load
from quantize.solver.point_kernels import Book, flip, load_lanes, make_room, multiply, place, store_signs

_TWO = np.float32(2)


@fused
def _take_signs(goal: Floats, signs: Floats, odd: Floats) -> None:
    """Set the signs of goals (n, 64), and let `odd`, (64,), take their product."""
    for i in range(len(goal)):
        for lane in range(LANES):
            sign = -ONE if goal[i, lane] < ZERO else ONE
            signs[i, lane] = sign
            odd[lane] *= sign


@fused
def _cheapest(goal: Floats, A: Floats, at: int, least: Floats, place: Floats) -> None:
    """Let the weights from number `at` on compete for the sign that turns at the least cost."""
    for i in range(len(A)):
        square, number = A[i, i], np.float32(at + i)
        for lane in range(LANES):
            cost = square * goal[i, lane] * goal[i, lane]
            wins = cost < least[lane]
            least[lane] = cost if wins else least[lane]
            place[lane] = number if wins else place[lane]


@fused
def _turn(odd: Floats, place: Floats, signs: Floats) -> None:
    """Turn the sign at a place, where a product is negative: it becomes positive if the place is here."""
    for i in range(len(signs)):
        number = np.float32(i)
        for lane in range(LANES):
            turn = odd[lane] < ZERO and place[lane] == number
            signs[i, lane] = -signs[i, lane] if turn else signs[i, lane]


@fused
def _complete(
    goals: Floats, conditional: Floats, group: int, at: int, odd: Floats, signs: Floats, room: Floats
) -> None:
    """Make the signs of an octet even in number, by the cheapest of those that are still to be given.

    `goals` are those from this group of the octet on, `at` is its place in the octet, and `odd` the product
    of the signs given so far, this group's among them.
    """
    n = len(signs)
    least, place, product = room[0], room[1], room[2]
    for lane in range(LANES):
        least[lane], place[lane], product[lane] = np.float32(np.inf), -ONE, odd[lane]
    _cheapest(goals, conditional[group], 0, least, place)
    if at == 0 and n == 4:
        # What the second four hope for now; they will be given their own signs, and the last word.
        _cheapest(goals[4:], conditional[group + 1], 4, least, place)
        for i in range(4, 8):
            for lane in range(LANES):
                product[lane] *= -ONE if goals[i, lane] < ZERO else ONE
    _turn(product, place, signs)
    for lane in range(LANES):
        here = product[lane] < ZERO and place[lane] < np.float32(n)
        odd[lane] = -odd[lane] if here else odd[lane]


@fused
def _trial_step(now: Floats, offset: Any, top: Any, unit: Floats, trial: Floats) -> None:
    """Set a trial's integer, its scale and the inverse of that: the rows of `trial`."""
    for lane in range(LANES):
        step = min(max(now[lane] + offset, ZERO), top)
        trial[0, lane] = step
        trial[1, lane] = unit[lane] * (ONE + _TWO * step)
    invert(trial[1], trial[2])


@fused
def _set_goals(
    goals: Floats, errors: Floats, feedback: Floats, at: int, start: int, done: int, goal: Floats
) -> None:
    """Set an octet's goals, from its weight `done` on: those before have their points, and errors.

    It begins at `start` of its sub-block, and that `at` of the block.
    """
    for i in range(done, 8):
        row = feedback[at + start + i]
        if done == 0:
            for lane in range(LANES):
                goal[i, lane] = goals[start + i, lane]
            gather(errors, row[at:], start, goal[i])
        else:
            gather(errors[start:], row[at + start :], done, goal[i])


@fused
def _round_group(
    A: Floats, goal: Floats, parity: bool, trial: Floats, book: Book, signs: Floats, room: Any
) -> Any:
    """Find the point and signs of one group; set its signed values, times the scale. Return its number."""
    search, _, h, values, spare = room
    multiply(A, goal, h)
    for i in range(len(A)):
        for lane in range(LANES):
            h[i, lane] *= trial[2, lane]
    chosen = place(A, signs, h, book, search, values)
    flip(A, h, parity, signs, values, spare)
    for i in range(len(A)):
        for lane in range(LANES):
            values[i, lane] *= trial[1, lane]
    return chosen


@fused
def _round_sub_block(
    weight: Floats,
    goals: Floats,
    at: int,
    feedback: Floats,
    conditional: Floats,
    parity: bool,
    trial: Floats,
    book: Book,
    room: Any,
    found: Any,
    loss: Floats,
) -> None:
    """Round a sub-block, whose columns in the order begin `at`, at one scale.

    Sets in `found` its errors and its signs, (n_sub, 64), and its points (n_sub / n, 64); then the loss that
    compensation leaves.
    """
    errors, signs, points, _ = found
    _, goal, miss, values, spare = room
    n, odd = conditional.shape[1], spare[11]  # behind what `flip` takes
    for lane in range(LANES):
        loss[lane] = ZERO
    for start in range(0, len(goals), n):
        done, group = start % 8, (at + start) // n
        if done == 0:
            for lane in range(LANES):
                odd[lane] = ONE
        _set_goals(goals, errors, feedback, at, start - done, done, goal)
        own, taken, A = goal[done : done + n], signs[start : start + n], conditional[group]
        _take_signs(own, taken, odd)
        if parity:
            _complete(goal[done:], conditional, group, done, odd, taken, spare)
        points[start // n] = _round_group(A, own, parity, trial, book, taken, room)
        for i in range(n):
            for lane in range(LANES):
                errors[start + i, lane] = weight[start + i, lane] - values[i, lane]
                miss[i, lane] = own[i, lane] - values[i, lane]
        _add_loss(A, miss, spare, loss)


@fused
def _add_loss(A: Floats, miss: Floats, product: Floats, loss: Floats) -> None:
    """Add miss A miss, of (n, 64), to each lane's loss; `product` is room."""
    multiply(A, miss, product)
    for i in range(len(A)):
        for lane in range(LANES):
            loss[lane] += product[i, lane] * miss[i, lane]


@fused
def _keep_better(trial: Any, first_trial: bool, best: Any, least: Floats, loss: Floats) -> None:
    """Let each tile of a trial take the place of the best's where it lost less; the first always does."""
    for t in range(len(trial)):
        for i in range(len(trial[t])):
            row, kept = trial[t][i], best[t][i]
            for lane in range(LANES):
                wins = first_trial or loss[lane] < least[lane]
                kept[lane] = row[lane] if wins else kept[lane]
    for lane in range(LANES):
        wins = first_trial or loss[lane] < least[lane]
        least[lane] = loss[lane] if wins else least[lane]


@fused
def round_points(
    target: Floats,
    order: Any,
    feedback: Floats,
    conditional: Floats,
    book: Book,
    parity: bool,
    offsets: Floats,
    top: Any,
    unit: Floats,
    steps: Floats,
    out_points: Any,
    out_signs: Bytes,
) -> None:
    """Round the columns of a super-block (N, 256) to points and signs, at integer scales beside those given.

    `order`, `feedback` and `conditional` are those of `PointFactor`; `unit` f32 (N,) is the scale of integer
    0, `steps` f32 (N, G) are the integers, 0..top, which change; `offsets` are added to them one by one, the
    first of which is 0. Sets points, int16 (N, 256 / n), and sign bytes, (N, 32).
    """
    n, n_sub = conditional.shape[1], len(order) // steps.shape[1]
    weight, goals, own = float_tile(len(order)), float_tile(n_sub), float_tile(n_sub)
    errors, all_signs, all_points = (
        float_tile(len(order)),
        float_tile(len(order)),
        float_tile(len(order) // n),
    )
    best = float_tile(n_sub), float_tile(n_sub), float_tile(n_sub // n), float_tile(3)
    tried = float_tile(n_sub), float_tile(n_sub), float_tile(n_sub // n), float_tile(3)
    room = make_room(book), float_tile(8), float_tile(8), float_tile(8), float_tile(12)
    units, now, loss, least = lanes(), lanes(), lanes(), lanes()
    for first in range(0, len(target), LANES):
        load(target, first, weight)
        load_lanes(unit, first, units)
        for at in range(0, len(order), n_sub):
            sub = order[at] // n_sub
            _load_group(steps, first, sub, now)
            for i in range(n_sub):
                own[i] = weight[order[at + i]]
            goals[:] = own
            for i in range(0, n_sub, 8):
                _gather_ahead(errors, feedback[at + i : at + i + 8], at, goals[i : i + 8])
            for c in range(len(offsets)):
                _trial_step(now, offsets[c], top, units, tried[3])
                _round_sub_block(
                    own, goals, at, feedback, conditional, parity, tried[3], book, room, tried, loss
                )
                _keep_better(tried, c == 0, best, least, loss)
            errors[at : at + n_sub] = best[0]
            _scatter(best, order[at : at + n_sub], all_signs, all_points)
            for lane in range(min(LANES, len(steps) - first)):
                steps[first + lane, sub] = best[3][0, lane]
        _store(all_points, first, out_points)
        store_signs(all_signs, first, out_signs)


@fused
def _scatter(best: Any, columns: Any, signs: Floats, points: Floats) -> None:
    """Put a sub-block's signs and points where its columns lie."""
    n = len(signs) // len(points)
    for i in range(len(columns)):
        signs[columns[i]] = best[1][i]
        if i % n == 0:
            points[columns[i] // n] = best[2][i // n]
