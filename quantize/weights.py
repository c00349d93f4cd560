"""Weights: the hinge of the project.

A checkpoint folder, a written file reopened from disk, a LoRA adapter merged while streaming, and a test
fixture are all `Weights`: a table of what there is, and a way to load one tensor. So one reference
forward serves the proof of every format, and nothing ever holds a whole model.

Names are always those of the Hugging Face Llama checkpoint (`model.layers.0.self_attn.q_proj.weight`),
and rows of q and k are always in its rotate-half order, whatever the file stores.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (rows first, as in torch) and stored dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes as stored in the source."""
        return self.n_elements * self.dtype.itemsize


class Weights(Protocol):
    """A lazily loaded set of tensors."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec by name, in the order in which the source is cheapest to read."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU in its stored dtype.

        It may be a view of a memory-mapped file: callers never write to it, and drop it when done.
        Raises KeyError for a name that `specs` does not list and CheckpointError for unreadable data.
        """
        ...


@dataclass(frozen=True)
class TensorWeights:
    """Weights held in memory: for tests, and for small models."""

    tensors: Mapping[str, torch.Tensor]

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec by name."""
        return {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self.tensors.items()}

    def load(self, name: str) -> torch.Tensor:
        """Return the tensor itself."""
        return self.tensors[name]
