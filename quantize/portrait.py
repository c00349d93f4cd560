"""What a linear's inputs look like, in the few figures that tell how hard it is to quantize.

Most of the energy of a language model's activations lies in few directions, and some columns are far larger
than the rest. Both make rounding with the whole Hessian worth more than with its diagonal, and a nearly
singular Hessian is what makes a solver's factorisation fail.

    outliers         columns whose mean square is more than 100 times the median of all columns'
    effective rank   (tr H)^2 / |H|_F^2: the number of directions, were they equally strong, that would give
                     this concentration; between 1 and the number of columns
    condition        of the Hessian with 1 % of its mean diagonal added, as solvers add it: the largest
                     eigenvalue over that addition, which the smallest one hardly ever exceeds
"""

from dataclasses import dataclass

import torch

from quantize.statistics import Statistics

OUTLIER = 100.0
DAMPING = 0.01
_STEPS = 60


@dataclass(frozen=True)
class Portrait:
    """The figures of one input; those of the whole Hessian are None where only the diagonal is known.

    `largest` is the largest column's mean square over the median, infinite where half of the columns are
    dead (always zero).
    """

    n_columns: int
    n_dead: int
    n_outliers: int
    largest: float
    effective_rank: float | None
    condition: float | None


def portray(statistics: Statistics) -> Portrait:
    """Return the figures of an input's statistics."""
    diagonal, hessian = statistics.diagonal.double(), statistics.hessian
    median = diagonal.median()
    return Portrait(
        n_columns=len(diagonal),
        n_dead=int((diagonal == 0).sum()),
        n_outliers=int((diagonal > OUTLIER * median).sum()),
        largest=float(diagonal.max() / median),
        effective_rank=None if hessian is None else _effective_rank(hessian),
        condition=None if hessian is None else _condition(hessian),
    )


def _effective_rank(hessian: torch.Tensor) -> float:
    energy = float(hessian.square().sum(dtype=torch.float64))
    return float(hessian.diagonal().double().sum()) ** 2 / energy if energy else 0.0


def _condition(hessian: torch.Tensor) -> float:
    damping = DAMPING * float(hessian.diagonal().double().mean())
    return (_largest_eigenvalue(hessian) + damping) / damping if damping else 1.0


def _largest_eigenvalue(hessian: torch.Tensor) -> float:
    """Iterate from the diagonal, which already points at the largest columns; never above the true value."""
    vector = hessian.diagonal().sqrt()
    for _ in range(_STEPS):
        vector = hessian @ (vector / vector.norm())
    unit = vector / vector.norm()
    return float(unit @ (hessian @ unit))
