"""A folder of GPTQ weights opened as what it is: a Llama with a tokenizer, whose weights load one by one.

Everything is read as its readers read it: figures from the folder's own config.json, the vocabulary from
its own tokenizer files, each linear dequantized from its four tensors (`quantize.codecs.gptq`). Names and
shapes are those of the checkpoint. Opening reads headers and the small g_idx, and reports all faults at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from converters.config import read_config, read_json
from converters.folder import find_weights
from converters.gptq_config import MAIN, GptqConfig, GptqScheme, read_gptq_config
from converters.inventory import harmless
from converters.shards import Stored, map_tensor, read_safetensors
from converters.tokenizer import read_tokenizer
from converters.vocabulary import Vocabulary
from quantize.codecs.gptq import CODES_IN_WORDS, dequantize
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING, LlamaConfig
from quantize.weights import TensorSpec, Weights

PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_STORED: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_CHANNEL_BLOCK = 128  # of rows with one scale: as fine as is usual, so that a fault shows where it is


@dataclass(frozen=True)
class GptqWeights:
    """The tensors of a GPTQ folder, as `Weights`; `schemes` are those of the quantized ones, by name."""

    stored: Mapping[str, Stored]
    shapes: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, GptqScheme]
    config: GptqConfig

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec; the dtype is the stored one, float32 for quantized tensors."""
        return {name: TensorSpec(name, shape, self._dtype(name)) for name, shape in self.shapes.items()}

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.schemes else _STORED[self.stored[name].entry.dtype]

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor: float types as stored, quantized ones dequantized to float32."""
        if name not in self.schemes:
            return self._map(name)
        qweight, qzeros, scales, g_idx = (self.part(name, part) for part in PARTS)
        return dequantize(qweight, qzeros, scales, g_idx, self.schemes[name].bits, self.config.version)

    def part(self, name: str, part: str) -> torch.Tensor:
        """Return one of a quantized tensor's four parts, as stored."""
        return self._map(f"{module_of(name)}.{part}")

    def _map(self, stored_name: str) -> torch.Tensor:
        stored = self.stored[stored_name]
        try:
            return map_tensor(stored.file, stored.entry)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{stored.file.name} cannot be read at {stored_name}: {error}") from None


@dataclass(frozen=True)
class GptqFolder:
    """A GPTQ folder of the Llama architecture.

    `paths` is the folder alone, `files` are its shards, `tensor_types` the quant type of each tensor by the
    checkpoint's name: GPTQ-4bit-128g, F16, BF16, F32.
    """

    paths: tuple[Path, ...]
    files: tuple[Path, ...]
    config: LlamaConfig
    quantization: GptqConfig
    weights: GptqWeights
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
        n_columns, size = self.weights.shapes[name][-1], self.weights.schemes[name].group_size
        return math.gcd(n_columns, size if size > 0 else _CHANNEL_BLOCK)

    def by_scale(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor (N, K) with the columns that share a scale next to each other."""
        groups = self.weights.part(name, "g_idx").long()
        if bool((groups[1:] >= groups[:-1]).all()):
            return tensor
        return tensor[:, torch.argsort(groups, stable=True)]

    def steps(self, name: str) -> torch.Tensor:
        """Return the scale of each weight, f32 (N, K)."""
        groups = self.weights.part(name, "g_idx").long()
        return self.weights.part(name, "scales").float().T.index_select(1, groups)


def module_of(name: str) -> str:
    """Return the name of the linear whose weight has this name."""
    return name.removesuffix(".weight")


def open_gptq(folder: Path) -> GptqFolder:
    """Open a folder of GPTQ weights: one safetensors file, or several with or without an index.

    Raises CheckpointError, with all reasons, for one that is truncated, incomplete, or unlike its configs.
    """
    quantization = read_gptq_config(folder)
    config = read_config(read_json(folder / MAIN), quantized=True)
    found = find_weights(folder)
    if found.kind != "safetensors":
        raise CheckpointError(f"{folder}: its weights are in torch's own format; expected safetensors")
    stored = read_safetensors(found.files)
    shapes = config.tensor_shapes()
    schemes = _schemes(config, quantization, stored)
    reasons = [*_tensor_faults(config, quantization, schemes, stored)]
    weights = GptqWeights(stored, shapes, schemes, quantization)
    reasons = reasons or [*_value_faults(weights)]
    if reasons:
        raise CheckpointError(f"{folder}: not the tensors that its configs describe", reasons=reasons)
    types = {n: schemes[n].name if n in schemes else stored[n].entry.dtype for n in shapes}
    return GptqFolder((folder,), found.files, config, quantization, weights, types)


def _schemes(
    config: LlamaConfig, quantization: GptqConfig, stored: Mapping[str, Stored]
) -> dict[str, GptqScheme]:
    """Return the scheme of every linear that is quantized here, whatever the config says of it."""
    linears = [n for n, shape in config.tensor_shapes().items() if len(shape) == 2 and n != EMBEDDING]
    quantized = [n for n in linears if any(f"{module_of(n)}.{part}" in stored for part in PARTS)]
    return {n: quantization.scheme_of(module_of(n)) or quantization.scheme for n in quantized}


def _tensor_faults(
    config: LlamaConfig,
    quantization: GptqConfig,
    schemes: Mapping[str, GptqScheme],
    stored: Mapping[str, Stored],
) -> Iterator[str]:
    """Yield what the headers show: missing, extra and misshaped tensors, and other dtypes."""
    expected: set[str] = set()
    for name, shape in config.tensor_shapes().items():
        if name in schemes:
            parts = _parts(name, shape, schemes[name])
            yield from _word_faults(name, shape, schemes[name])
        else:
            parts = {name: (shape, tuple(_STORED))}
        expected |= parts.keys()
        for part, (part_shape, dtypes) in parts.items():
            yield from _part_faults(part, part_shape, dtypes, stored)
        yield from _unlike_config(name, shape, quantization, schemes)
    biases = {f"{module_of(name)}.bias" for name in schemes}
    for name in stored:
        if name not in expected | biases and not harmless(config, name):
            yield f"{name} is not part of a Llama quantized this way"


def _parts(
    name: str, shape: tuple[int, ...], scheme: GptqScheme
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Return a linear's stored names with the shape and the dtypes that they may have."""
    (n, k), groups = shape, scheme.n_groups(shape[1])
    return {
        f"{module_of(name)}.qweight": ((k * scheme.bits // 32, n), ("I32",)),
        f"{module_of(name)}.qzeros": ((groups, n * scheme.bits // 32), ("I32",)),
        f"{module_of(name)}.scales": ((groups, n), ("F16", "BF16")),
        f"{module_of(name)}.g_idx": ((k,), ("I32",)),
    }


def _word_faults(name: str, shape: tuple[int, ...], scheme: GptqScheme) -> Iterator[str]:
    for n, what in zip(shape, ("rows", "columns"), strict=True):
        if n % CODES_IN_WORDS[scheme.bits]:
            yield f"{module_of(name)}: {n} {what} do not fill whole words at {scheme.bits} bits"


def _part_faults(
    name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], stored: Mapping[str, Stored]
) -> Iterator[str]:
    if name not in stored:
        yield f"{name} is missing"
        return
    entry = stored[name].entry
    if entry.shape != shape:
        yield f"{name} is {list(entry.shape)}, expected {list(shape)} by bits and group_size of the config"
    if entry.dtype not in dtypes:
        yield f"{name} is stored as {entry.dtype}, expected {' or '.join(dtypes)}"


def _unlike_config(
    name: str, shape: tuple[int, ...], quantization: GptqConfig, schemes: Mapping[str, GptqScheme]
) -> Iterator[str]:
    """Yield where a decoder linear is quantized and should not be by the config, or the other way round."""
    module = module_of(name)
    if len(shape) != 2 or ".layers." not in name:
        return
    meant = quantization.scheme_of(module) is not None
    if name in schemes and not meant:
        yield f"{module} is quantized, but `dynamic` in the config leaves it out"
    elif name not in schemes and meant and not quantization.fields.get("modules_in_block_to_quantize"):
        yield f"{module} is not quantized, and the config does not say so"


def _value_faults(weights: GptqWeights) -> Iterator[str]:
    """Yield what only values show: a g_idx out of range, a bias that is not zero."""
    for name, scheme in weights.schemes.items():
        groups = scheme.n_groups(weights.shapes[name][1])
        g_idx = weights.part(name, "g_idx")
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            yield f"{module_of(name)}.g_idx holds {low} to {high}, expected 0 to {groups - 1}"
        bias = f"{module_of(name)}.bias"
        if bias in weights.stored and bool(weights.part(name, "bias").any()):
            yield f"{bias} is not zero; a Llama of this family has no biases"
