"""Error-compensated rounding to IQ2 and IQ3, whose weights are points of a grid, eight or four together.

What quantize/solver/blocks.py says of super-blocks holds here too; inside one, a group of weights that make
one point takes a column's place: S is factored by such groups, and a group is rounded to the point that loses
least under its own part of the factor, cross terms included (point_kernels, point_round_kernels). The type's
own search on the target gives d and the integer scales; the walk tries the integers beside them; in a round
d is refitted, then each sub-block's integer, signs and points are moved to their best, all under S
(point_move_kernels).

| type    | weights a point | points | a scale for | signs        | scale of integer s  |
|---------|-----------------|--------|-------------|--------------|---------------------|
| IQ2_XXS | 8               | 256    | 32          | even, of 8   | d * (1 + 2 s) / 8   |
| IQ2_XS  | 8               | 512    | 16          | even, of 8   | d * (1 + 2 s) / 8   |
| IQ2_S   | 8               | 1024   | 16          | all          | d * (1 + 2 s) / 8   |
| IQ3_XXS | 4               | 256    | 32          | even, of 8   | d * (1 + 2 s) / 4   |
| IQ3_S   | 4               | 512    | 32          | all          | d * (1 + 2 s)       |

Integers are 0..15; products with a half d are exact in f32, so what is solved is what is decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from quantize.codecs import grids
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.native.arithmetic import Bytes, Floats
from quantize.products import linear
from quantize.solver import point_move_kernels, point_round_kernels
from quantize.solver.block_factor import BlockStep
from quantize.solver.compensate import array
from quantize.solver.point_kernels import Book

_TOP = np.float32(15)


@dataclass(frozen=True)
class PointShape:
    """What a type's blocks allow: `sub` weights share an integer scale, whose 0 stands for `unit` * d.

    `parity` says whether the signs of eight weights are even in number.
    """

    sub: int
    unit: float
    parity: bool


POINT_SHAPES: Mapping[str, PointShape] = {
    "IQ2_XXS": PointShape(32, 0.125, True),
    "IQ2_XS": PointShape(16, 0.125, True),
    "IQ2_S": PointShape(16, 0.125, False),
    "IQ3_XXS": PointShape(32, 0.25, True),
    "IQ3_S": PointShape(32, 1.0, False),
}


@dataclass
class PointPart:
    """A super-block's columns of some rows: the fields of the type's layout, all signs given.

    `d` is f32 (N,), numbers of half precision, `steps` f32 (N, G), `points` int16 (N, 256 / n) and `signs`
    uint8 (N, 32).
    """

    kind: FieldCodec
    d: torch.Tensor
    steps: torch.Tensor
    points: torch.Tensor
    signs: torch.Tensor

    @property
    def shape(self) -> PointShape:
        """What the type allows."""
        return POINT_SHAPES[self.kind.name]

    @property
    def width(self) -> int:
        """How many weights make a point."""
        return 256 // self.points.shape[1]

    def arrays(self) -> tuple[Floats, Floats, Any, Bytes]:
        """Return the scales of integer 0, then integers, points and signs, whose changes are kept."""
        scale = array(self.d * self.shape.unit)
        return scale, self.steps.numpy(), self.points.numpy(), self.signs.numpy()

    def fields(self) -> Fields:
        """Return what the layout holds."""
        return Fields(self.d, self.points, self.steps.to(torch.uint8), signs=self.signs)

    def blocks(self) -> torch.Tensor:
        """Return the block of each row, uint8 (N, block_bytes)."""
        stored = self.signs & 127 if self.shape.parity else self.signs
        return self.kind.pack(replace(self.fields(), signs=stored))

    def values(self) -> torch.Tensor:
        """Return the weights, f32 (N, 256), as they are decoded."""
        return self.kind.value(self.fields())

    def misses(self, W: torch.Tensor) -> torch.Tensor:
        """Return W - Ŵ, f32 (N, 256)."""
        return W - self.values()

    def improve(self, gradient: torch.Tensor, H: torch.Tensor, rounds: int) -> None:
        """Refit d to the points, then move integers, signs and points to their best, `rounds` times.

        `gradient` f32 (N, 256) is (W - Ŵ) H, and is lost; H is f32 (256, 256).
        """
        inside = tuple(_diagonal(H, n).numpy() for n in (self.shape.sub, 8, self.width))
        moves = torch.empty_like(gradient)
        for k in range(rounds):
            gradient -= self.refit(gradient, H)
            point_move_kernels.move_points(
                array(gradient), array(H), inside, book(self.kind.name),
                self.shape.parity, _TOP, *self.arrays(), moves.numpy(),
            )  # fmt: skip
            if k + 1 < rounds:
                gradient -= linear(moves, H)

    def refit(self, gradient: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        """Move d to the half that is best for the points and integers; return what it adds to Ŵ H.

        `gradient` f32 (N, 256) is (W - Ŵ) H.
        """
        values = self.values()
        product = linear(values, H)
        slope, curve = (values * gradient).sum(1), (values * product).sum(1)
        wanted = self.d * (1 + torch.where(curve > 0, slope / curve, 0.0))
        new = wanted.clamp(-65504.0, 65504.0).half().float()
        change = torch.where(self.d != 0, new / self.d - 1, 0.0)
        helps = change * (2 * slope - change * curve) > 0
        self.d = torch.where(helps, new, self.d)
        return torch.where(helps, change, 0.0)[:, None] * product


@cache
def book(name: str) -> Book:
    """Return the points of a type, sorted for a search."""
    codes = grids.levels(name).astype(np.int64)
    values, half = np.unique(grids.values(name)), codes.shape[1] // 2
    digits = len(values) ** np.arange(half)[::-1]
    halves = np.arange(len(values) ** half)[:, None] // digits % len(values)
    changed = np.argmax(np.diff(halves, axis=0, prepend=-1) != 0, axis=1)
    front, back = codes[:, :half] @ digits, codes[:, half:] @ digits
    found = [np.flatnonzero(front == at) for at in range(len(halves))]
    # In fours: what is missing is the last one again.
    padded = [
        np.pad(members, (0, -len(members) % 4), "edge") if len(members) else members for members in found
    ]
    first = np.cumsum([0, *map(len, padded)])
    number = np.concatenate(padded)
    tails = values[halves[back[number]]]
    return Book(
        values, halves, changed, first, back[number], tails, number.astype(np.float32), grids.values(name)
    )


def solve_points(
    kind: FieldCodec, goal: torch.Tensor, importance: torch.Tensor, step: BlockStep, tries: int
) -> PointPart:
    """Round the columns of a super-block, f32 (N, 256), to a small loss under S.

    `importance` f32 (256,) is what the type's own search goes by, `tries` the number of integer scales tried
    beside each other for every sub-block.
    """
    found, n = kind.search(goal, importance), len(goal)
    part = PointPart(
        kind,
        found.d.clamp(-65504.0, 65504.0).half().float(),
        found.scales.float().reshape(n, -1).contiguous(),
        torch.empty_like(found.codes.reshape(n, -1)),
        torch.empty(n, 32, dtype=torch.uint8),
    )
    factor = step.by_points(part.shape.sub, part.width)
    point_round_kernels.round_points(
        array(goal), factor.order.numpy(), factor.feedback.numpy(), factor.conditional.numpy(),
        book(kind.name), part.shape.parity, _beside(tries), _TOP, *part.arrays(),
    )  # fmt: skip
    return part


def _beside(tries: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return what each try adds to an integer scale: 0, -1, 1, -2, 2, ..."""
    return np.array([(k + 1) // 2 * (-1) ** k for k in range(tries)], np.float32)


def _diagonal(H: torch.Tensor, n: int) -> torch.Tensor:
    """Return the blocks of n columns on the diagonal, f32 (K / n, n, n)."""
    groups = torch.arange(len(H)).reshape(-1, n)
    return H[groups[:, :, None], groups[:, None, :]].contiguous()
