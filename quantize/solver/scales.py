"""The search of a group's scale, and zero-point, for GPTQ's grids.

A scale is judged by what it would leave under compensation: the group is rounded with it, errors handed on
inside the group, and the loss is Σ D_k (target_k - value_k)² (quantize/solver/factor.py). That is exact but
for what later groups clip. Candidates shrink the range that holds all weights, then the best is tried a
little smaller and larger. Scales are in half precision before a code is computed.

Where groups lie together in the order of rounding, a group's search sees its weights with all errors of the
groups before (`round_searched`); where they do not, all scales come first, each group judged by its own
block of H (`search_scales`).
"""

import numpy as np
import torch

from quantize.products import linear
from quantize.solver import kernels
from quantize.solver.compensate import BLOCK, Walk, array, round_block
from quantize.solver.factor import Factor, prepare
from quantize.solver.grid import affine_grid

LADDER = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
"""Ranges tried, as shares of the one that holds all weights of the group."""
RUNGS = (1.0, 0.975, 1.025, 0.9875, 1.0125)
"""Then the scales tried beside the best, as shares of it."""
_TINY = 2.0**-24  # the smallest number above zero in half precision


def group_index(
    n_columns: int,
    group_size: int,
    order: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return g_idx, int64 (K,): the group of each column, counted along the columns or along an order.

    `group_size` 0 makes one group; the last group may be shorter. It lies on `device`, None: the CPU, or
    where the order is.
    """
    size = group_size or n_columns
    groups = torch.arange(n_columns, device=(device or "cpu") if order is None else order.device) // size
    if order is None:
        return groups
    by_column = torch.empty_like(groups)
    by_column[order] = groups
    return by_column


def plain_scales(
    W: torch.Tensor, group: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero, f32 (N, G), from each group's largest magnitude, or its range: no search."""
    n_groups = int(group.max()) + 1
    parts = [
        _range(W.float()[:, group == g], bits, symmetric, torch.ones(1, device=W.device))
        for g in range(n_groups)
    ]
    scale, zero = (torch.cat(list(part)).T.contiguous() for part in zip(*parts, strict=True))
    return scale, zero


def search_scales(
    W: torch.Tensor,
    H: torch.Tensor,
    group: torch.Tensor,
    bits: int,
    symmetric: bool,
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero, f32 (N, G), of W's groups as they are, each judged by its own block of H.

    H, f32 (K, K), is in the order of W's columns. It only judges here: a block that cannot be factored as it
    is, is damped as `prepare` does it. Scales are numbers of half precision; zero is
    2^(bits - 1) if symmetric, else an integer in 1..2^bits - 1, which every reader of GPTQ takes.
    """
    scales, zeros = [], []
    for g in range(int(group.max()) + 1):
        places = (group == g).nonzero()[:, 0]
        factor = prepare(H[places][:, places], damp=0.0, order="activation")
        part = W.float()[:, places][:, factor.order]
        scale, zero = best_scale(part, factor.feedback, factor.weights, bits, symmetric, signed)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def round_searched(
    W: torch.Tensor,
    factor: Factor,
    group: torch.Tensor,
    bits: int,
    symmetric: bool,
    signed: bool = False,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compensate W, f32 (N, K), choosing each group's scale when the walk comes to it.

    Returns codes, uint8 (N, K), scale and zero, f32 (N, G). The groups must lie together in the factor's
    order (natural or group order, or groups counted along the order).
    """
    walk, n_groups = Walk(W, factor), int(group.max()) + 1
    scale, zero = (torch.zeros(len(W), n_groups, device=W.device) for _ in range(2))
    ordered = group[factor.order]
    ids, counts = torch.unique_consecutive(ordered, return_counts=True)
    if len(ids) != n_groups:
        raise ValueError("the groups do not lie together in the order of rounding")
    start = 0
    for g, count in zip(ids.tolist(), counts.tolist(), strict=True):
        end = start + count
        inside = factor.feedback[start:end, start:end]
        scale[:, g], zero[:, g] = best_scale(
            walk.target[:, start:end], inside, factor.weights[start:end], bits, symmetric, signed
        )
        grid = affine_grid(scale, zero, ordered, bits)
        for first in range(start, end, block):
            walk.take(first, min(first + block, end), grid)
        start = end
    return walk.codes(), scale, zero


def best_scale(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    bits: int,
    symmetric: bool,
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero, f32 (N,), that round a group, f32 (N, k), with the least loss.

    A symmetric grid has one level more below zero than above; with `signed`, a scale may be negative, which
    puts that level on the side that needs it.
    """
    shares = torch.tensor(LADDER, device=target.device)
    scale, zero = _range(target, bits, symmetric, shares)
    if signed and symmetric:
        scale, zero = torch.cat([scale, -scale]), zero.repeat(2, 1)
    scale, zero = choose(target, feedback, weights, scale, zero, bits)
    if not symmetric:
        shifts = torch.tensor([0.0, -1.0, 1.0], device=target.device)
        zeros = (zero + shifts[:, None]).clamp(1, 2**bits - 1)
        scale, zero = choose(target, feedback, weights, scale.expand_as(zeros), zeros, bits)
    rungs = torch.tensor(RUNGS, device=target.device)
    scales = _half(scale * rungs[:, None])
    return choose(target, feedback, weights, scales, zero.expand_as(scales), bits)


def choose(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's best of the C candidates scale and zero, f32 (C, N): two of f32 (N,)."""
    best, _ = least(target, feedback, weights, scale, zero, bits)
    rows = torch.arange(len(target), device=target.device)
    return scale[best, rows], zero[best, rows]


def least(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of the C candidates is each row's best, int64 (N,), and the loss that it leaves, f32 (N,).

    The arguments are those of `choose`; the first of equals wins.
    """
    if target.device.type == "cpu":
        return _least_native(target, feedback, weights, scale, zero, bits)
    losses = _losses(target, feedback, weights, scale, zero, bits)
    best = losses.argmin(0)
    return best, losses.gather(0, best[None])[0]


def _least_native(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    best, losses = np.zeros(len(target), np.int64), np.empty(len(target), np.float32)
    levels = np.arange(2**bits, dtype=np.float32)
    pair = (array(scale), array(-scale * zero))
    kernels.choose_block(array(target), array(feedback), array(weights), *pair, levels, best, losses)
    return torch.from_numpy(best), torch.from_numpy(losses)


def _losses(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Return each candidate's loss in each row, f32 (C, N): all of them are rows of one matrix."""
    (count, n), k = scale.shape, target.shape[1]
    rows = target.repeat(count, 1)
    goal, errors = rows.clone(), torch.empty_like(rows)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        one_group = torch.zeros(end - start, dtype=torch.int64, device=target.device)
        grid = affine_grid(scale.reshape(-1, 1), zero.reshape(-1, 1), one_group, bits)
        inside = feedback[start:end, start:end]
        _, errors[:, start:end] = round_block(rows[:, start:end], goal[:, start:end], inside, grid)
        if end < k:
            goal[:, end:] += linear(errors[:, start:end], feedback[start:end, end:].T.contiguous())
    misses = linear(errors, feedback.T.contiguous())
    return (misses.square() * weights).sum(1).reshape(count, n)


def _range(
    W: torch.Tensor, bits: int, symmetric: bool, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero, f32 (C, N), of the grids that span C shares of each row's range."""
    if symmetric:
        return symmetric_range(W, bits, shares)
    top = 2**bits - 1
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    # Without a negative weight the zero-point would be 0, where readers disagree: then 1..top span the range.
    steps = torch.where(low * top > -0.5 * (high - low), float(top - 1), float(top))
    scale = _half(shares[:, None] * (high - low) / steps)
    return scale, (-low * shares[:, None] / scale).round().clamp(1, top)


def symmetric_range(W: torch.Tensor, bits: int, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero, f32 (C, N), of symmetric grids that span shares, f32 (C,), of a row's range."""
    scale = _half(shares[:, None] * W.abs().amax(1) * 2 / (2**bits - 1))
    return scale, torch.full_like(scale, 2.0 ** (bits - 1))


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Return the scales as half precision holds them; none is zero or infinite."""
    return torch.copysign(scale.abs().clamp(_TINY, 65504.0).half().float(), scale)
