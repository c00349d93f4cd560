"""The fields of a block, and the types that find them by a search.

Encoding such a type is two things that have nothing to do with each other: a search for numbers (a scale
`d` in half precision, integer scales of the sub-blocks, integer codes of the weights), and a layout that
says at which bit of the block each number lies. `Fields` is what passes between them; decoding goes back
through the layout and multiplies.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch

from quantize.codecs.base import Codec
from quantize.errors import UsageError


def on_cpu(rows: torch.Tensor) -> bool:
    """Return whether the compiled searches can reach the rows."""
    return rows.device.type == "cpu"


def _nothing() -> torch.Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Fields:
    """What B blocks say: `d` and `dmin` float32 (B,), rounded to half precision when they are packed,
    `codes` uint8 (B, block_size), `scales` and `mins` of S sub-blocks (B, S), uint8 or, where signed, int8.
    The types with a grid of points have in `codes` the points' numbers, int16, and in `signs` a byte for
    every eight weights (or what else the layout says).

    A layout that lacks a field leaves it empty.
    """

    d: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor = field(default_factory=_nothing)
    dmin: torch.Tensor = field(default_factory=_nothing)
    mins: torch.Tensor = field(default_factory=_nothing)
    signs: torch.Tensor = field(default_factory=_nothing)


class FieldCodec(Codec):
    """A type whose encoding is search and pack, and whose decoding is unpack and value."""

    uses_importance = True

    @property
    def gains_from_gpu(self) -> bool:
        """Whether the type has a search in torch operations; the other one runs on the CPU alone."""
        return type(self).search_tensors is not FieldCodec.search_tensors

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the packed fields that the search finds, on the device of the rows."""
        weights = self._importance(rows, importance)
        rows = rows.float().contiguous()
        fields = (self.search if on_cpu(rows) else self.search_tensors)(rows, weights)
        return self.pack(fields).reshape(len(rows), self.row_bytes(rows.shape[1]))

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the values of the unpacked fields."""
        fields = self.unpack(blocks.reshape(-1, self.block_bytes))
        return self.value(fields).reshape(len(blocks), n_columns)

    @abstractmethod
    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields of float32 rows (N, K) on the CPU; importances float32 (K,) or None."""

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields of rows anywhere; by the search on the CPU unless a type has another."""
        found = self.search(rows.cpu(), None if importance is None else importance.cpu())
        return Fields(**{name: value.to(rows.device) for name, value in vars(found).items()})

    @abstractmethod
    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the blocks, uint8 (B, block_bytes)."""

    @abstractmethod
    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return the fields of blocks, uint8 (B, block_bytes)."""

    @abstractmethod
    def value(self, fields: Fields) -> torch.Tensor:
        """Return what the fields stand for: float32 (B, block_size)."""

    def _importance(self, rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor | None:
        if importance is None:
            if self.needs_importance:
                raise UsageError(
                    f"{self.name} needs importances: without them its few bits go to the wrong weights",
                    hint="give an imatrix file, or choose a type of three bits or more",
                )
            return None
        if importance.shape != rows.shape[1:]:
            raise UsageError(
                f"{tuple(importance.shape)} importances for a matrix of {rows.shape[1]} columns",
                hint="expected one number for each column; is the imatrix of the same model?",
            )
        return importance.to(device=rows.device, dtype=torch.float32).contiguous()
