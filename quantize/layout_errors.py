"""How much each layout would cost a linear, without quantizing it under each.

Compensated rounding loses Σ_k D_k e_k², D_k what is left of H's diagonal once the columns after k make up for
what they can (quantize/solver/factor.py), e_k the rounding error of column k. Whatever layout a column is in,
e_k follows from its bits and its group alone. So every pair of bits and group size is rounded once, without
compensation, and the losses of the columns are added up as the layouts say: a dozen roundings of the
simplest kind for twenty layouts. What that leaves out (columns have moved by what was compensated, sixteen
scales, a maximum shared by all outputs, the damping in D) is much the same for all layouts of a linear. It is
found by really quantizing it under the middle one, and all others are scaled alike.

Some rows stand for all. A row is taken with a chance in proportion to what rounding may cost it (`rows_for`).
(Rows taken evenly would leave it to chance whether the few that lose most are among them.)

A bias stays: a group's maximum is shared by the rows taken and not by all, so scales fit a little better;
without refit and descent errors are larger. docs/exl2.md has the measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from quantize.errors import UsageError
from quantize.layouts import Layout
from quantize.solver.descend import loss
from quantize.solver.exl2 import linear_faults, quantize_matrix
from quantize.solver.factor import Factor, prepare

PREDICTING = 5
"""Raised whenever predictions come out otherwise: kept ones are told apart by it."""
ROWS = 96
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Steps that are tried in a group, as shares of the one with which nothing is cut."""


@dataclass(frozen=True)
class LayoutError:
    """`bits` is what the linear takes in the file, `error` the predicted tr(E H Eᵀ) / tr(W H Wᵀ)."""

    layout: Layout
    bits: int
    error: float


@dataclass(frozen=True)
class Prediction:
    """Each layout's error, and `energy`, tr(W H Wᵀ): error * energy is the loss in units of the output."""

    energy: float
    errors: tuple[LayoutError, ...]


def predict(
    weights: Mapping[str, torch.Tensor],
    H: torch.Tensor,
    layouts: Mapping[str, Sequence[Layout]],
    rows: int = ROWS,
    damp: float = 0.05,
) -> dict[str, Prediction]:
    """Predict the errors of all linears W (N, K) of one input, with H f32 (K, K), each under its layouts.

    A linear of no more than `rows` rows is measured whole. The same arguments give the same numbers. Raises
    UsageError, with all reasons, before any work, and HessianError where H cannot be factored.
    """
    reasons = [
        fault for name, W in weights.items() for fault in linear_faults(name, W, H, layouts.get(name, ()))
    ]
    if reasons:
        raise UsageError("the layouts of these linears cannot be judged", reasons=reasons)
    factor = prepare(H, damp=damp, order="activation", name=", ".join(weights))
    return {name: _predict(W.float(), H, factor, layouts[name], rows) for name, W in weights.items()}


def _predict(
    W: torch.Tensor, H: torch.Tensor, factor: Factor, layouts: Sequence[Layout], rows: int
) -> Prediction:
    energies = loss(W, torch.zeros_like(W), H)
    energy = float(energies.double().sum())
    if energy <= 0:
        errors = tuple(LayoutError(each, each.total_bits(*W.shape), 0.0) for each in layouts)
        return Prediction(0.0, errors)
    taken, count = rows_for(W, H, rows)
    some = W[taken]
    per_energy = (count / energy)[:, None]
    estimates = _estimates(some[:, factor.order], factor.weights, per_energy, layouts)
    middle = len(layouts) // 2
    made = quantize_matrix(some, H, factor, layouts[middle].groups(W.shape[1]), "fast").linear
    measured = float((loss(some, made.weights(), H)[:, None] * per_energy).double().sum())
    level = measured / estimates[middle] if estimates[middle] > 0 else 1.0
    found = [
        LayoutError(each, each.total_bits(*W.shape), level * estimate)
        for each, estimate in zip(layouts, estimates, strict=True)
    ]
    return Prediction(energy, tuple(found))


def _estimates(
    target: torch.Tensor, weights: torch.Tensor, per_energy: torch.Tensor, layouts: Sequence[Layout]
) -> list[float]:
    """Return the lost share under each layout, of rows f32 (n, K) in the stored order, but for a factor.

    `per_energy`, f32 (n, 1), is what a row's loss counts.
    """
    columns: dict[tuple[int, int], torch.Tensor] = {}
    totals = []
    for each in layouts:
        total, start = 0.0, 0
        for part, width in zip(each.parts, each.widths(target.shape[1]), strict=True):
            key = part.bits, part.group_size
            if key not in columns:
                columns[key] = (column_losses(target, weights, *key) * per_energy).double().sum(0)
            total += float(columns[key][start : start + width].sum())
            start += width
        totals.append(total)
    return totals


def column_losses(target: torch.Tensor, weights: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return D_k e_k², f32 (n, K), of rows f32 (n, K) rounded in groups, `weights` f32 (K,) the D.

    Of the steps tried, each row takes in each group the one with the least loss. Groups begin at column 0,
    where a layout may begin them elsewhere; the last may be short.
    """
    n_columns, half = target.shape[1], 2 ** (bits - 1)
    missing = -n_columns % group_size
    x = functional.pad(target, (0, missing)).reshape(len(target), -1, group_size)
    counts = functional.pad(weights, (0, missing)).reshape(-1, group_size)
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
    least = best = torch.empty(0)
    for share in SHARES:
        step = unit * share
        losses = (x - (x / step).round().clamp(-half, half - 1) * step).square() * counts
        total = losses.sum(-1, keepdim=True)
        if not len(best):
            least, best = total, losses
            continue
        best = torch.where(total < least, losses, best)
        least = torch.minimum(total, least)
    return best.reshape(len(target), -1)[:, :n_columns]


def rows_for(
    W: torch.Tensor, H: torch.Tensor | None, rows: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of W f32 (N, K) that stand for all, int64 (n,), and how many each stands for, f32 (n,).

    They are sampled, times their `weights`, half by Σ_k w_k² H_kk, what independent errors in proportion to a
    row's weights would cost it, half by Σ_k w_k². Energies w H wᵀ would not do, nor would H alone: where one
    input is huge, the row that answers to it has nearly all of these, and next to nothing of the loss, for
    errors under that input are compensated first. H is f32 (K, K), None for the identity.
    """
    each = torch.ones(len(W), device=W.device) if weights is None else weights
    plain = W.square().sum(1) * each
    costs = plain / plain.sum()
    if H is not None:
        spread = (W.square() * H.diagonal()).sum(1) * each
        costs = costs + spread / spread.sum().clamp(min=1e-30)
    taken, share = sample(costs, rows)
    count = (share.double() * costs.double().sum() / costs[taken].double()).float()
    return taken, count * each[taken]


def sample(energies: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows, int64 (n,), rising, and the share of the energy that each speaks for, f32 (n,), in all 1.

    With energies f32 (N,) laid end to end, `rows` points at even distances pick the rows that they fall into;
    a row that holds several counts once, and speaks for them all. No more rows than `rows`: every row itself.
    """
    total = energies.double().sum()
    if len(energies) <= rows:
        taken = (energies > 0).nonzero()[:, 0]
        return taken, (energies[taken].double() / total).float()
    points = (torch.arange(rows, device=energies.device, dtype=torch.float64) + 0.5) / rows * total
    hit = torch.searchsorted(energies.double().cumsum(0), points).clamp(max=len(energies) - 1)
    taken, counts = torch.unique_consecutive(hit, return_counts=True)
    return taken, (counts / rows).float()
