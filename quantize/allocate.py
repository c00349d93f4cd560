"""A budget of bits, shared out among matrices: one option for each, the least loss in all.

Every matrix has options of so many bits and so much predicted loss. To pick one each, with the sum of bits
within the budget and the sum of losses least, is the multiple-choice knapsack; its continuous relaxation is
simple: of each matrix the options on the lower convex hull, and steps along the hulls taken in the order of
loss saved per bit. That gives a first choice, and, for any matrices and any bits, a lower bound of the loss.

Then matrices are added one by one, and of all choices for those so far only those survive that no other beats
in both bits and loss, and whose loss with the bound of the matrices to come is not above what has been found.
Mostly few survive and the result is exact; if more than `MOST` do, they are thinned along their bits, and the
result says what bound it was not proven to reach.

Nothing here knows a format: EXL2's layouts and GGUF's quant types are allocated alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quantize.errors import PlanError

MOST = 4000
"""Partial choices that are kept."""
_SLACK = 1e-12
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Option(NamedTuple):
    """What a matrix can be stored as: `bits` in all, and the predicted `loss` of it."""

    bits: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """`choice` has the number of each matrix's option; `bits` and `loss` are their sums.

    No choice within the budget has a smaller loss than `bound`; `exact` says that this is the best of all.
    """

    choice: tuple[int, ...]
    bits: int
    loss: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class _Relaxation:
    """Hull steps of all matrices in the order of loss saved per bit; `base` is the cheapest of all."""

    owner: Integers
    option: Integers
    bits: Integers
    loss: Floats

    def of_the_rest(self, first: int) -> tuple[Floats, Floats]:
        """Return bits and loss, ascending and falling, that the matrices from `first` on add at best."""
        rest = self.owner >= first
        return np.cumsum(np.append(0.0, self.bits[rest])), np.cumsum(np.append(0.0, self.loss[rest]))


def allocate(options: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Return the choice of one option for each matrix with the least loss, of `budget` bits at the most.

    Bits that would save nothing are not spent. Raises PlanError, with all reasons, if the cheapest options
    are above the budget, a matrix has no option or a loss is not a number.
    """
    _check(options, budget)
    kept = [_undominated(each) for each in options]
    relaxation = _relaxation(options, kept)
    start = [each[0] for each in kept]
    bound = _bound(options, start, relaxation, budget)
    best = _fill(options, kept, _along_the_hulls(options, start, relaxation, budget), budget)
    found, exact = _search(options, kept, relaxation, budget, _loss(options, best))
    choice = tuple(best if found is None else found)
    loss = _loss(options, choice)
    return Allocation(choice, _bits(options, choice), loss, loss if exact else min(bound, loss), exact)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Return the options, by rising bits, that save loss over every cheaper one."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].bits, options[i].loss)):
        if not kept or options[i].loss < options[kept[-1]].loss:
            kept.append(i)
    return kept


def _hull(options: Sequence[Option], kept: Sequence[int]) -> list[int]:
    """Return those on the lower convex hull: each step saves less loss per bit than the one before."""
    hull: list[int] = []
    for i in kept:
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _rate(options: Sequence[Option], before: int, after: int) -> float:
    return (options[before].loss - options[after].loss) / (options[after].bits - options[before].bits)


def _relaxation(options: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]]) -> _Relaxation:
    steps = []
    for owner, (each, some) in enumerate(zip(options, kept, strict=True)):
        hull = _hull(each, some)
        for before, after in pairwise(hull):
            bits, loss = each[after].bits - each[before].bits, each[after].loss - each[before].loss
            steps.append((-_rate(each, before, after), owner, after, bits, loss))
    steps.sort(key=lambda step: step[:2])
    columns = list(zip(*steps, strict=True)) if steps else [(), (), (), (), ()]
    whole = [np.array(column, np.int64) for column in columns[1:4]]
    return _Relaxation(whole[0], whole[1], whole[2], np.array(columns[4], np.float64))


def _bound(
    options: Sequence[Sequence[Option]], start: Sequence[int], relaxation: _Relaxation, budget: int
) -> float:
    bits, loss = relaxation.of_the_rest(0)
    return _loss(options, start) + float(np.interp(budget - _bits(options, start), bits, loss))


def _along_the_hulls(
    options: Sequence[Sequence[Option]], start: Sequence[int], relaxation: _Relaxation, budget: int
) -> list[int]:
    """Return the choice after as many hull steps as fit, best first."""
    choice, left = list(start), budget - _bits(options, start)
    for owner, option, bits in zip(relaxation.owner, relaxation.option, relaxation.bits, strict=True):
        if bits > left:
            break
        choice[owner], left = int(option), left - int(bits)
    return choice


def _fill(
    options: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], choice: list[int], budget: int
) -> list[int]:
    """Spend what is left: again and again the one change of one matrix that fits and saves the most."""
    left = budget - _bits(options, choice)
    while True:
        saved, owner, option = 0.0, -1, -1
        for i, some in enumerate(kept):
            now = options[i][choice[i]]
            for other in some:
                gain = now.loss - options[i][other].loss
                if options[i][other].bits - now.bits <= left and gain > saved:
                    saved, owner, option = gain, i, other
        if owner < 0:
            return choice
        left -= options[owner][option].bits - options[owner][choice[owner]].bits
        choice[owner] = option


def _search(
    options: Sequence[Sequence[Option]],
    kept: Sequence[Sequence[int]],
    relaxation: _Relaxation,
    budget: int,
    found: float,
) -> tuple[list[int] | None, bool]:
    """Return the best choice with no more loss than `found`, or None, and whether nothing was thinned."""
    # Bits and losses are counted above the cheapest options.
    base_loss = sum(each[some[0]].loss for each, some in zip(options, kept, strict=True))
    left = budget - sum(each[some[0]].bits for each, some in zip(options, kept, strict=True))
    limit = found - base_loss + _SLACK * abs(found)
    bits, loss, exact = np.zeros(1, np.int64), np.zeros(1), True
    trail: list[tuple[Integers, Integers]] = []
    for i, some in enumerate(kept):
        extra = np.array([options[i][j].bits - options[i][some[0]].bits for j in some], np.int64)
        saved = np.array([options[i][j].loss - options[i][some[0]].loss for j in some])
        bits, loss = (bits[:, None] + extra).ravel(), (loss[:, None] + saved).ravel()
        rest_bits, rest_loss = relaxation.of_the_rest(i + 1)
        hopeful = np.flatnonzero(
            (bits <= left) & (loss + np.interp(left - bits, rest_bits, rest_loss) <= limit)
        )
        survivors = hopeful[_front(bits[hopeful], loss[hopeful])]
        if len(survivors) > MOST:
            exact = False
            survivors = survivors[_thinned(bits[survivors])]
        if not len(survivors):
            return None, exact
        trail.append((survivors // len(some), survivors % len(some)))
        bits, loss = bits[survivors], loss[survivors]
    at, choice = int(loss.argmin()), []
    for (parents, taken), some in zip(reversed(trail), reversed(kept), strict=True):
        choice.append(some[int(taken[at])])
        at = int(parents[at])
    choice.reverse()
    return (choice if _loss(options, choice) <= found else None), exact


def _front(bits: Integers, loss: Floats) -> Integers:
    """Return which are not beaten by one of no more bits, by rising bits."""
    order = np.lexsort((loss, bits))
    lowest = np.minimum.accumulate(loss[order])
    first = np.ones(len(order), bool)
    first[1:] = loss[order][1:] < lowest[:-1]
    return order[first]


def _thinned(bits: Integers) -> Integers:
    """Return `MOST` at the most of a front: of each stretch of bits the last, which has the least loss."""
    stretch = (bits - bits[0]) * (MOST - 1) // max(int(bits[-1] - bits[0]), 1)
    return np.flatnonzero(np.append(stretch[1:] != stretch[:-1], True))


def _bits(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> int:
    return sum(each[i].bits for each, i in zip(options, choice, strict=True))


def _loss(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return math.fsum(each[i].loss for each, i in zip(options, choice, strict=True))


def _check(options: Sequence[Sequence[Option]], budget: int) -> None:
    reasons = []
    for i, each in enumerate(options):
        if not each:
            reasons.append(f"matrix {i} has no option")
        reasons += [
            f"matrix {i}, option {j}: a loss of {option.loss}"
            for j, option in enumerate(each)
            if not math.isfinite(option.loss)
        ]
    if not reasons:
        cheapest = sum(min(option.bits for option in each) for each in options)
        if cheapest > budget:
            reasons.append(f"the cheapest options take {cheapest} bits, the budget is {budget}")
    if reasons:
        raise PlanError("the bits cannot be shared out", reasons=reasons)
