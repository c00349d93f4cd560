"""Coordinate descent on the exact loss tr((W - Ŵ) H (W - Ŵ)ᵀ), over codes and over scales.

Compensation decides every column once, blind to what the columns behind it will be. Here all are decided
already, and each is looked at again: with the gradient G = (W - Ŵ) H at hand, the best value of column j,
the others held, is ŵ_j + G_j / H_jj, and the best code the one nearest to it. In the same way the best scale
of a group follows from its levels l: s + (G_g · l) / (l H_gg lᵀ). Every step is taken only if it lowers the
loss, a scale as it is after rounding to half precision; so the loss of a row never rises.

    G  <-  G - ΔŴ[:, block] H[block, :]       after each block, one matrix product
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from quantize.products import linear
from quantize.solver import gpu, kernels
from quantize.solver.compensate import BLOCK, array, grid_arrays
from quantize.solver.grid import Columns, Grid, nearest_codes


@dataclass(frozen=True)
class Solution:
    """Codes, uint8 (N, K), and the grid that they are on."""

    codes: torch.Tensor
    grid: Grid

    def weights(self) -> torch.Tensor:
        """Return Ŵ, f32 (N, K)."""
        return self.grid.values(self.codes)


def loss(W: torch.Tensor, quantized: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return each row's (w - ŵ) H (w - ŵ)ᵀ, f32 (N,), of W and Ŵ f32 (N, K) and H f32 (K, K)."""
    error = W.float() - quantized
    return (linear(error, H) * error).sum(1)


def descend(
    W: torch.Tensor,
    codes: torch.Tensor,
    H: torch.Tensor,
    grid: Columns,
    passes: int = 1,
    block: int = BLOCK,
    cuts: Sequence[int] = (),
) -> torch.Tensor:
    """Return better codes, uint8 (N, K): `passes` times, each column's code is moved to its best.

    H, f32 (K, K), is symmetric with a positive diagonal (`Factor.hessian` in the order of W's columns: see
    `in_place`). The loss of no row rises, up to the rounding of f32. No block goes across one of the columns
    `cuts`.
    """
    codes = codes.clone()
    for _ in range(passes):
        # Computed anew for each pass: the updates' rounding cannot add up.
        gradient = linear(W.float() - grid.values(codes), H)
        for start, end in _blocks(W.shape[1], block, cuts):
            places = torch.arange(start, end, device=W.device)
            part = H[start:end]
            moved, moves = move_block(
                gradient[:, start:end], part[:, start:end], grid.columns(places), codes[:, start:end]
            )
            codes[:, start:end] = moved
            gradient -= linear(moves, part.T.contiguous())
    return codes


def refit_scales(
    W: torch.Tensor,
    codes: torch.Tensor,
    H: torch.Tensor,
    grid: Grid,
    *,
    half: bool = True,
    bases: bool = False,
    zeros: torch.Tensor | None = None,
) -> Grid:
    """Return the grid with each group's scale moved to its best for these codes, one group after another.

    With `half` a scale is one of half precision. The base stays where it is; with `bases` it is fitted too,
    after the scale; with `zeros`, (N, G), it is kept at -scale * zero, as GPTQ's integer zero-points demand.
    A step that would not lower the loss, or turn a scale's sign, is not taken: no row's loss rises.
    """
    scale, base = grid.scale.clone(), grid.base.clone()
    gradient = linear(W.float() - grid.values(codes), H)
    levels = grid.levels[codes.long()]
    for group in range(scale.shape[1]):
        places = (grid.group == group).nonzero()[:, 0]
        part = H[places]
        inside = part[:, places]
        shape = levels[:, places]
        if zeros is not None:
            shape = shape - zeros[:, group, None]
        step = _step(gradient[:, places], shape, inside, scale[:, group], half, signed=True)
        gradient -= linear(step[:, None] * shape, part.T.contiguous())
        scale[:, group] += step
        if zeros is not None:
            base[:, group] = -scale[:, group] * zeros[:, group]
        elif bases:
            ones = torch.ones_like(shape)
            step = _step(gradient[:, places], ones, inside, base[:, group], half, signed=False)
            gradient -= linear(step[:, None] * ones, part.T.contiguous())
            base[:, group] += step
    return replace(grid, scale=scale, base=base)


def in_place(ordered: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a `Factor.hessian` with its rows and columns back in the order of W's columns."""
    back = torch.argsort(order)
    return ordered[back][:, back].contiguous()


def _blocks(n_columns: int, block: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the blocks (start, end) of columns, none longer than `block`, none across a cut."""
    edges = [0, *sorted(cuts), n_columns]
    return [
        (start, min(start + block, last))
        for first, last in pairwise(edges)
        for start in range(first, last, block)
    ]


def _step(
    gradient: torch.Tensor, shape: torch.Tensor, H: torch.Tensor, now: torch.Tensor, half: bool, signed: bool
) -> torch.Tensor:
    """Return how far to go along `shape`, (N, k), from `now`, (N,): zero where no step helps."""
    slope = (gradient * shape).sum(1)
    curvature = (linear(shape, H) * shape).sum(1)
    best = now + torch.where(curvature > 0, slope / curvature, 0.0)
    if half:
        best = best.half().float()
    step = best - now
    helps = step * (2 * slope - step * curvature) > 0
    if signed:
        helps &= best * now > 0
    return torch.where(helps & torch.isfinite(best), step, 0.0)


def move_block(
    gradient: torch.Tensor, H: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's codes after each was moved to its best, and what that added to Ŵ."""
    if gpu.takes(gradient.device):
        from quantize.solver.gpu.columns import move_columns

        return move_columns(gradient, H, grid, codes)
    if gradient.device.type != "cpu":
        return _move_columns(gradient, H, grid, codes)
    moved, moves = codes.contiguous().numpy().copy(), np.empty(gradient.shape, np.float32)
    kernels.descend_block(array(gradient), array(H), *grid_arrays(grid), moved, moves)
    return torch.from_numpy(moved), torch.from_numpy(moves)


def _move_columns(
    gradient: torch.Tensor, H: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `move_block` does, with torch alone."""
    slope, codes, moves = gradient.clone(), codes.clone(), torch.empty_like(gradient)
    for j, group in enumerate(grid.group.tolist()):
        scale, base = grid.scale[:, group], grid.base[:, group]
        before = grid.levels[codes[:, j].long()] * scale + base
        goal = before + slope[:, j] / H[j, j]
        new = nearest_codes(goal, scale, base, grid.levels)
        after = grid.levels[new.long()] * scale + base
        nearer = (goal - after).abs() < (goal - before).abs()
        codes[:, j] = torch.where(nearer, new, codes[:, j])
        moves[:, j] = torch.where(nearer, after - before, 0.0)
        slope[:, j + 1 :] -= moves[:, j, None] * H[j, j + 1 :]
    return codes, moves
