"""LoRA: what an adapter adds to a matrix.

A low-rank update leaves W (rows x columns) in place and trains B (rows x r) and A (r x columns) with a
small r. In use the two are one matrix again:

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)

The sum is formed in f32 and rounded once, to W's own dtype. That is what PEFT's `merge_and_unload` does to
a linear layer, so a merged export equals the model that PEFT would have saved.
"""

import math

import torch


def scaling(rank: int, alpha: float, *, rank_stabilised: bool) -> float:
    """Return s, the weight of the update in the sum."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def merge(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `W + scale * B @ A` in W's dtype; W is not changed.

    Shapes: W (rows, columns), A (r, columns), B (rows, r), any float dtypes.
    """
    update = (B.to(torch.float32) @ A.to(torch.float32)).mul_(scale)  # (rows, columns)
    return update.add_(W).to(W.dtype)
