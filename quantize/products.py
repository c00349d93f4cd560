"""Products of f32 matrices, at the processor's speed and with no rounding of the inputs.

Calibration and every proof are mostly matrix products. On CPUs torch hands them to MKL, which leaves the
wide vectors of some makers' processors unused; oneDNN, in the same wheel, uses them (on an AMD EPYC with
AVX-512: 465 against 212 GFLOP/s on two cores). Both compute in f32 with f32 sums, in another order. oneDNN
is used where torch has it and the product is large enough to pay for laying the operands out anew.

`gram` is the product of a matrix with itself. It is symmetric, so only panels on and above the diagonal are
computed and the rest is mirrored: with four panels five eighths of the work.
"""

import torch
from torch.nn import functional

_WORTH_IT = 1 << 24  # multiply-adds; a smaller product is done before its layout is changed
_PANELS = 4
_PANEL_LEAST = 128  # columns; narrower panels lose more speed than they save work


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x weightᵀ, f32 (..., N), of f32 x (..., K) and weight (N, K) on one device."""
    rows = x.numel() // x.shape[-1]
    if rows * weight.numel() < _WORTH_IT or not has_onednn(x.device):
        return functional.linear(x, weight)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def gram(x: torch.Tensor) -> torch.Tensor:
    """Return xᵀx, f32 (K, K) and exactly symmetric, of f32 x (n, K)."""
    columns = x.T.contiguous()  # (K, n): both operands of a product have their sums along rows
    n = len(columns)
    step = max(-(-n // _PANELS), _PANEL_LEAST)
    result = x.new_empty(n, n)
    for start in range(0, n, step):
        end = min(start + step, n)
        result[start:end, start:] = linear(columns[start:end], columns[start:])
        result[end:, start:end] = result[start:end, end:].T
        tile = result[start:end, start:end]  # its two halves may differ in the order of their sums
        tile.copy_(tile.triu() + tile.triu(1).T)
    return result


def has_onednn(device: torch.device) -> bool:
    """Return whether products on a device go through oneDNN."""
    there = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return device.type == "cpu" and there
