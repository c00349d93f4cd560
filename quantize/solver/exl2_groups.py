"""A group of EXL2's columns: its maximum and every output's scale, searched and then fitted to codes.

A step is scale² m, the scale 1..16 of one output, m of the whole group. `search_group` chooses them for
weights that are still to be rounded: each output's best step first, then the m whose sixteen steps serve all
outputs best. `fit` moves them for codes that are known: then the loss is a parabola in every output's step,
and the best m and scales are read off the parabolas.

On the CPU both are native (exl2_kernels.py); with torch alone, for a GPU, they come to the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantize.codecs.exl2 import Group, step_sizes
from quantize.solver import exl2_kernels
from quantize.solver.compensate import array
from quantize.solver.grid import Grid
from quantize.solver.scales import LADDER, choose, least, symmetric_range

MAXIMA = tuple(1.1 * 0.89**i for i in range(8))
"""Maxima tried in a group, as shares of the one with which no output's best step is cut."""
NEARER = (0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
"""Then the maxima tried beside the best, as shares of it."""
JUDGES = 128
"""How many outputs decide on a group's maximum."""
NUDGES = tuple(1 + i / 50 for i in range(-5, 6))
"""Maxima tried when the codes are known, as shares of the present one."""
_SCALES = torch.arange(1, 17, dtype=torch.uint8)
TINY = 2.0**-24
"""The smallest half above zero."""


def search_group(
    target: torch.Tensor, feedback: torch.Tensor, weights: torch.Tensor, bits: int
) -> tuple[torch.Tensor, float]:
    """Return the scales, uint8 (N,), and the m that round a group, f32 (N, k), with the least loss in all.

    For each m, an output takes the best of the three scales around its own best step; the loss of a group is
    that under compensation inside it (quantize/solver/scales.py). `JUDGES` outputs decide on m for all.
    """
    target, feedback = target.contiguous(), feedback.contiguous()
    on_cpu = target.device.type == "cpu"
    ideal = (_ideal_native if on_cpu else _ideal)(target, feedback, weights, bits)
    best_scales = _best_scales_native if on_cpu else _best_scales
    some, speaks_for = _judges(ideal)
    judges, wanted = target[some], ideal[some]

    def best(maxima: list[float]) -> float:
        losses = best_scales(judges, feedback, weights, wanted, maxima, bits)[1]
        return maxima[int((losses * speaks_for).double().sum(1).argmin())]

    top = float(ideal.max()) / 256
    m = best(halves([top * share for share in MAXIMA], bits))
    m = best([m, *halves([m * share for share in NEARER], bits)])
    return best_scales(target, feedback, weights, ideal, [m], bits)[0][0], m


def _ideal(target: torch.Tensor, feedback: torch.Tensor, weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each output's best step, f32 (N,), to within a tenth: those to be had are further apart."""
    shares = torch.tensor(LADDER[::2], device=target.device)
    scale, zero = symmetric_range(target, bits, shares)
    return choose(target, feedback, weights, scale, zero, bits)[0]


def _ideal_native(
    target: torch.Tensor, feedback: torch.Tensor, weights: torch.Tensor, bits: int
) -> torch.Tensor:
    ideal, shares = np.empty(len(target), np.float32), np.array(LADDER[::2], np.float32)
    exl2_kernels.widest(array(target), array(feedback), array(weights), shares, bits, ideal)
    return torch.from_numpy(ideal)


def _judges(ideal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs that decide, int64 (J,), and for how many each speaks, f32 (J,).

    Half of them are those with the largest steps, which a maximum cuts first and alone: a few outputs of
    large weights, missed, can cost more than all others gain. The other half is spread over the rest.
    """
    order = torch.argsort(ideal, descending=True, stable=True)
    if len(order) <= JUDGES:
        return order, torch.ones_like(ideal)
    large, rest = order[: JUDGES // 2], order[JUDGES // 2 :]
    spread = torch.linspace(0, len(rest) - 1, JUDGES - len(large), device=ideal.device).round().long()
    shares = torch.ones(JUDGES, device=ideal.device)
    shares[len(large) :] = len(rest) / len(spread)
    return torch.cat([large, rest[spread]]), shares


def _best_scales(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    ideal: torch.Tensor,
    maxima: Sequence[float],
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each of M maxima each output's best scale, uint8 (M, N), of the three with steps around
    `ideal`, and its loss, f32 (M, N)."""
    tables = _tables(maxima, ideal.device)
    nearest = _nearest(tables, ideal)
    around = (nearest + torch.tensor([0, -1, 1], device=ideal.device)[:, None, None]).clamp(0, 15)
    scale = tables.expand(3, -1, -1).gather(2, around).flatten(1)
    zero = torch.full_like(scale, 2.0 ** (bits - 1))
    best, losses = least(target.repeat(len(maxima), 1), feedback, weights, scale, zero, bits)
    found = around.flatten(1).gather(0, best[None])[0] + 1
    return found.to(torch.uint8).view_as(nearest), losses.view_as(nearest)


def _best_scales_native(
    target: torch.Tensor,
    feedback: torch.Tensor,
    weights: torch.Tensor,
    ideal: torch.Tensor,
    maxima: Sequence[float],
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(maxima), len(target)
    scales, losses = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    group = (array(target), array(feedback), array(weights), array(ideal))
    exl2_kernels.best_scales(*group, np.array(maxima, np.float32), bits, scales, losses)
    return torch.from_numpy(scales), torch.from_numpy(losses)


def group_grid(group: Group, sizes: torch.Tensor) -> Grid:
    """Return the grid of a group's columns, of each output's step, f32 (N,)."""
    scale = sizes[:, None]
    levels = torch.arange(2**group.bits, dtype=torch.float32, device=scale.device)
    of = torch.zeros(group.size, dtype=torch.int64, device=scale.device)
    return Grid(scale, -scale * 2 ** (group.bits - 1), of, levels, uniform=True)


@dataclass(frozen=True)
class Fitted:
    """`scales` uint8 (N,) and `maximum` of a group; `sizes` the steps, f32 (N,), `moved` what was added to
    each, f32 (N,); `slope` what is left of (W - Ŵ) H at the group's columns, f32 (N, k)."""

    scales: torch.Tensor
    maximum: float
    sizes: torch.Tensor
    moved: torch.Tensor
    slope: torch.Tensor


def fit(
    slope: torch.Tensor, shape: torch.Tensor, product: torch.Tensor, scales: torch.Tensor, m: float, bits: int
) -> Fitted:
    """Move a group's maximum m and its scales, uint8 (N,), to their best for the codes.

    `slope` is (W - Ŵ) H at the group's columns, f32 (N, k), `shape` their levels, `product` shape H. The new
    m is the one nearby with the least Σ curvature (step - best)². Without curvature a scale is kept.
    """
    # The present m comes first: another must be better.
    maxima = [m, *halves([m * share for share in NUDGES], bits)]
    return (_fit_native if slope.device.type == "cpu" else _fit)(slope, shape, product, scales, maxima)


def _fit_native(
    slope: torch.Tensor,
    shape: torch.Tensor,
    product: torch.Tensor,
    scales: torch.Tensor,
    maxima: Sequence[float],
) -> Fitted:
    scales, slope = scales.contiguous().clone(), slope.contiguous().clone()
    sizes, moved = np.empty(len(slope), np.float32), np.empty(len(slope), np.float32)
    found = (scales.numpy(), sizes, moved)
    chosen = exl2_kernels.fit(
        slope.numpy(), array(shape), array(product), np.array(maxima, np.float32), *found
    )
    return Fitted(scales, maxima[chosen], torch.from_numpy(sizes), torch.from_numpy(moved), slope)


def _fit(
    slope: torch.Tensor,
    shape: torch.Tensor,
    product: torch.Tensor,
    scales: torch.Tensor,
    maxima: Sequence[float],
) -> Fitted:
    """Do what `_fit_native` does, with torch alone."""
    tables, present = _tables(maxima, slope.device), scales.long() - 1
    before, curvature = tables[0][present], (product * shape).sum(1)
    best = before + torch.where(curvature > 0, (slope * shape).sum(1) / curvature, 0.0)
    nearest = torch.where(curvature > 0, _nearest(tables, best), present)
    totals = (curvature.clamp(min=0) * (tables.gather(1, nearest) - best).square()).double().sum(1)
    chosen = int(totals.argmin())
    sizes = tables[chosen][nearest[chosen]]
    moved = sizes - before
    left = slope - moved[:, None] * product
    return Fitted((nearest[chosen] + 1).to(torch.uint8), maxima[chosen], sizes, moved, left)


def halves(maxima: Sequence[float], bits: int) -> list[float]:
    """Return the different m, as halves hold them, with which every code at every scale is finite."""
    highest = 65504.0 / 256 / 2 ** (bits - 1)
    return sorted(set(torch.tensor(maxima).clamp(TINY, highest).half().tolist()))


def _tables(maxima: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return the sixteen steps, f32 (M, 16), that each of M maxima offers."""
    return step_sizes(_SCALES[:, None], (torch.tensor(maxima) * 256).half()).T.contiguous().to(device)


def _nearest(tables: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return which of sixteen rising steps, f32 (M, 16), is nearest to each wanted one, f32 (N,): int64
    (M, N), the smaller of equals."""
    middles = (tables[:, 1:] + tables[:, :-1]) / 2
    return torch.searchsorted(middles, wanted.expand(len(tables), -1).contiguous())
