"""ExLlamaV2's own rounding of a linear, restated for the CPU: what ours is compared with.

Source of the facts: exllamav2 0.3.2, `conversion/adaptivegptq.py`, `quantize_range` and its CUDA kernels. In
the order of H's diagonal, largest first, group after group:

    scales     from each output's largest magnitude; the group's maximum times 97 shares in 0.70..1.20, that
               with the least sum of |error|^3.5 of plain rounding, in weights that hold all errors so far
    codes      one input after the other, to nearest; the error goes to the inputs behind it, weighed by the
               Cholesky factor of the inverse of H, which is damped by 0.12 of its mean diagonal
    values     as the runtime will compute them, in half precision

All is f32, as there. What differs: |error|^3.5 is e³ √e, where the CUDA kernel takes an approximate power,
and sums have another order; ties aside, the same codes come out (tests/scripts/test_exllamav2.py has the
plain statement in double).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantize.codecs.exl2 import Exl2Linear, Group, step_sizes
from quantize.codecs.native.arithmetic import ONE, ZERO, Bytes, Floats, half
from quantize.codecs.native.compiled import native

DAMP, LEAST_DAMP, ATTEMPTS = 0.12, 1e-5, 10
SHARES = np.array([1.2 * (i / 96) + 0.7 * (1 - i / 96) for i in range(97)], dtype=np.float32)
"""The maxima tried in a group, as shares of the one that reaches every weight."""
_COLUMNS = 256  # outputs at a time: their part of a group stays in the second-level cache
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves no bits behind the point


@dataclass(frozen=True)
class Inverse:
    """`perm`, int64 (K,), is the input that comes k-th; `upper`, f32 (K, K), the upper Cholesky factor of the
    inverse of the damped Hessian in that order."""

    perm: torch.Tensor
    upper: torch.Tensor


def invert(H: torch.Tensor) -> Inverse:
    """Order, damp and invert H, f32 (K, K): the sum of x xᵀ over a row's tokens, its mean over rows.

    Damping is added again where that fails, up to ten times; then ValueError.
    """
    perm = torch.argsort(H.diagonal(), descending=True)
    damped = H[perm][:, perm]
    damp = max(DAMP * float(damped.diagonal().mean()), LEAST_DAMP)
    for _ in range(ATTEMPTS):
        damped.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return Inverse(perm, upper.contiguous())
    raise ValueError("a Hessian that cannot be inverted")


def quantize(W: torch.Tensor, inverse: Inverse, groups: tuple[Group, ...]) -> Exl2Linear:
    """Round a linear W (N, K) in these groups of inputs."""
    left = W.float()[:, inverse.perm].T.contiguous()
    codes, errors = torch.empty(left.shape, dtype=torch.uint8), torch.empty_like(left)
    upper, scales, maxima, start = inverse.upper, [], [], 0
    for group in groups:
        end = start + group.size
        scale, maximum = find_scales(left[start:end], group.bits)
        steps = step_sizes(scale[:, None], maximum[None])[:, 0].contiguous()
        zero = np.float32(2 ** (group.bits - 1))
        _round_range(
            left.numpy(), codes.numpy(), errors.numpy(), upper.numpy(), steps.numpy(), zero, start, end
        )
        left[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
        scales.append(scale)
        maxima.append(maximum)
        start = end
    return Exl2Linear(codes.T.contiguous(), groups, torch.stack(scales, 1), torch.stack(maxima), inverse.perm)


def find_scales(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, uint8 (N,), and q_scale_max, f16 (), of a group's weights f32 (k, N)."""
    base = (x.abs().amax(0) + 1e-12) / ((2**bits - 1) / 2)
    peak = base.max()
    scale = ((base / peak).sqrt() * 16).round().clamp(1, 16)
    steps, losses = (scale / 16).square() * peak, np.empty(len(SHARES))
    _losses(x.numpy(), steps.numpy(), np.float32(2 ** (bits - 1)), SHARES, losses)
    best = float(SHARES[losses.argmin()])
    return scale.to(torch.uint8), (peak * best).half()


@native
def _losses(x: Floats, steps: Floats, zero: np.float32, shares: Floats, losses: Any) -> None:
    """Set Σ |error|^3.5, f64 (S,), of weights (k, N) plainly rounded with steps (N,) times each share."""
    step, inverse = np.empty(_COLUMNS, np.float32), np.empty(_COLUMNS, np.float32)
    total = np.empty(_COLUMNS, np.float32)
    losses[:] = 0
    for first in range(0, x.shape[1], _COLUMNS):
        width = min(_COLUMNS, x.shape[1] - first)
        for i in range(len(shares)):
            for n in range(width):
                step[n] = steps[first + n] * shares[i]
                inverse[n] = ONE / step[n]
                total[n] = ZERO
            for k in range(len(x)):
                row = x[k, first : first + width]
                for n in range(width):
                    level = (row[n] * inverse[n] + _ROUNDER) - _ROUNDER
                    level = min(max(level, -zero), zero - ONE)
                    error = abs(level * step[n] - row[n])
                    total[n] += error * error * error * np.sqrt(error)
            for n in range(width):
                losses[i] += total[n]


@native
def _round_range(
    left: Floats,
    codes: Bytes,
    errors: Floats,
    upper: Floats,
    steps: Floats,
    zero: np.float32,
    start: int,
    end: int,
) -> None:
    """Round the inputs start..end of `left` (K, N), handing errors on within the range."""
    for k in range(start, end):
        for n in range(left.shape[1]):
            # A step that halves cannot hold is zero, and so is every value.
            level = (left[k, n] / steps[n] + _ROUNDER) - _ROUNDER if steps[n] > 0 else ZERO
            level = min(max(level, -zero), zero - ONE)
            codes[k, n] = np.uint8(level + zero)
            errors[k, n] = (left[k, n] - half(level * steps[n])) / upper[k, k]
        for j in range(k, end):
            share = upper[k, j]
            for n in range(left.shape[1]):
                left[j, n] -= share * errors[k, n]
