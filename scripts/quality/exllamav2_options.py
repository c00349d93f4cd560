"""Among what ExLlamaV2's converter chooses, and how: a table of options a module, and simulated annealing.

Source of the facts: exllamav2 0.3.2, `conversion/qparams.py`, `conversion/optimize.py` and its extension's
`sim_anneal`. Every attention and every MLP is a slot with one option of its table, in which all its linears
get their layouts together. What is minimised is the sum of error^norm over slots, within a budget of bits:

    80 runs with norms from 1.5 to 3.5, 80 more within 0.075 of the norm whose solution had the least
    largest error, 80 with the best norm of both, of which that with the least sum is kept; then slots are
    moved to the option after theirs, in turn, as long as the budget allows it

A run starts from every slot's first option; a slot and an option are drawn, a move that fits the budget is
taken if it is better, else with the chance e^(-change / temperature). Theirs is seeded by the system, here by
the number of the run: the same measurement gives the same choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize.codecs.native.arithmetic import Floats
from quantize.codecs.native.compiled import native
from quantize.layouts import Layout, layout

Option = Mapping[str, Layout]
"""A layout for each linear of a module, by its name within the block."""

RUNS, NORMS, SECOND = 80, (1.5, 3.5), 0.15
HOTTEST, COLDEST, COOLING, MOVES = 2.0, 1e-4, 0.995, 1000


@dataclass(frozen=True)
class Way:
    """An option as it was measured: the bits of its linears, and 1 - accuracy of the module."""

    bits: int
    error: float


@dataclass(frozen=True)
class Annealed:
    """What one run ends with: an option's number for each slot, the sum of error^norm, the largest error."""

    choice: tuple[int, ...]
    total: float
    largest: float


def _two(high: int, low: int, size: int, share: float = 0.1) -> Layout:
    return layout((high, size, share), (low, size, 1 - share))


def _one(bits: int, size: int) -> Layout:
    return layout((bits, size, 1.0))


def _down(size: int, *parts: tuple[int, float]) -> Layout:
    return layout((8, 32, 0.05), *((bits, size, share) for bits, share in parts))


def _attention(q: Layout, v: Layout | None = None, o: Layout | None = None) -> Option:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {f"self_attn.{name}": each for name, each in zip(names, (q, q, v or q, o or q), strict=True)}


def _mlp(gate: Layout, up: Layout, down: Layout) -> Option:
    return {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}


_LEAST_DOWN = layout((6, 32, 0.05), (3, 64, 0.2), (2, 64, 0.75))

OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "self_attn": (
        _attention(_two(3, 2, 64, 0.05)),
        _attention(_two(3, 2, 64), _two(3, 2, 64, 0.25)),
        _attention(_two(3, 2, 64), _two(4, 3, 128)),
        _attention(_two(3, 2, 64), _two(4, 3, 128), _two(4, 3, 128)),
        _attention(_two(4, 3, 128)),
        _attention(_two(4, 3, 128), _two(4, 3, 64)),
        _attention(_one(4, 128)),
        _attention(_one(4, 128), _one(4, 64)),
        _attention(_one(4, 64), _one(4, 32)),
        _attention(_one(4, 32)),
        _attention(_two(5, 4, 128), _two(5, 4, 64)),
        _attention(_two(5, 4, 64), _two(5, 4, 32)),
        _attention(_two(5, 4, 64), _one(5, 64)),
        _attention(_two(5, 4, 32), _one(5, 32)),
        _attention(_two(6, 5, 128), _one(6, 128)),
        _attention(_two(6, 5, 32), _one(6, 32)),
        _attention(_one(6, 128)),
        _attention(_one(6, 32), _one(8, 32)),
        _attention(_one(8, 128)),
    ),
    "mlp": (
        _mlp(_two(3, 2, 64, 0.05), _two(3, 2, 64, 0.05), _LEAST_DOWN),
        _mlp(_two(3, 2, 64), _two(3, 2, 64, 0.25), _LEAST_DOWN),
        _mlp(_two(3, 2, 64), _two(3, 2, 64, 0.3), _two(5, 3, 32, 0.05)),
        _mlp(_two(3, 2, 64), _two(3, 2, 64, 0.3), _two(5, 4, 32, 0.05)),
        _mlp(_two(4, 3, 128), _two(4, 3, 128, 0.25), _down(128, (4, 0.1), (3, 0.85))),
        _mlp(_two(4, 3, 32), _two(4, 3, 32, 0.25), _down(32, (4, 0.1), (3, 0.85))),
        _mlp(_two(4, 3, 32), _two(4, 3, 32, 0.25), _down(128, (4, 0.95))),
        _mlp(_one(4, 128), _one(4, 32), _down(128, (4, 0.95))),
        _mlp(_one(4, 32), _one(4, 32), _down(32, (4, 0.95))),
        _mlp(_two(5, 4, 128), _two(5, 4, 128, 0.25), _down(128, (5, 0.1), (4, 0.85))),
        _mlp(_two(5, 4, 32), _two(5, 4, 32, 0.25), _down(32, (5, 0.1), (4, 0.85))),
        _mlp(_two(6, 5, 128), _two(6, 5, 128, 0.25), _down(128, (6, 0.1), (5, 0.85))),
        _mlp(_two(6, 5, 32), _two(6, 5, 32, 0.25), _down(32, (6, 0.1), (5, 0.85))),
        _mlp(_one(6, 128), _one(6, 128), _down(128, (6, 0.95))),
        _mlp(_two(8, 6, 128), _two(8, 6, 128), _two(8, 6, 128, 0.15)),
        _mlp(_two(8, 6, 128), _two(8, 6, 128), _one(8, 128)),
        _mlp(_one(8, 128), _one(8, 128), _one(8, 128)),
    ),
}
"""The converter's options for each module, poorest first."""


def choose(slots: Sequence[Sequence[Way]], budget: int) -> tuple[int, ...]:
    """Return each slot's option within `budget` bits; ValueError if the first options are above it."""
    if sum(slot[0].bits for slot in slots) > budget:
        raise ValueError(f"a budget of {budget} bits is less than the first options take")
    (low, high), largest, norm, run = NORMS, float("inf"), NORMS[0], 0
    for _ in range(2):
        for each in np.linspace(low, high, RUNS):
            found = anneal(slots, budget, float(each), run)
            if found.largest < largest:
                largest, norm = found.largest, float(each)
            run += 1
        low, high = norm - SECOND / 2, norm + SECOND / 2
    runs = [anneal(slots, budget, norm, number) for number in range(run, run + RUNS)]
    return spend(slots, budget, min(runs, key=lambda each: each.total).choice)


def spend(slots: Sequence[Sequence[Way]], budget: int, choice: Sequence[int]) -> tuple[int, ...]:
    """Return the choice with slots moved to their next options, in turn, while that fits the budget."""
    found, moved = list(choice), True
    left = budget - sum(slot[i].bits for slot, i in zip(slots, found, strict=True))
    while moved:
        moved = False
        for number, slot in enumerate(slots):
            if found[number] < len(slot) - 1:
                more = slot[found[number] + 1].bits - slot[found[number]].bits
                if more <= left:
                    found[number], left, moved = found[number] + 1, left - more, True
    return tuple(found)


def anneal(slots: Sequence[Sequence[Way]], budget: int, norm: float, seed: int) -> Annealed:
    """Do one run."""
    most = max(map(len, slots))
    bits, powers = np.zeros((len(slots), most), np.int64), np.zeros((len(slots), most), np.float32)
    for number, slot in enumerate(slots):
        bits[number, : len(slot)] = [way.bits for way in slot]
        powers[number, : len(slot)] = np.array([way.error for way in slot], np.float32) ** np.float32(norm)
    counts, choice = np.array([len(slot) for slot in slots]), np.zeros(len(slots), np.int64)
    total = _anneal(bits, powers, counts, budget, seed, choice)
    chosen = tuple(choice.tolist())
    return Annealed(chosen, float(total), max(slot[i].error for slot, i in zip(slots, chosen, strict=True)))


@native
def _anneal(bits: Any, powers: Floats, counts: Any, budget: int, seed: int, choice: Any) -> Any:
    """Move `choice`, int64 (slots,), from all zeros; return the sum of its powers."""
    np.random.seed(seed)
    cost, total = np.int64(0), np.float32(0)
    for i in range(len(counts)):
        cost += bits[i, 0]
        total += powers[i, 0]
    temperature = np.float32(HOTTEST)
    for _ in range(int(np.log(COLDEST / HOTTEST) / np.log(COOLING))):
        for _ in range(MOVES):
            i = np.random.randint(0, len(counts))
            n = np.random.randint(0, counts[i])
            change = powers[i, n] - powers[i, choice[i]]
            more = bits[i, n] - bits[i, choice[i]]
            if cost + more <= budget and (
                change < 0 or np.random.random() < np.exp(-np.float64(change) / temperature)
            ):
                choice[i], cost = n, cost + more
                total += change
        temperature *= np.float32(COOLING)
    return total
