"""The loops over a block's columns, on tensors: compiled for the CPU, Triton's on a GPU.

On the CPU they are those of block_kernels, search_kernels and refit_kernels, elsewhere their twins in
quantize/solver/gpu. What is given lies on one device, where the results are too.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quantize.codecs.native.arithmetic import Floats
from quantize.solver import block_kernels, gpu, refit_kernels, search_kernels
from quantize.solver.block_factor import SubFactors
from quantize.solver.block_grids import BlockScales, BlockShape
from quantize.solver.compensate import array

Adds = Sequence[tuple[int, int]]
"""What each candidate of a search adds to step and drop."""


def round_codes(goal: torch.Tensor, factor: SubFactors, scales: BlockScales) -> torch.Tensor:
    """Return the codes, uint8 (N, w), of columns f32 (N, w), each error handed on inside the block."""
    order, feedback, _ = factor
    if gpu.takes(goal.device):
        return _round_on_gpu(goal, order, feedback, scales)
    codes = torch.empty(goal.shape, dtype=torch.uint8)
    levels, pair = _levels(scales.shape), _pair(scales)
    block_kernels.round_block(goal.numpy(), order.numpy(), feedback.numpy(), *levels, *pair, codes.numpy())
    return codes


def _round_on_gpu(
    goal: torch.Tensor, order: torch.Tensor, feedback: torch.Tensor, scales: BlockScales
) -> torch.Tensor:
    from quantize.solver.gpu.columns import round_columns

    ordered = goal[:, order]
    found, _ = round_columns(ordered, ordered, feedback.T.contiguous(), scales.grid().columns(order))
    codes = torch.empty_like(found)
    codes[:, order] = found
    return codes


def move_codes(
    gradient: torch.Tensor, H: torch.Tensor, scales: BlockScales, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, uint8 (N, w), each moved to its best, and what that added to Ŵ, f32 (N, w).

    `gradient`, f32 (N, w), is (W - Ŵ) H with H f32 (w, w).
    """
    if gpu.takes(gradient.device):
        from quantize.solver.gpu.columns import move_columns

        return move_columns(gradient, H, scales.grid(), codes)
    codes, moves = codes.clone(), torch.empty_like(gradient)
    changed = codes.numpy(), moves.numpy()
    levels = _levels(scales.shape)
    block_kernels.move_block(gradient.numpy(), H.numpy(), *levels, *_pair(scales), *changed)
    return codes, moves


def misses(W: torch.Tensor, codes: torch.Tensor, scales: BlockScales) -> torch.Tensor:
    """Return W - Ŵ, f32 (N, w), of codes uint8 (N, w)."""
    if gpu.takes(W.device):
        return W - scales.grid().values(codes)
    out, levels = torch.empty_like(W), array(scales.shape.levels())
    block_kernels.misses(W.numpy(), codes.numpy(), *_pair(scales), levels, out.numpy())
    return out


def refit(
    gradient: torch.Tensor, codes: torch.Tensor, H: torch.Tensor, shape: BlockShape, fields: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step, drop, scale and base, f32 (4, N, G), that are better for the codes, and what they add to
    Ŵ, f32 (N, w).

    `fields`, f32 (6, N, G), has d and dmin before these four as they are; it is lost.
    """
    if gpu.takes(gradient.device):
        from quantize.solver.gpu.refit import refit_scales

        return refit_scales(gradient, codes, H, shape, fields)
    moves, levels = torch.empty_like(gradient), array(shape.levels() - shape.middle)
    outputs = fields.numpy(), moves.numpy()
    refit_kernels.refit_block(
        array(gradient), codes.numpy(), array(H), levels, shape.based, _limits(shape), *outputs
    )
    return fields[2:], moves


def search(
    goal: torch.Tensor, factors: SubFactors, shape: BlockShape, beside: Adds, fields: torch.Tensor
) -> torch.Tensor:
    """Return step, drop, scale and base, f32 (4, N, G), with which sub-blocks of columns f32 (N, w) lose the
    least: the best of those that lie `beside` what they have, the first of which is just that.

    `fields` are those of `refit`; `factors` of the sub-blocks.
    """
    adds = torch.tensor(beside, dtype=torch.float32)
    if gpu.takes(goal.device):
        from quantize.solver.gpu.beside import search_scales

        return search_scales(goal, factors, shape, adds.to(goal.device), fields)
    middle, limits = np.float32(shape.middle), _limits(shape)
    order, feedback, weights = (each.numpy() for each in factors)
    outputs = adds.numpy(), fields.numpy()
    search_kernels.search_block(
        goal.numpy(), order, feedback, weights, *_levels(shape), middle, shape.based, limits, *outputs
    )
    return fields[2:]


def _levels(shape: BlockShape) -> tuple[Floats, Floats]:
    """Return the levels and, of uneven ones, the middles between them."""
    levels = shape.levels()
    middles = (levels[1:] + levels[:-1]) / 2 if shape.uneven else levels[:0]
    return array(levels), array(middles)


def _limits(shape: BlockShape) -> Floats:
    low, high = shape.steps or (1, 1)
    return np.array([low, high, shape.drop, shape.steps is None], np.float32)


def _pair(scales: BlockScales) -> tuple[Floats, Floats]:
    """Return scale and base of each sub-block, f32 (N, G)."""
    grid = scales.grid()
    return array(grid.scale), array(grid.base)
