"""Products of f32 matrices, at the processor's speed and with no rounding of the inputs.

Calibration and every proof are mostly matrix products. On CPUs torch hands them to MKL, which leaves the
wide vectors of some makers' processors unused; oneDNN, in the same wheel, uses them (on an AMD EPYC with
AVX-512: 465 against 212 GFLOP/s on two cores). Both compute in f32 with f32 sums, in another order. oneDNN
is used where torch has it and the product is large enough to pay for laying the operands out anew.
"""

import torch
from torch.nn import functional

_WORTH_IT = 1 << 24  # multiply-adds; a smaller product is done before its layout is changed


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x weightᵀ, f32 (..., N), of f32 x (..., K) and weight (N, K) on one device."""
    rows = x.numel() // x.shape[-1]
    if rows * weight.numel() < _WORTH_IT or not has_onednn(x.device):
        return functional.linear(x, weight)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def has_onednn(device: torch.device) -> bool:
    """Return whether products on a device go through oneDNN."""
    there = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return device.type == "cpu" and there
