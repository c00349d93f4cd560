"""torch's own `.bin` shards as `Weights`.

A `.bin` file is a zip archive: one pickle that describes the tensors, and one uncompressed member of raw
bytes per storage. torch's `weights_only` loader runs nothing but a short list of tensor constructors, and
with `mmap` the tensors it returns are views of the file. Opening a shard is then a matter of
milliseconds, so only the shard in use stays open and its pages can go when the next one is opened.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.inventory import Inventory, found_by_spec
from converters.shards import read_shards
from quantize.errors import CheckpointError
from quantize.weights import TensorSpec

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StoredInBin:
    """A tensor's spec and the shard that holds it."""

    file: Path
    spec: TensorSpec


class BinWeights:
    """Weights over `.bin` shards; a loaded tensor is a view of the mapped file."""

    def __init__(self, stored: Mapping[str, StoredInBin]) -> None:
        self._stored = dict(stored)
        self._open: tuple[Path, Tensors] | None = None

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the specs in the order in which the tensors were given."""
        return {name: tensor.spec for name, tensor in self._stored.items()}

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor; CheckpointError if its shard cannot be read any more."""
        file = self._stored[name].file
        opened = self._open
        if opened is None or opened[0] != file:
            opened = self._open = (file, load_bin(file))
        return opened[1][name].contiguous()


def bin_inventory(files: Sequence[Path]) -> Inventory:
    """Read the tables of all shards; raises CheckpointError with a reason per shard that is broken."""
    table = read_bins(files)
    found = {name: found_by_spec(tensor.spec) for name, tensor in table.items()}
    return Inventory(found, lambda names: BinWeights({name: table[name] for name in names}))


def read_bins(files: Sequence[Path]) -> dict[str, StoredInBin]:
    """Return every tensor of the shards by name; raises CheckpointError with a reason per broken shard."""

    def read(file: Path) -> list[tuple[str, StoredInBin]]:
        specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in load_bin(file).items()]
        return [(spec.name, StoredInBin(file, spec)) for spec in specs]

    return read_shards(files, read)


def load_bin(file: Path) -> Tensors:
    """Return the tensors of one `.bin` file, mapped, by torch's `weights_only` loader.

    Raises CheckpointError for a file that is truncated, that holds more than tensors (nothing in it is
    run), or that is in the format of before torch 1.6, which cannot be mapped.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file.name}: truncated, or not in the zip format that torch writes since 1.6")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file.name}: holds Python objects other than tensors, which are never loaded"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file.name}: damaged: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{file.name}: expected a flat table of tensors by name")
    return {str(name): tensor.detach() for name, tensor in content.items()}
