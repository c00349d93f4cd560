"""Codes rounded with compensation, and codes moved to their best: the loops over columns, on a GPU.

They do what `compensate_block` and `descend_block` of quantize/solver/kernels.py do. A tile is a few rows of
all columns of a block; a column is taken out of it by a sum in which all others are zero.
"""

import torch
import triton
import triton.language as tl

from quantize.solver.gpu import launching
from quantize.solver.gpu.device import inverted, kernel, level_of, nearest, tile, warps
from quantize.solver.grid import Grid, is_uniform


def round_columns(
    W: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round columns one after another; return the codes, uint8 (N, B), and W - Ŵ, f32 (N, B).

    `target`, f32 (N, B), is where the columns should go before their own feedback, f32 (B, B), of which only
    what is above the diagonal counts.
    """
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    errors = torch.empty(W.shape, device=W.device)
    W, target, feedback = (_rows(matrix) for matrix in (W, target, feedback))
    if codes.numel():
        n_rows, n_columns = W.shape
        rows, columns = tile(n_rows, n_columns)
        fields, top, n_middles = _grid(grid)
        strides = W.stride(0), target.stride(0), feedback.stride(0)
        with launching(W):
            _round[(triton.cdiv(n_rows, rows),)](
                W, target, feedback, *fields, codes, errors, n_rows, grid.scale.shape[1],
                *strides, top, WIDTH=n_columns, ROWS=rows, COLUMNS=columns, MIDDLES=n_middles,
                num_warps=warps(columns), num_stages=1,
            )  # fmt: skip
    return codes, errors


def move_columns(
    gradient: torch.Tensor, H: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, uint8 (N, B), after each was moved to its best, and what that added to Ŵ, f32 (N, B).

    `gradient`, f32 (N, B), is (W - Ŵ) H, H f32 (B, B).
    """
    moved = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    moves = torch.empty(codes.shape, device=codes.device)
    gradient, H, codes = (_rows(matrix) for matrix in (gradient, H, codes))
    if codes.numel():
        n_rows, n_columns = codes.shape
        rows, columns = tile(n_rows, n_columns)
        fields, top, n_middles = _grid(grid)
        steps = 1.0 / H.diagonal()
        strides = gradient.stride(0), H.stride(0), codes.stride(0)
        with launching(gradient):
            _move[(triton.cdiv(n_rows, rows),)](
                gradient, H, steps, codes, *fields, moved, moves, n_rows, grid.scale.shape[1],
                *strides, top, WIDTH=n_columns, ROWS=rows, COLUMNS=columns, MIDDLES=n_middles,
                num_warps=warps(columns), num_stages=1,
            )  # fmt: skip
    return moved, moves


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are each in one piece."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _grid(grid: Grid) -> tuple[tuple[torch.Tensor, ...], float, int]:
    """Return what the kernels take of a grid, its highest level and the number of uneven levels' middles."""
    levels = grid.levels.contiguous()
    middles = ((levels[1:] + levels[:-1]) / 2).contiguous()
    uniform = is_uniform(levels) if grid.uniform is None else grid.uniform
    n_middles = 0 if uniform else len(middles)
    scale = grid.scale.contiguous()
    fields = scale, inverted(scale), grid.base.contiguous(), grid.group.contiguous(), levels, middles
    return fields, float(len(levels) - 1), n_middles


@kernel
def _round(
    W: tl.tensor,
    target: tl.tensor,
    feedback: tl.tensor,
    scale: tl.tensor,
    inverse: tl.tensor,
    base: tl.tensor,
    group: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    out_codes: tl.tensor,
    out_errors: tl.tensor,
    n_rows: tl.tensor,
    n_groups: tl.tensor,
    W_stride: tl.tensor,
    target_stride: tl.tensor,
    feedback_stride: tl.tensor,
    top: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIDDLES: tl.constexpr,
) -> None:
    """Round ROWS rows; scale, its inverse and base are (N, G), group (B,)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    present, inside = rows < n_rows, columns < WIDTH
    goals = tl.load(
        target + rows[:, None] * target_stride + columns[None, :],
        mask=present[:, None] & inside[None, :],
        other=0.0,
    )
    for j in range(WIDTH):
        field = rows * n_groups + tl.load(group + j)
        step = tl.load(scale + field, mask=present, other=0.0)
        start = tl.load(base + field, mask=present, other=0.0)
        share = tl.load(inverse + field, mask=present, other=0.0)
        weight = tl.load(W + rows * W_stride + j, mask=present, other=0.0)
        row = tl.load(feedback + j * feedback_stride + columns, mask=inside & (columns > j), other=0.0)
        goal = tl.sum(tl.where(columns[None, :] == j, goals, 0.0), axis=1)
        code = nearest(goal, share, start, levels, middles, top, MIDDLES)
        error = weight - (step * level_of(code, levels, MIDDLES) + start)
        goals += error[:, None] * row[None, :]
        out = rows * WIDTH + j
        tl.store(out_codes + out, code.to(tl.uint8), mask=present)
        tl.store(out_errors + out, error, mask=present)


@kernel
def _move(
    gradient: tl.tensor,
    hessian: tl.tensor,
    steps: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    inverse: tl.tensor,
    base: tl.tensor,
    group: tl.tensor,
    levels: tl.tensor,
    middles: tl.tensor,
    out_codes: tl.tensor,
    out_moves: tl.tensor,
    n_rows: tl.tensor,
    n_groups: tl.tensor,
    gradient_stride: tl.tensor,
    hessian_stride: tl.tensor,
    codes_stride: tl.tensor,
    top: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIDDLES: tl.constexpr,
) -> None:
    """Move the codes of ROWS rows; `steps` are 1 / H_jj."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    present, inside = rows < n_rows, columns < WIDTH
    slopes = tl.load(
        gradient + rows[:, None] * gradient_stride + columns[None, :],
        mask=present[:, None] & inside[None, :],
        other=0.0,
    )
    for j in range(WIDTH):
        field = rows * n_groups + tl.load(group + j)
        step = tl.load(scale + field, mask=present, other=0.0)
        start = tl.load(base + field, mask=present, other=0.0)
        share = tl.load(inverse + field, mask=present, other=0.0)
        old = tl.load(codes + rows * codes_stride + j, mask=present, other=0).to(tl.float32)
        row = tl.load(hessian + j * hessian_stride + columns, mask=inside & (columns > j), other=0.0)
        along = tl.load(steps + j)
        before = step * level_of(old, levels, MIDDLES) + start
        slope = tl.sum(tl.where(columns[None, :] == j, slopes, 0.0), axis=1)
        goal = before + slope * along
        new = nearest(goal, share, start, levels, middles, top, MIDDLES)
        after = step * level_of(new, levels, MIDDLES) + start
        nearer = tl.abs(goal - after) < tl.abs(goal - before)
        move = tl.where(nearer, after - before, 0.0)
        slopes -= move[:, None] * row[None, :]
        out = rows * WIDTH + j
        tl.store(out_codes + out, tl.where(nearer, new, old).to(tl.uint8), mask=present)
        tl.store(out_moves + out, move, mask=present)
