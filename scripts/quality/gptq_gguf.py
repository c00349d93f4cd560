"""What the gptq-gguf toolkit does to a matrix, restated: GPTQ in ggml's blocks.

After IST-DASLab's gptq-gguf-toolkit (`quant/gptq/src/gptq.py`, its defaults): columns in their own order, 1 %
of the mean diagonal added; when the walk comes to a super-block its scales are searched on the weights as all
errors before have left them, without importances, and stay. Its Hessians are of the inputs that the rounded
blocks before give. Kinder than the original in one thing: Q3_K's and Q6_K's scales are searched by ggml's own
search, where the toolkit takes the largest magnitude.
"""

import torch

from quantize.codecs.base import Codec
from quantize.solver.block_factor import WIDTH
from quantize.solver.block_grids import BlockScales, join, packed, searched_scales
from quantize.solver.compensate import BLOCK, Walk
from quantize.solver.factor import prepare

DAMP = 0.01


def encode_gptq_gguf(kind: Codec, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return the blocks, uint8 (N, row_bytes), of W f32 (N, K) under H f32 (K, K); raises HessianError."""
    walk = Walk(W, prepare(H, damp=DAMP, order="natural"))
    parts: list[BlockScales] = []
    for start in range(0, W.shape[1], WIDTH):
        end = min(start + WIDTH, W.shape[1])
        parts.append(searched_scales(kind, walk.target[:, start:end].contiguous(), None))
        grid = join(parts).grid()
        for first in range(start, end, BLOCK):
            walk.take(first, min(first + BLOCK, end), grid)
    return packed(kind, walk.codes(), join(parts))
