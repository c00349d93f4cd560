"""What ggml's blocks can hold: the grids that their fields allow, and the fields of a grid.

Every type that is rounded here writes a weight as d * step * (level - middle) - dmin * drop, with d and dmin
in half precision, an integer `step` and `drop` for each sub-block, and levels shared by all:

| type             | sub-block | levels         | middle   | step       | drop   |
|------------------|-----------|----------------|----------|------------|--------|
| Q2_K             | 16 of 256 | 0..3           |          | 0..15      | 0..15  |
| Q3_K             | 16 of 256 | 0..7           | 4        | -32..31    |        |
| Q4_K, Q5_K       | 32 of 256 | 0..15, 0..31   |          | 0..63      | 0..63  |
| Q6_K             | 16 of 256 | 0..63          | 32       | -128..127  |        |
| IQ4_XS           | 32 of 256 | sixteen uneven |          | -32..31    |        |
| Q4_0, Q5_0, Q8_0 | 32        | 0..15/31/254   | 8/16/127 | always 1   |        |
| Q4_1, Q5_1       | 32        | 0..15, 0..31   |          | always 1   | -1     |
| IQ4_NL           | 32        | sixteen uneven |          | always 1   |        |

In the last three rows d, and the base m of Q4_1 and Q5_1, stand alone. Products and sums are those of the
decoders, in their order, so that a grid's values are what is decoded, bit for bit: d * step has at most 18
bits, and a level's multiple of it, the middle taken off, still fits in float32's 24.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantize.codecs.base import Codec
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.legacy import Q8_0
from quantize.codecs.native.iq4 import VALUES
from quantize.solver import gpu
from quantize.solver.grid import Grid


@dataclass(frozen=True)
class BlockShape:
    """What a type's blocks allow.

    `sub` weights share a scale; there are `n_levels`, 0, 1, 2, ..., or the uneven ones of IQ4. `steps` are
    the smallest and largest integer scale, None where d stands alone; `drop` is the largest integer minimum,
    0 where there is none. `based` says whether a sub-block has a base of its own.
    """

    sub: int
    n_levels: int
    middle: int = 0
    steps: tuple[int, int] | None = None
    drop: int = 0
    based: bool = False
    uneven: bool = False

    def levels(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the levels, f32 (L,), ascending, on a device; None: the CPU."""
        if self.uneven:
            return torch.from_numpy(VALUES).to(device or "cpu")
        return torch.arange(float(self.n_levels), device=device or "cpu")


SHAPES: Mapping[str, BlockShape] = {
    "Q2_K": BlockShape(16, 4, steps=(0, 15), drop=15, based=True),
    "Q3_K": BlockShape(16, 8, middle=4, steps=(-32, 31)),
    "Q4_K": BlockShape(32, 16, steps=(0, 63), drop=63, based=True),
    "Q5_K": BlockShape(32, 32, steps=(0, 63), drop=63, based=True),
    "Q6_K": BlockShape(16, 64, middle=32, steps=(-128, 127)),
    "IQ4_XS": BlockShape(32, 16, steps=(-32, 31), uneven=True),
    "IQ4_NL": BlockShape(32, 16, uneven=True),
    "Q4_0": BlockShape(32, 16, middle=8),
    "Q4_1": BlockShape(32, 16, based=True),
    "Q5_0": BlockShape(32, 32, middle=16),
    "Q5_1": BlockShape(32, 32, based=True),
    "Q8_0": BlockShape(32, 255, middle=127),
}


@dataclass(frozen=True)
class BlockScales:
    """The scales of rows whose K columns are B blocks, or G sub-blocks.

    d and dmin are f32 (N, B), numbers of half precision; steps and drops f32 (N, G), integers. Where a type
    has no dmin, it is zero; the base m of Q4_1 and Q5_1 is -dmin, with drops of 1.
    """

    shape: BlockShape
    d: torch.Tensor
    dmin: torch.Tensor
    steps: torch.Tensor
    drops: torch.Tensor

    def units(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d and dmin of each sub-block, f32 (N, G)."""
        times = self.steps.shape[1] // self.d.shape[1]
        return self.d.repeat_interleave(times, 1), self.dmin.repeat_interleave(times, 1)

    def grid(self) -> Grid:
        """Return the grid of these scales."""
        unit, drop_unit = self.units()
        scale = unit * self.steps
        base = -(drop_unit * self.drops) if self.shape.based else -self.shape.middle * scale
        group = torch.arange(scale.shape[1] * self.shape.sub, device=scale.device) // self.shape.sub
        levels = self.shape.levels(scale.device)
        return Grid(scale, base, group, levels, uniform=not self.shape.uneven)


def join(parts: list[BlockScales]) -> BlockScales:
    """Return the scales of rows that are cut into parts, side by side."""
    fields = zip(*((part.d, part.dmin, part.steps, part.drops) for part in parts), strict=True)
    return BlockScales(parts[0].shape, *(torch.cat(field, 1) for field in fields))


def searched_scales(kind: Codec, W: torch.Tensor, importance: torch.Tensor | None) -> BlockScales:
    """Return the scales that the type's own search finds for W, f32 (N, K), weighed by importances (K,)."""
    shape, n = SHAPES[kind.name], len(W)
    if not isinstance(kind, FieldCodec):  # Q8_0 alone: its scale needs no search
        largest = W.reshape(n, -1, shape.sub).abs().amax(2)
        return _alone(shape, largest / shape.middle, torch.zeros_like(largest))
    if gpu.takes(W.device) and importance is not None:
        from quantize.solver.gpu.type_search import search_type

        d, dmin, *integers = search_type(kind.name, shape, W, importance)
        return BlockScales(shape, _half(d), _half(dmin), *(part.contiguous() for part in integers))
    fields = kind.search(W, importance)
    d = _half(fields.d).reshape(n, -1)
    if shape.steps is None:
        return _alone(shape, d, -_half(fields.dmin).reshape(n, -1) if shape.based else torch.zeros_like(d))
    steps = fields.scales.float().reshape(n, -1)
    if not shape.based:
        return BlockScales(shape, d, torch.zeros_like(d), steps, torch.zeros_like(steps))
    return BlockScales(shape, d, _half(fields.dmin).reshape(n, -1), steps, fields.mins.float().reshape(n, -1))


def packed(kind: Codec, codes: torch.Tensor, scales: BlockScales) -> torch.Tensor:
    """Return the blocks, uint8 (N, row_bytes), of codes uint8 (N, K) on the grid of the scales."""
    n, shape = len(codes), scales.shape
    codes, d = codes.reshape(-1, kind.block_size), scales.d.reshape(-1)
    if isinstance(kind, Q8_0):
        return kind.pack(Fields(d, (codes.to(torch.int16) - shape.middle).to(torch.int8))).reshape(n, -1)
    assert isinstance(kind, FieldCodec)
    dmin = scales.dmin.reshape(-1)
    if shape.steps is None:
        return kind.pack(Fields(d, codes, dmin=-dmin)).reshape(n, -1)
    whole = torch.int8 if shape.steps[0] < 0 else torch.uint8
    steps, drops = (part.to(whole).reshape(len(codes), -1) for part in (scales.steps, scales.drops))
    return kind.pack(Fields(d, codes, steps, dmin, drops)).reshape(n, -1)


def _alone(shape: BlockShape, d: torch.Tensor, dmin: torch.Tensor) -> BlockScales:
    ones = torch.ones_like(d)
    return BlockScales(shape, _half(d), _half(dmin), ones, ones if shape.based else torch.zeros_like(d))


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-65504.0, 65504.0).half().float()
