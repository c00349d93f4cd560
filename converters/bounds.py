"""What counts as right: the bounds of the proof, per quant type.

A type's row says how far a file of that type may be from the checkpoint. Absolute KL divergence differs
tenfold between models (small models are hurt most), so the bounds are wide: they catch what is broken, not
what is mediocre. Where a plan predicted the loss of its file, the prediction gives the bound.

    relative_error    |decoded - source| / |source| of one tensor
    weights_kl        mean KL of the file's weights in the reference forward
    activations_kl    mean KL of the runtime to that forward: it rounds activations to what its kernels
                      for the type take (F16: f16, BF16: bf16, quantized: 8 bits in blocks of 32 or 256)
"""

from collections.abc import Iterable
from dataclasses import dataclass

GAIN = (0.4, 1.6)
PREDICTION_FACTOR = 3.0


@dataclass(frozen=True)
class TypeBound:
    """One row of the table."""

    relative_error: float
    weights_kl: float
    activations_kl: float


@dataclass(frozen=True)
class FileBound:
    """The bounds of a whole file; `runtime_kl` is for the runtime against the checkpoint."""

    weights_kl: float
    activations_kl: float

    @property
    def runtime_kl(self) -> float:
        return self.weights_kl + self.activations_kl


BOUNDS = {
    "F32": TypeBound(0.0, 1e-8, 1e-5),
    "BF16": TypeBound(0.01, 1e-3, 1e-2),
    "F16": TypeBound(0.001, 1e-5, 1e-5),
    "Q8_0": TypeBound(0.02, 1e-2, 1e-2),
}


def bound_of(quant: str) -> TypeBound:
    return BOUNDS[quant]


def file_bound(quants: Iterable[str], predicted_kl: float | None = None) -> FileBound:
    rows = [bound_of(quant) for quant in set(quants)]
    weights = max(row.weights_kl for row in rows)
    return FileBound(weights, max(row.activations_kl for row in rows))
