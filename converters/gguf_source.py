"""A GGUF file opened as what it is: a Llama with a tokenizer, whose weights load one by one.

Everything is read as llama.cpp reads it, defaults for absent keys included, so that the proof compares
what a runtime will see: a file without `llama.rope.freq_base` *has* a base of 10000. Names and rows are
given back in the checkpoint's way.
"""

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from converters.fold_fields import read_fold
from converters.gguf_file import BLOCK_SIZES, GgufHead, TensorEntry, read_head, shard_name
from converters.gguf_metadata import read_llama_config, read_vocabulary
from converters.names import gguf_name, hf_name, is_rotary, unpermute
from converters.vocabulary import Vocabulary
from quantize.codecs import CODECS
from quantize.errors import CheckpointError
from quantize.folding import Fold, FoldedWeights
from quantize.llama import HEAD, LlamaConfig
from quantize.weights import TensorSpec, Weights

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufWeights:
    """The tensors of one or more GGUF shards, as `Weights`."""

    heads: tuple[GgufHead, ...]
    head_dim: int

    @cached_property
    def _entries(self) -> dict[str, tuple[GgufHead, TensorEntry]]:
        return {hf_name(entry.name): (head, entry) for head in self.heads for entry in head.tensors}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec; the dtype is the stored one, float32 for quantized tensors."""
        return {
            name: TensorSpec(name, entry.shape, _STORED.get(entry.quant, torch.float32))
            for name, (_, entry) in self._entries.items()
        }

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor: float types as stored, quantized ones decoded to float32."""
        entry = self._entries[name][1]
        blocks = self.blocks(name)
        if entry.quant in _STORED:
            return blocks.view(_STORED[entry.quant]).reshape(entry.shape)
        if entry.quant in CODECS:
            return CODECS[entry.quant].decode(blocks, entry.shape[-1]).reshape(entry.shape)
        decoded = dequantize(blocks.numpy(), GGMLQuantizationType[entry.quant])
        return torch.from_numpy(decoded).reshape(entry.shape)

    def blocks(self, name: str) -> torch.Tensor:
        """Return one tensor's bytes, uint8 (N, row_bytes), rows in the checkpoint's order."""
        head, entry = self._entries[name]
        data = _map(head.path, head.data_start + entry.offset, entry.n_bytes)
        rows = data.reshape(math.prod(entry.shape[:-1]), -1)
        return unpermute(rows, self.head_dim) if is_rotary(name) else rows


def _map(path: Path, start: int, n_bytes: int) -> torch.Tensor:
    """Return bytes of a file, uint8 (n_bytes,), mapped: they take up page cache, not memory.

    Only the range asked for is mapped. A private mapping of a whole file larger than the memory, which
    is what torch.from_file makes, is refused by kernels that do not overcommit.
    """
    skipped = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), n_bytes + skipped, access=mmap.ACCESS_COPY, offset=start - skipped)
    data = torch.frombuffer(view, dtype=torch.uint8, offset=skipped)
    # An alignment below four bytes is allowed, and then a view by number is not.
    return data if start % 4 == 0 else data.clone()


@dataclass(frozen=True)
class GgufFile:
    """A GGUF of the Llama architecture, one file or several shards.

    `metadata` are the first file's fields, `tensor_types` the quant type of each tensor by the
    checkpoint's name.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    config: LlamaConfig
    weights: GgufWeights
    tensor_types: Mapping[str, str]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary; raises TokenizerError for a kind other than byte-level BPE."""
        return read_vocabulary(self.metadata)

    @cached_property
    def fold(self) -> Fold | None:
        """What was done to the channels, if anything; raises CheckpointError where that cannot be told."""
        return read_fold(self.metadata, self.config)

    def as_stored(self, weights: Weights) -> Weights:
        """Return the checkpoint's weights as the file is to have them: folded, if it is."""
        return weights if self.fold is None else FoldedWeights(weights, self.fold)

    def blocks(self, name: str) -> torch.Tensor:
        """Return one tensor's bytes as stored, uint8 (N, row_bytes), rows in the checkpoint's order."""
        return self.weights.blocks(name)

    def block_size(self, name: str) -> int:
        """Return how many neighbouring columns share a block."""
        return BLOCK_SIZES[self.tensor_types[name]]

    def steps(self, name: str) -> None:
        """Return nothing: the check of zero-points is not for these types."""

    def by_scale(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is: a block's columns lie next to each other."""
        return tensor


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF by its only file or its first shard.

    Raises CheckpointError, with all reasons, for a file that is truncated, corrupt, incomplete or no Llama.
    """
    first = read_head(path)
    heads = (first, *_other_shards(first))
    entries = {entry.name: entry for head in heads for entry in head.tensors}
    try:
        config = read_llama_config(first.metadata, tied_head=gguf_name(HEAD) not in entries)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", reasons=error.reasons) from error
    reasons = _tensor_faults(config, entries)
    if len(entries) != sum(len(head.tensors) for head in heads):
        reasons.append("several shards hold the same tensor")
    if reasons:
        raise CheckpointError(f"{path}: not the tensors that its metadata describes", reasons=reasons)
    return GgufFile(
        paths=tuple(head.path for head in heads),
        metadata=first.metadata,
        config=config,
        weights=GgufWeights(heads, config.head_dim),
        tensor_types={hf_name(name): entry.quant for name, entry in entries.items()},
    )


def _tensor_faults(config: LlamaConfig, entries: Mapping[str, TensorEntry]) -> list[str]:
    # One reason instead of nine for every layer that cannot be there.
    if config.n_layers > len(entries):
        return [f"llama.block_count is {config.n_layers}, but there are {len(entries)} tensors in all"]
    expected = {gguf_name(name): shape for name, shape in config.tensor_shapes().items()}
    faults = [f"tensor {name} is missing" for name in expected if name not in entries]
    faults += [f"tensor {name} is not part of a Llama" for name in entries if name not in expected]
    for name, shape in expected.items():
        if name in entries and entries[name].shape != shape:
            faults.append(f"tensor {name} is {list(entries[name].shape)}, expected {list(shape)}")
    return faults


def _other_shards(first: GgufHead) -> list[GgufHead]:
    """Return the heads of shards 2 to n; an empty list for a file that is not split."""
    number, count = first.metadata.get("split.no", 0), first.metadata.get("split.count", 1)
    for key, value in {"split.no": number, "split.count": count}.items():
        if type(value) is not int:
            raise CheckpointError(f"{first.path}: {key} is {value!r}, expected a whole number")
    if count <= 1:
        return []
    named = _SHARD.fullmatch(first.path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{first.path}: one of {count} shards, but not named <prefix>-00001-of-{count:05d}.gguf"
        )
    paths = [first.path.with_name(shard_name(named[1], i, count)) for i in range(count)]
    if number != 0:
        raise CheckpointError(
            f"{first.path}: shard {number + 1} of {count}", hint=f"give the first: {paths[0]}"
        )
    if absent := [f"{path.name} is missing" for path in paths if not path.is_file()]:
        raise CheckpointError(f"{first.path}: not all of its {count} shards are there", reasons=absent)
    return [_shard_head(path, i, first) for i, path in enumerate(paths) if i]


def _shard_head(path: Path, number: int, first: GgufHead) -> GgufHead:
    head = read_head(path)
    for key, expected in {"split.no": number, "split.count": first.metadata["split.count"]}.items():
        if head.metadata.get(key) != expected:
            raise CheckpointError(f"{path}: {key} is {head.metadata.get(key)}, expected {expected}")
    return head
