"""A quantized matrix whose scales can be moved: what d and dmin of its blocks stand for, and new bytes.

A weight is linear in both, whatever else the type has: d times what stands there with d = 1, less dmin times
another such number. So the parts are found by decoding twice, once with every dmin at zero.
"""

from dataclasses import dataclass, replace

import torch

from quantize.codecs.bits import half_bytes
from quantize.codecs.fields import FieldCodec, Fields


@dataclass(frozen=True)
class Ratios:
    """What a matrix's d and dmin are multiplied with, f32 (N, blocks) each."""

    d: torch.Tensor
    dmin: torch.Tensor | None

    def all(self) -> list[torch.Tensor]:
        """Return those that there are."""
        return [self.d] if self.dmin is None else [self.d, self.dmin]


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix as it is stored: `blocks` uint8 (N, row_bytes) of a type with a `d`."""

    kind: FieldCodec
    blocks: torch.Tensor
    n_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and blocks of each."""
        return len(self.blocks), self.n_columns // self.kind.block_size

    @property
    def based(self) -> bool:
        """Whether the type has a dmin."""
        return bool(self.kind.unpack(self.blocks[:1].reshape(-1, self.kind.block_bytes)).dmin.numel())

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what d and what dmin stand for, f32 (N, blocks, block_size) each; the second may be none."""
        fields = self.kind.unpack(self.blocks.reshape(-1, self.kind.block_bytes))
        shape, whole = (*self.shape, self.kind.block_size), self.kind.value(fields)
        if not fields.dmin.numel():
            return whole.reshape(shape), None
        scaled = self.kind.value(replace(fields, dmin=torch.zeros_like(fields.dmin)))
        return scaled.reshape(shape), (whole - scaled).reshape(shape)

    def moved(self, ratios: Ratios) -> torch.Tensor:
        """Return the blocks, uint8 (N, row_bytes), with d and dmin multiplied by their ratios."""
        blocks = self.blocks.reshape(-1, self.kind.block_bytes).clone()
        fields = self.kind.unpack(blocks)
        blocks[:, _place(self.kind, fields, "d")] = half_bytes(fields.d * ratios.d.flatten())
        if ratios.dmin is not None:
            blocks[:, _place(self.kind, fields, "dmin")] = half_bytes(fields.dmin * ratios.dmin.flatten())
        return blocks.reshape(self.blocks.shape)


def _place(kind: FieldCodec, fields: Fields, name: str) -> torch.Tensor:
    """Return where d or dmin lies in a block, int64 (2,): the bytes that differ where nothing else does."""
    first = {key: value[:1] for key, value in vars(fields).items()}
    # Two halves, 0x3c00 and 0xc3ff, that have neither byte in common.
    one, other = (kind.pack(Fields(**first | {name: torch.tensor([x])})) for x in (1.0, -3.998046875))
    return (one[0] != other[0]).nonzero()[:, 0]
