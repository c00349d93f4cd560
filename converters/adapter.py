"""A PEFT LoRA adapter, merged into the weights as they are loaded.

An adapter folder is `adapter_config.json` and one file of tensors, named by the module that they belong to:

    base_model.model.<module>.lora_A.weight, .lora_B.weight      update of a linear layer
    base_model.model.<module>.lora_embedding_A, _B               of the embedding, both transposed
    base_model.model.<module>.weight, .base_layer.weight,        the module's weight itself, for
        .modules_to_save.weight                                  `modules_to_save` and saved embeddings

`MergedWeights` is `Weights` again, so everything behind it, the proof included, sees one plain model. An
adapter with any tensor that finds no place, or any setting that changes the sum, is refused: half of an
adapter is another model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.adapter_config import AdapterConfig, read_adapter_config
from converters.bin_shards import bin_inventory
from converters.config import read_json
from converters.inventory import SOURCE_DTYPES, Inventory
from converters.shards import safetensors_inventory
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from quantize.lora import merge, scaling
from quantize.weights import TensorSpec, Weights

_PREFIX = r"(?:base_model\.model\.)?(?P<module>.+?)"
_LOW_RANK = re.compile(_PREFIX + r"\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(_PREFIX + r"(?:\.base_layer|\.modules_to_save)?(?:\.default)?\.weight")
_LISTED = 12


@dataclass(frozen=True)
class LowRank:
    """An update of one base tensor: the adapter's names of A and B, and the factor s.

    An embedding's pair is stored transposed: `lora_embedding_A` is (r, tokens), `_B` is (hidden, r).
    """

    a: str
    b: str
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter, opened: what it does to which tensor of the base. `replaced` maps to its own tensors."""

    name: str
    weights: Weights
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    def reasons(self, config: LlamaConfig) -> list[str]:
        """Return every reason why the adapter does not fit a base model."""
        wanted = config.tensor_shapes()
        touched = [*self.updates, *(name for name in self.replaced if name not in self.updates)]
        strangers = [name for name in touched if name not in wanted]
        reasons = [f"the adapter changes {name}, which the model does not have" for name in strangers]
        if config.tied_head and any(name in (EMBEDDING, HEAD) for name in touched):
            reasons.append(
                "the adapter changes the embedding or the head of a model in which they are one tensor; "
                "merge it with PEFT, which decides what becomes of the other"
            )
        return reasons + list(self._misshaped(wanted))

    def _misshaped(self, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for base, update in self.updates.items():
            a, b = (self.weights.specs()[name].shape for name in (update.a, update.b))
            a, b = (b[::-1], a[::-1]) if update.embedding else (a, b)
            if base in wanted and (b[:1] + a[1:] != wanted[base] or a[0] != b[1]):
                yield f"the adapter's update of {base} is {b} x {a}, the tensor is {wanted[base]}"
        for base, name in self.replaced.items():
            shape = self.weights.specs()[name].shape
            if base in wanted and shape != wanted[base]:
                yield f"the adapter's {base} is {shape}, the model's is {wanted[base]}"


class MergedWeights:
    """The weights of the base with an adapter applied to each tensor at the moment it is loaded."""

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the specs of the base: merging changes neither shape nor dtype."""
        return self._base.specs()

    def load(self, name: str) -> torch.Tensor:
        """Return one merged tensor in the base's dtype."""
        adapter = self._adapter
        dtype = self.specs()[name].dtype
        replacement = adapter.replaced.get(name)
        whole = self._base.load(name) if replacement is None else adapter.weights.load(replacement).to(dtype)
        update = adapter.updates.get(name)
        if update is None:
            return whole
        a, b = adapter.weights.load(update.a), adapter.weights.load(update.b)
        a, b = (b.T, a.T) if update.embedding else (a, b)
        return merge(whole, a, b, update.scale)


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder; raises CheckpointError with every reason why it cannot be merged."""
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: no adapter_config.json; --lora takes the folder of a PEFT adapter")
    config, reasons = read_adapter_config(read_json(folder / "adapter_config.json"))
    inventory = _inventory(folder)
    pairs, replaced, strangers = _sort(inventory.found)
    dtypes = {tensor.dtype for tensor in inventory.found.values()} - set(SOURCE_DTYPES)
    reasons += [f"tensors stored as {dtype}; supported: {', '.join(SOURCE_DTYPES)}" for dtype in dtypes]
    if strangers:
        reasons.append(f"tensors of an unknown kind: {', '.join(strangers[:_LISTED])}")
    reasons += [f"{module}: only one of lora_A and lora_B" for module, pair in pairs.items() if len(pair) < 2]
    if reasons:
        raise CheckpointError(f"the adapter {folder} is not supported", reasons=reasons)
    weights = inventory.open(list(inventory.found))
    updates = {f"{module}.weight": _update(module, pair, config, weights) for module, pair in pairs.items()}
    resolved = folder.resolve()
    trained = resolved.name.startswith("checkpoint-")
    name = f"{resolved.parent.name}-{resolved.name}" if trained else resolved.name
    return Adapter(name, weights, updates, replaced)


def _inventory(folder: Path) -> Inventory:
    safe, binary = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        return safetensors_inventory([safe])
    if binary.is_file():
        return bin_inventory([binary])
    raise CheckpointError(f"{folder}: no weights; looked for {safe.name} and {binary.name}")


Pair = dict[str, str]  # "A", "B" -> the adapter's name


def _sort(names: Mapping[str, object]) -> tuple[dict[str, Pair], dict[str, str], list[str]]:
    """Return module -> pair of update names, base tensor -> replacing name, and names of neither kind."""
    pairs: dict[str, Pair] = {}
    replaced: dict[str, str] = {}
    strangers: list[str] = []
    for name in names:
        if match := _LOW_RANK.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = name
        elif ".lora_" not in name and (match := _WHOLE.fullmatch(name)):
            replaced[f"{match['module']}.weight"] = name
        else:
            strangers.append(name)
    return pairs, replaced, strangers


def _update(module: str, pair: Pair, config: AdapterConfig, weights: Weights) -> LowRank:
    """Return a pair's update; its rank is that of the tensors, its alpha by the config's patterns."""
    match = _LOW_RANK.fullmatch(pair["A"])
    rank = weights.specs()[pair["A"]].shape[0]
    scale = scaling(rank, config.alpha(module), rank_stabilised=config.rank_stabilised)
    return LowRank(pair["A"], pair["B"], scale, embedding=bool(match and match["kind"]))
