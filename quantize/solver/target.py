"""Weights that make up for moved inputs.

Once earlier layers are quantized, a linear is given x^ where the original model had x. The weights whose
outputs are nearest to the original ones, min E[|W x - W' x^|²], are W Cᵀ H⁻¹ with C = E[x^ xᵀ] and
H = E[x^ x^ᵀ] (Qronos, arXiv 2505.11695; GPTAQ, arXiv 2504.02692, uses the same C). What is rounded is then
W' in place of W. Taken in full, that fits the calibration text's noise too; so the correction is damped
towards W, and only a share alpha of it is taken.
"""

import torch

from quantize.errors import HessianError, UsageError
from quantize.products import linear


def shifted_target(
    W: torch.Tensor, H: torch.Tensor, C: torch.Tensor, alpha: float = 0.5, damp: float = 0.01
) -> torch.Tensor:
    """Return W + alpha W (Cᵀ - H) (H + damp mean(diag H) I)⁻¹, f32 (N, K), for W f32 (N, K).

    H is E[x^ x^ᵀ] and C is E[x^ xᵀ], f32 (K, K), rows of the quantized stream. Columns whose input is
    always zero keep their weights. Raises UsageError for a share outside 0..1 and HessianError if the damped
    H cannot be factored.
    """
    if not 0 <= alpha <= 1 or not 0 <= damp < 1:
        raise UsageError(f"alpha {alpha} and damping {damp}: shares in 0..1 are expected")
    live = H.diagonal() > 0
    damped = H.double().clone()
    mean = float(damped.diagonal()[live].mean()) if bool(live.any()) else 1.0
    damped.diagonal().add_(damp * mean)
    damped.diagonal()[~live] = mean
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise HessianError(
            f"H cannot be factored with a damping of {damp:.3g}", hint="take a larger damping, or more tokens"
        )
    moved = linear(W.float(), (C - H).contiguous())  # W (C - H)ᵀ = W (Cᵀ - H)
    correction = torch.cholesky_solve(moved.double().T, root).T
    correction[:, ~live] = 0.0
    return W.float() + alpha * correction.float()
