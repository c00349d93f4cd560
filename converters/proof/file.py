"""What the proof needs of a written model, whatever its kind: the face that all of them have.

A kind is a row of `KINDS`: how it is opened and in which runtime it is proven.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from converters.exl2_source import open_exl2
from converters.gguf_source import open_gguf
from converters.gptq_config import quantization_of
from converters.gptq_source import open_gptq
from converters.vocabulary import Vocabulary
from quantize.errors import CheckpointError
from quantize.llama import LlamaConfig
from quantize.weights import Weights


class ModelFile(Protocol):
    """A written model, opened: figures, vocabulary and weights as its readers see them."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, or the one folder."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """Its own figures."""
        ...

    @property
    def weights(self) -> Weights:
        """Its weights by the checkpoint's names; what is quantized loads as float32."""
        ...

    @property
    def tensor_types(self) -> Mapping[str, str]:
        """The quant type of each tensor."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Its vocabulary; raises TokenizerError."""
        ...

    def as_stored(self, weights: Weights) -> Weights:
        """Return the checkpoint's weights as this file is to have them; raises CheckpointError."""
        ...

    def block_size(self, name: str) -> int:
        """Return how many neighbouring columns of a quantized tensor are compared as one block."""
        ...

    def by_scale(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor (N, K) with the columns that share a scale next to each other."""
        ...

    def steps(self, name: str) -> torch.Tensor | None:
        """Return the distance of codes at each weight, f32 (N, K), for types with zero-points apart."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of written model."""

    name: str
    open: Callable[[Path], ModelFile]


GGUF = Kind("GGUF", open_gguf)
GPTQ = Kind("GPTQ folder", open_gptq)
EXL2 = Kind("EXL2 folder", open_exl2)
KINDS = {"gguf": GGUF, "gptq": GPTQ, "exl2": EXL2}
"""The kind that each target writes."""


def kind_of(path: Path) -> Kind:
    """Return the kind of a file or a folder by its path and, of a folder, its config.json.

    Raises CheckpointError for a folder that is not quantized, or by a method that cannot be proven.
    """
    if not path.is_dir():
        return GGUF
    stated = quantization_of(path)
    if stated is None:
        raise CheckpointError(
            f"{path}: config.json has no quantization_config",
            hint="expected a GGUF, or a folder of GPTQ or EXL2 weights",
        )
    method, folders = stated.get("quant_method"), {"gptq": GPTQ, "exl2": EXL2}
    if method not in folders:
        known = ", ".join(map(repr, folders))
        raise CheckpointError(f"{path}: quant_method is {method!r}; supported: {known}")
    return folders[method]


def written_kind(path: Path) -> Kind:
    """Return the kind whose runtime a proof will ask; of a folder that is none, what its proof will say."""
    try:
        return kind_of(path)
    except CheckpointError:
        return GPTQ
