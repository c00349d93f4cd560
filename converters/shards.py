"""One or many safetensors shards as `Weights`: memory-mapped, one mapping per tensor.

A tensor that is loaded maps just its own byte range of its file, and the mapping goes when the tensor
goes. So a conversion that walks through 66 GB never has more of them mapped than the tensor in hand, and
none of it is ever copied: the kernel reads pages as they are touched, at the disk's speed.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from converters.inventory import Found, Inventory
from converters.safetensors_header import TORCH_DTYPES, Entry, read_header
from quantize.errors import CheckpointError
from quantize.weights import TensorSpec

Row = TypeVar("Row")


@dataclass(frozen=True)
class Stored:
    """A tensor and the shard that holds it. `dtype` is the file's own word."""

    file: Path
    entry: Entry

    @property
    def spec(self) -> TensorSpec:
        """The tensor's spec; KeyError for a dtype that no source may have (checked before)."""
        return TensorSpec(self.entry.name, self.entry.shape, TORCH_DTYPES[self.entry.dtype])


class SafetensorsWeights:
    """Weights over safetensors shards; a loaded tensor is a view of the file."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)
        self._specs = {name: tensor.spec for name, tensor in self._stored.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the specs in the order in which the tensors were given."""
        return self._specs

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor that maps its bytes of the shard, copy on write."""
        tensor = self._stored[name]
        try:
            return map_tensor(tensor.file, tensor.entry)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tensor.file.name} cannot be read at {name}: {error}") from None


def safetensors_inventory(files: Sequence[Path]) -> Inventory:
    """Read the headers of all shards; raises CheckpointError with a reason per shard that is broken."""
    table = read_safetensors(files)
    found = {name: Found(tensor.entry.shape, tensor.entry.dtype) for name, tensor in table.items()}
    return Inventory(found, lambda names: SafetensorsWeights({name: table[name] for name in names}))


def map_tensor(file: Path, entry: Entry) -> torch.Tensor:
    """Return the tensor at `entry` of `file` as a view of a mapping that lives as long as the tensor.

    A mapping must begin at a multiple of the system's granularity, so it begins up to a page early. It
    is copy on write only because torch wants writable buffers; nobody writes, so nothing is copied.
    """
    lead = entry.start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        length, offset = entry.n_bytes + lead, entry.start - lead
        mapping = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=offset)
    dtype = TORCH_DTYPES[entry.dtype]
    flat = torch.frombuffer(mapping, dtype=dtype, count=entry.n_bytes // dtype.itemsize, offset=lead)
    return flat.view(entry.shape)


def read_safetensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Return every tensor of the shards by name, from their headers alone.

    Raises CheckpointError with one reason per shard that is truncated or damaged, and per tensor that two
    shards hold.
    """
    return read_shards(files, lambda file: [(e.name, Stored(file, e)) for e in read_header(file)])


def read_shards(files: Iterable[Path], read: Callable[[Path], Iterable[tuple[str, Row]]]) -> dict[str, Row]:
    """Join what `read` finds in each shard into one table; raises CheckpointError with all reasons."""
    table: dict[str, Row] = {}
    home: dict[str, str] = {}
    reasons: list[str] = []
    for file in files:
        try:
            rows = list(read(file))
        except CheckpointError as error:
            reasons.append(error.message)
            continue
        reasons += [f"{name} is in {home[name]} and in {file.name}" for name, _ in rows if name in home]
        table |= dict(rows)
        home |= dict.fromkeys((name for name, _ in rows), file.name)
    if reasons:
        raise CheckpointError("the shards are damaged", reasons=reasons)
    return table
