"""Column after column, each error handed on to the columns to come: GPTQ on a grid that stands already.

Within a block of columns errors are handed on one by one; to all later blocks, in one matrix product. The
split changes nothing but the order of the sums. Scales never depend on it: the grid is given, or, in
quantize/solver/scales.py, chosen from weights that hold all errors of earlier groups.

The loop over a block's columns is compiled, on the CPU (quantize/solver/kernels.py) and on a GPU with Triton
(quantize/solver/gpu); elsewhere it is torch's, which starts many short operations for every column.
"""

from typing import Any

import numpy as np
import torch

from quantize.codecs.native.arithmetic import Floats
from quantize.products import linear
from quantize.solver import gpu, kernels
from quantize.solver.factor import Factor
from quantize.solver.grid import Columns, Grid, is_uniform, nearest_codes

BLOCK = 64
"""Columns of a block. 64 columns of 64 rows are 16 KB, half of a first-level cache."""


def compensate(W: torch.Tensor, factor: Factor, grid: Grid, block: int = BLOCK) -> torch.Tensor:
    """Return codes, uint8 (N, K), of W f32 (N, K) on a grid, by the walk of quantize/solver/factor.py.

    Rows do not influence each other; on a CPU, not even by their number, up to how the matrix product sums
    (then a near-tie may fall to the other side). Memory: about four times W.
    """
    walk = Walk(W, factor)
    ordered = grid.columns(factor.order)
    for start in range(0, W.shape[1], block):
        walk.take(start, min(start + block, W.shape[1]), ordered)
    return walk.codes()


class Walk:
    """The state of the walk: which columns have their codes, and what their errors made of the others.

    Columns are in the order of rounding. `target`, f32 (N, K), is where each of the columns to come would
    best be put.
    """

    def __init__(self, W: torch.Tensor, factor: Factor) -> None:
        self.factor = factor
        self.weights = W.float()[:, factor.order].contiguous()
        self.target = self.weights.clone()
        self._codes = torch.zeros(W.shape, dtype=torch.uint8, device=W.device)

    def take(self, start: int, end: int, grid: Columns) -> None:
        """Round the columns start..end on a grid whose columns are in the order of rounding."""
        feedback = self.factor.feedback[start:end]
        place = torch.arange(start, end, device=self.weights.device)
        codes, errors = round_block(
            self.weights[:, start:end], self.target[:, start:end], feedback[:, start:end], grid.columns(place)
        )
        self._codes[:, start:end] = codes
        if end < self.weights.shape[1]:
            self.target[:, end:] += linear(errors, feedback[:, end:].T.contiguous())

    def codes(self) -> torch.Tensor:
        """Return the codes, uint8 (N, K), in the order of the columns."""
        codes = torch.empty_like(self._codes)
        codes[:, self.factor.order] = self._codes
        return codes


def round_block(
    W: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block's columns one after another; return the codes, uint8 (N, B), and W - Ŵ, f32 (N, B).

    `target`, f32 (N, B), is where the columns should go before the block's own feedback, f32 (B, B).
    """
    if gpu.takes(W.device):
        from quantize.solver.gpu.columns import round_columns

        return round_columns(W, target, feedback, grid)
    if W.device.type != "cpu":
        return _round_block(W, target, feedback, grid)
    codes, errors = np.empty(W.shape, np.uint8), np.empty(W.shape, np.float32)
    kernels.compensate_block(array(W), array(target), array(feedback), *grid_arrays(grid), codes, errors)
    return torch.from_numpy(codes), torch.from_numpy(errors)


def _round_block(
    W: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `round_block` does, with torch alone."""
    goal, errors = target.clone(), torch.empty_like(W)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for j, group in enumerate(grid.group.tolist()):
        scale, base = grid.scale[:, group], grid.base[:, group]
        codes[:, j] = nearest_codes(goal[:, j], scale, base, grid.levels)
        errors[:, j] = W[:, j] - (grid.levels[codes[:, j].long()] * scale + base)
        goal[:, j + 1 :] += errors[:, j, None] * feedback[j, j + 1 :]
    return codes, errors


def array(tensor: torch.Tensor) -> Floats:
    """Return a CPU tensor as the array that the kernels take: f32, contiguous."""
    result: Floats = tensor.to(torch.float32).contiguous().numpy()
    return result


def grid_arrays(grid: Grid) -> tuple[Floats, Floats, Any, Floats, Floats]:
    """Return scale, base, group, levels and, of uneven levels, the middles between them."""
    middles = (grid.levels[1:] + grid.levels[:-1]) / 2
    if is_uniform(grid.levels):
        middles = middles[:0]
    group = grid.group.contiguous().numpy()
    return array(grid.scale), array(grid.base), group, array(grid.levels), array(middles)
