"""Matrix products in f32 on whatever is fastest: on processors oneDNN, else torch's own.

torch multiplies f32 matrices on processors with MKL, which on a processor of another maker leaves half of the
vector unit idle: measured on one with AVX-512, 105 Gflop/s a core against 243 with oneDNN, which torch brings
along and uses for compiled models. Both compute in f32 throughout, and sum in other orders.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _one_dnn() -> _Product | None:
    """Return oneDNN's x w^T for dense tensors, None where this torch has none."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None

    def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = operator(inputs, weight, None, "none", [], "")
        return result

    return product


_ONE_DNN = _one_dnn()


def linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return inputs weight^T, f32 (n, rows), of f32 (n, K) and (rows, K) on one device."""
    if _ONE_DNN is None or inputs.device.type != "cpu" or not len(inputs):
        return functional.linear(inputs, weight)
    return _ONE_DNN(inputs, weight)


def add_columns_product_(total: torch.Tensor, inputs: torch.Tensor, first: int) -> None:
    """Add to `total`, f32 (w, K - first), the product of columns first..first+w with all from `first` on.

    `inputs` are f32 (K, n): one column of x a row, which should be contiguous.
    """
    rest = inputs[first:]
    total += linear(rest[: len(total)], rest)
