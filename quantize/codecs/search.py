"""Calls of the compiled searches: tensors in, tensors out."""

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., None]


def run(
    kernel: Kernel, rows: torch.Tensor, block_size: int, importance: torch.Tensor | None, *middle: Any
) -> None:
    """Call a kernel on rows (N, K) cut into blocks; `middle` are its other arguments, tensors as arrays."""
    weights = torch.empty(0) if importance is None else importance
    blocks = rows.reshape(-1, block_size)
    arguments = [value.numpy() if isinstance(value, torch.Tensor) else value for value in middle]
    kernel(blocks.numpy(), weights.numpy(), *arguments)


def floats(n_blocks: int) -> torch.Tensor:
    """Return room for one float32 a block."""
    return torch.empty(n_blocks)


def codes(n_blocks: int, n: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Return room for `n` small integers a block."""
    return torch.empty(n_blocks, n, dtype=dtype)
