"""EXL2's layouts: which share of a linear's inputs is stored in how many bits, in groups of what size.

A layout is a short list, widest codes first: "the most important tenth of the inputs in 5 bits, groups of 64,
the rest in 4 bits". On K inputs it becomes groups: each part takes as many whole groups as its share needs,
so a part can take a little more than its share, and the last group of all may be short.

The layouts that are tried are those among which ExLlamaV2's converter chooses (0.3.2, `qparams.py`): it
joins them to options for a whole attention or MLP, here each linear chooses for itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.codecs.exl2 import Group


@dataclass(frozen=True)
class Part:
    """A `share` of the inputs, in 0..1, in groups of `group_size` inputs and codes of `bits` bits."""

    bits: int
    group_size: int
    share: float


@dataclass(frozen=True)
class Layout:
    """Parts from the most important inputs to the least; the last takes all that is left."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """As text: "5b64:0.1 4b64:0.9"."""
        return " ".join(f"{part.bits}b{part.group_size}:{part.share:g}" for part in self.parts)

    def groups(self, n_inputs: int) -> tuple[Group, ...]:
        """Return the groups of K inputs; `quantize.codecs.exl2.group_faults` knows what K can be held."""
        groups: list[Group] = []
        for part, width in zip(self.parts, self.widths(n_inputs), strict=True):
            starts = range(0, width, part.group_size)
            groups += [Group(part.bits, min(part.group_size, width - start)) for start in starts]
        return tuple(groups)

    def widths(self, n_inputs: int) -> tuple[int, ...]:
        """Return how many of K inputs each part takes: whole groups, but for the last of all."""
        widths: list[int] = []
        for part in self.parts:
            left = n_inputs - sum(widths)
            wanted = left if part is self.parts[-1] else min(n_inputs * part.share, left)
            widths.append(min(left, math.ceil(wanted / part.group_size) * part.group_size))
        return tuple(widths)

    def total_bits(self, n_outputs: int, n_inputs: int) -> int:
        """Return the bits of a linear (N, K) in the file: see `stored_bits`."""
        return stored_bits(self.groups(n_inputs), n_outputs)


def stored_bits(groups: Sequence[Group], n_outputs: int) -> int:
    """Return the bits that a linear's five tensors take: codes, scales, maxima, group table, permutation."""
    padded = n_outputs + -n_outputs % 32
    codes = sum(group.bits * group.size for group in groups) * padded
    inputs = sum(group.size for group in groups)
    return codes + len(groups) * (4 * padded + 16 + 32) + 32 * inputs


def layout(*parts: tuple[int, int, float]) -> Layout:
    """Return the layout of parts (bits, group size, share)."""
    return Layout(tuple(Part(*part) for part in parts))


def _two(high: int, low: int, size: int, share: float) -> Layout:
    return layout((high, size, share), (low, size, 1 - share))


def _one(bits: int, size: int) -> Layout:
    return layout((bits, size, 1.0))


def _down(size: int, *parts: tuple[int, float]) -> Layout:
    """Return a layout whose first 5 % are in 8 bits and groups of 32."""
    return layout((8, 32, 0.05), *((bits, size, share) for bits, share in parts))


ATTENTION = (
    *(_two(3, 2, 64, share) for share in (0.05, 0.1, 0.25)),
    *(_two(4, 3, size, 0.1) for size in (128, 64)),
    *(_one(4, size) for size in (128, 64, 32)),
    *(_two(5, 4, size, 0.1) for size in (128, 64, 32)),
    *(_one(5, size) for size in (64, 32)),
    *(_two(6, 5, size, 0.1) for size in (128, 32)),
    *(_one(6, size) for size in (128, 32)),
    *(_one(8, size) for size in (128, 32)),
)
"""For q, k, v and o."""

GATE_UP = (
    *(_two(3, 2, 64, share) for share in (0.05, 0.1, 0.25, 0.3)),
    *(_two(4, 3, size, share) for size in (128, 32) for share in (0.1, 0.25)),
    *(_one(4, size) for size in (128, 32)),
    *(_two(5, 4, size, share) for size in (128, 32) for share in (0.1, 0.25)),
    *(_two(6, 5, size, share) for size in (128, 32) for share in (0.1, 0.25)),
    _one(6, 128),
    _two(8, 6, 128, 0.1),
    _one(8, 128),
)
"""For gate and up."""

DOWN = (
    layout((6, 32, 0.05), (3, 64, 0.2), (2, 64, 0.75)),
    *(layout((5, 32, 0.05), (bits, 32, 0.95)) for bits in (3, 4)),
    *(_down(size, (4, 0.1), (3, 0.85)) for size in (128, 32)),
    *(_down(size, (4, 0.95)) for size in (128, 32)),
    *(_down(size, (5, 0.1), (4, 0.85)) for size in (128, 32)),
    *(_down(size, (6, 0.1), (5, 0.85)) for size in (128, 32)),
    _down(128, (6, 0.95)),
    _two(8, 6, 128, 0.15),
    _one(8, 128),
)
"""For down, whose few large inputs are worth wide codes in any case."""

HEAD: Mapping[int, Layout] = {
    2: _two(4, 2, 32, 0.3),
    3: _two(4, 3, 32, 0.15),
    4: _two(6, 4, 32, 0.15),
    5: _two(6, 5, 128, 0.15),
    6: _two(8, 6, 128, 0.15),
    8: _one(8, 128),
}
"""For lm_head, by the bits that are asked for."""
