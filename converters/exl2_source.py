"""A folder of EXL2 weights opened as what it is: a Llama with a tokenizer, whose weights load one by one.

Everything is read as ExLlamaV2 reads it: figures from the folder's own config.json, each linear from its five
tensors (`quantize.codecs.exl2`), whatever `quantization_config` says of them. Names and shapes are those of
the checkpoint. Opening reads headers and the small tensors, and reports all faults at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from converters.config import read_config, read_json
from converters.folder import find_weights
from converters.gptq_config import MAIN, quantization_of
from converters.inventory import harmless
from converters.shards import Stored, map_tensor, read_safetensors
from converters.tokenizer import read_tokenizer
from converters.vocabulary import Vocabulary
from quantize.codecs.exl2 import Exl2Tensors, Group, decode, groups_of, tensor_faults
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING, LlamaConfig
from quantize.weights import TensorSpec, Weights

PARTS: Final = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")
_DTYPES: Final = {"q_weight": "I32", "q_invperm": "I32", "q_scale": "I32", "q_scale_max": "F16"}
_DTYPES["q_groups"] = "I16"
_STORED: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Exl2Weights:
    """The tensors of an EXL2 folder, as `Weights`; `groups` are those of the quantized ones, by name."""

    stored: Mapping[str, Stored]
    shapes: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[Group, ...]]

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec; the dtype is the stored one, float32 for quantized tensors."""
        return {name: TensorSpec(name, shape, self._dtype(name)) for name, shape in self.shapes.items()}

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.groups else _STORED[self.stored[name].entry.dtype]

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor: float types as stored, quantized ones decoded to float32."""
        if name not in self.groups:
            return _mapped(self.stored, name)
        return decode(linear_of(self.stored, name), self.shapes[name][0])


@dataclass(frozen=True)
class Exl2Folder:
    """An EXL2 folder of the Llama architecture.

    `paths` is the folder alone, `files` are its shards, `tensor_types` the quant type of each tensor by the
    checkpoint's name: its widths, as EXL2-5/4bit, or F16, BF16, F32. `stated` is its quantization_config.
    """

    paths: tuple[Path, ...]
    files: tuple[Path, ...]
    config: LlamaConfig
    stated: Mapping[str, Any]
    weights: Exl2Weights
    tensor_types: Mapping[str, str]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the folder's tokenizer files; raises TokenizerError."""
        return read_tokenizer(self.paths[0], self.config.vocab_size).vocabulary

    def as_stored(self, weights: Weights) -> Weights:
        """Return the checkpoint's weights: nothing was done to them before they were rounded."""
        return weights

    def block_size(self, name: str) -> int:
        """Return how many neighbouring columns of a quantized tensor are compared as one block."""
        return math.gcd(*(group.size for group in self.weights.groups[name]))

    def by_scale(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor (N, K) with the columns that share a scale next to each other."""
        inverse = _mapped(self.weights.stored, f"{module_of(name)}.q_invperm").long()
        return tensor[:, torch.argsort(inverse)]

    def steps(self, name: str) -> None:
        """Return None: the format has no zero-points."""


def module_of(name: str) -> str:
    """Return the name of the linear whose weight has this name."""
    return name.removesuffix(".weight")


def type_name(groups: tuple[Group, ...]) -> str:
    """Return a linear's quant type in reports: its widths."""
    return f"EXL2-{'/'.join(str(bits) for bits in dict.fromkeys(group.bits for group in groups))}bit"


def stored_names(weights: Exl2Weights, name: str) -> list[str]:
    """Return the names under which a tensor of the checkpoint is stored."""
    return [f"{module_of(name)}.{part}" for part in PARTS] if name in weights.groups else [name]


def linear_of(stored: Mapping[str, Stored], name: str) -> Exl2Tensors:
    """Return a linear's five tensors, as stored; raises CheckpointError for a file that is gone."""
    return Exl2Tensors(*(_mapped(stored, f"{module_of(name)}.{part}") for part in PARTS))


def open_exl2(folder: Path) -> Exl2Folder:
    """Open a folder of EXL2 weights: one safetensors file, or several.

    Raises CheckpointError, with all reasons, for one that is truncated, incomplete, or unlike its config.
    """
    config = read_config(read_json(folder / MAIN), quantized=True)
    found = find_weights(folder)
    if found.kind != "safetensors":
        raise CheckpointError(f"{folder}: its weights are in torch's own format; expected safetensors")
    stored, shapes = read_safetensors(found.files), config.tensor_shapes()
    quantized = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2
        and name != EMBEDDING
        and any(f"{module_of(name)}.{part}" in stored for part in PARTS)
    ]
    reasons = [*_header_faults(config, quantized, stored)]
    reasons = reasons or [*_value_faults(shapes, quantized, stored)]
    if reasons:
        raise CheckpointError(f"{folder}: not the tensors of an EXL2 model", reasons=reasons)
    groups = {name: groups_of(linear_of(stored, name)) for name in quantized}
    types = {n: type_name(groups[n]) if n in groups else stored[n].entry.dtype for n in shapes}
    weights = Exl2Weights(stored, shapes, groups)
    return Exl2Folder((folder,), found.files, config, quantization_of(folder) or {}, weights, types)


def _mapped(stored: Mapping[str, Stored], name: str) -> torch.Tensor:
    tensor = stored[name]
    try:
        return map_tensor(tensor.file, tensor.entry)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tensor.file.name} cannot be read at {name}: {error}") from None


def _header_faults(config: LlamaConfig, quantized: list[str], stored: Mapping[str, Stored]) -> Iterator[str]:
    """Yield what the headers show: missing, extra and misshaped tensors, and other dtypes."""
    expected: set[str] = set()
    for name, shape in config.tensor_shapes().items():
        parts = [f"{module_of(name)}.{part}" for part in PARTS] if name in quantized else [name]
        expected |= set(parts)
        yield from (f"{part} is missing" for part in parts if part not in stored)
        for part in (part for part in parts if part in stored):
            entry = stored[part].entry
            dtypes = (_DTYPES[part.rsplit(".", 1)[-1]],) if name in quantized else tuple(_STORED)
            if entry.dtype not in dtypes:
                yield f"{part} is stored as {entry.dtype}, expected {' or '.join(dtypes)}"
            if name not in quantized and entry.shape != shape:
                yield f"{name} is {list(entry.shape)}, expected {list(shape)}"
    biases = {f"{module_of(name)}.bias" for name in quantized}
    for name in stored:
        if name not in expected | biases and not harmless(config, name):
            yield f"{name} is not part of a Llama quantized this way"


def _value_faults(
    shapes: Mapping[str, tuple[int, ...]], quantized: list[str], stored: Mapping[str, Stored]
) -> Iterator[str]:
    """Yield what is wrong with the small tensors of linears, and a bias that is not zero."""
    for name in quantized:
        module, (n, k) = module_of(name), shapes[name]
        tensors = linear_of(stored, name)
        yield from (f"{module}: {fault}" for fault in tensor_faults(tensors, n))
        if len(tensors.q_invperm) != k:
            yield f"{module}.q_invperm has {len(tensors.q_invperm)} inputs, expected {k}"
        if not bool((tensors.q_scale_max >= 0).all()):
            yield f"{module}.q_scale_max: maxima below zero, or not numbers"
        if f"{module}.bias" in stored and bool(_mapped(stored, f"{module}.bias").any()):
            yield f"{module}.bias is not zero; a Llama of this family has no biases"
