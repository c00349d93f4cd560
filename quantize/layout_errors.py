"""How much each layout would cost a linear, without quantizing it under each: some of its rows stand for all.

A row is taken with a chance in proportion to its energy w H wᵀ, so that each row taken speaks for the same
share of the output's energy, and the mean of the rows' lost shares estimates that of the matrix. (Rows taken
evenly would leave it to chance whether the few that hold most of the energy are among them.) The rows are
rounded by the solver itself, without its rounds of refit and descent, by one factorization for all layouts.

Two things bias it. A group's maximum is shared by the rows taken and not by all, so scales fit a little
better; without refit and descent errors are larger. Both are much the same for all layouts of a matrix;
docs/exl2.md has the measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantize.errors import UsageError
from quantize.layouts import Layout
from quantize.solver.descend import loss
from quantize.solver.exl2 import linear_faults, quantize_matrix
from quantize.solver.factor import Factor, prepare

ROWS = 96


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
    taken, weight = sample(energies, rows)
    found = []
    for each in layouts:
        made = quantize_matrix(W[taken], H, factor, each.groups(W.shape[1]), "fast").linear
        share = loss(W[taken], made.weights(), H) / energies[taken]
        error = float((share * weight).double().sum())
        found.append(LayoutError(each, each.total_bits(*W.shape), error))
    return Prediction(energy, tuple(found))


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
