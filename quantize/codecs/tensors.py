"""The searches of the legacy types, the K-quants and IQ4 in torch operations: for tensors on a GPU.

The same algorithms as in `quantize.codecs.native`, and the same bits: there a lane is one of 64 blocks, here
it is one of all blocks, and a position of all of them is one operation. A GPU's kernels are started from
here one by one, so no product is fused with an addition and sums run in ggml's order. Two of torch's habits
must be avoided, which `over` does: a tensor divided by a Python number is multiplied with its reciprocal on
a GPU, and a Python number divided by a tensor everywhere.

Shapes: x and weights are float32 (n, B), position by lane; codes come back as int32 (n, B).
"""

from collections.abc import Sequence

import numpy as np
import torch

Tensor = torch.Tensor


def over(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Divide in float32, correctly rounded; one of the two is a tensor and says where."""
    device = (numerator if isinstance(numerator, Tensor) else torch.as_tensor(denominator)).device
    above, below = (
        side if isinstance(side, Tensor) else torch.full((), side, dtype=torch.float32, device=device)
        for side in (numerator, denominator)
    )
    return torch.div(above, below)


def root(values: Tensor) -> Tensor:
    """Return the square root, correctly rounded: torch's own float32 root on a CPU is not."""
    return values.double().sqrt_().float()


def nearest(values: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even, as int32 (ggml `nearest_int`, also outside its domain).

    What is no number gives 0: the bits of a NaN are a CPU's own, and a GPU's are others.
    """
    shifted = (values + 12582912.0).nan_to_num_(12582912.0, torch.inf, -torch.inf)
    return (shifted.view(torch.int32) & 0x7FFFFF) - 0x400000


def _rung(first: float, step: float, k: int, top: int) -> float:
    """Return first + step * k + top in float32 arithmetic."""
    return float(np.float32(first) + np.float32(step) * np.float32(k) + np.float32(top))


def total(terms: Tensor) -> Tensor:
    """Sum over dimension 0 in its order."""
    result = terms[0].clone()
    for term in terms[1:]:
        result += term
    return result


def _fit_sums(x: Tensor, weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σwl, Σwl², Σwlx for codes l (n, B)."""
    level = codes.float()
    weighted = weights * level
    return total(weighted), total(weighted * level), total(weighted * x)


def _scale_sums(x: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σwxl and Σwl² for codes or values l (n, B)."""
    level = values.float()
    return total(weights * x * level), total(weights * level * level)


def _keep(wins: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """Return the new where it wins, the old elsewhere."""
    return [torch.where(wins, a, b) for a, b in zip(new, old, strict=True)]


def affine(
    x: Tensor, weights: Tensor, top: int, ladder: tuple[float, float, int], absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0..top, scale and the minimum's negative of each lane; see `native.affine`."""

    def codes_by(inverse: Tensor, low: Tensor) -> Tensor:
        return nearest(inverse * (x - low)).clamp(0, top)

    def error(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        miss = scale * codes.float() + low - x
        return total(weights * (miss.abs() if absolute else miss * miss))

    low, high = _lowest(x), x.amax(dim=0)
    sum_w, sum_x = total(weights), total(weights * x)
    flat = high <= low
    inverse = over(float(top), high - low)
    scale, codes = over(1.0, inverse), codes_by(inverse, low)
    best = torch.where(flat, -torch.inf, error(codes, scale, low))
    for k in range(ladder[2] + 1):
        rung = over(_rung(ladder[0], ladder[1], k, top), high - low)
        trial = codes_by(rung, low)
        sum_l, sum_ll, sum_lx = _fit_sums(x, weights, trial)
        det = sum_w * sum_ll - sum_l * sum_l
        fit_low = over(sum_ll * sum_x - sum_l * sum_lx, det)
        fit_scale = over(sum_w * sum_lx - sum_x * sum_l, det)
        above = fit_low > 0
        fit_scale = torch.where(above, over(sum_lx, sum_ll), fit_scale)
        fit_low = torch.where(above, 0.0, fit_low)
        missed = error(trial, fit_scale, fit_low)
        wins = (det > 0) & (missed < best)
        best, scale, codes, low = _keep(wins, (missed, fit_scale, trial, fit_low), (best, scale, codes, low))
    return torch.where(flat, 0, codes), torch.where(flat, 0.0, scale), -low


def _lowest(x: Tensor) -> Tensor:
    """Return each lane's smallest number, at most zero; of equal zeros the first, sign and all."""
    low = x[0]
    for row in x[1:]:
        low = torch.where(row < low, row, low)
    return torch.where(low > 0, 0.0, low)


def largest_of(x: Tensor) -> Tensor:
    """Return each lane's largest number, at least zero, and of zeros the positive one."""
    largest = torch.zeros_like(x[0])
    for row in x:
        largest = torch.where(row > largest, row, largest)
    return largest


def extremes(x: Tensor) -> Tensor:
    """Return each lane's number of largest magnitude, the first of equals."""
    extreme = torch.zeros_like(x[0])
    for row in x:
        extreme = torch.where(row.abs() > extreme.abs(), row, extreme)
    return extreme


def symmetric(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return codes 0..2*top-1 and scale of each lane; see `native.symmetric`."""

    def codes_by(inverse: Tensor) -> Tensor:
        return nearest(inverse * x).clamp(-top, top - 1)

    extreme = extremes(x)
    codes = codes_by(over(float(-top), extreme))
    sum_lx, sum_ll = _scale_sums(x, weights, codes)
    scale = torch.where(sum_ll != 0, over(sum_lx, sum_ll), 0.0)
    best = scale * sum_lx
    for k in (*range(-9, 0), *range(1, 10)):
        trial = codes_by(over(-_rung(0.0, 0.1, k, top), extreme))
        sum_lx, sum_ll = _scale_sums(x, weights, trial)
        wins = (sum_ll > 0) & (sum_lx * sum_lx > best * sum_ll)
        fit = over(sum_lx, sum_ll)
        best, scale, codes = _keep(wins, (fit * sum_lx, fit, trial), (best, scale, codes))
    empty = extreme.abs() < 1e-15
    return torch.where(empty, 0, codes + top), torch.where(empty, 0.0, scale)


def _move(
    x: Tensor, weights: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], low: int, top: int, strict: bool
) -> tuple[Tensor, Tensor, bool]:
    """Let each code move once to where it is best with all others held; `codes` changes in place."""
    sum_lx, sum_ll = sums
    moves = torch.zeros((), dtype=torch.bool, device=x.device)
    for value, weight, code in zip(x, weights, codes, strict=True):
        old = code.float()
        rest_lx, rest_ll = sum_lx - weight * value * old, sum_ll - weight * old * old
        moved_to = nearest(over(value * rest_ll, rest_lx)).clamp(low, top)
        new = moved_to.float()
        new_lx, new_ll = rest_lx + weight * value * new, rest_ll + weight * new * new
        better = new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll
        wins = (rest_lx > 0) & ((rest_ll if strict else new_ll) > 0) & (moved_to != code) & better
        code.copy_(torch.where(wins, moved_to, code))
        sum_lx, sum_ll = _keep(wins, (new_lx, new_ll), (sum_lx, sum_ll))
        moves |= wins.any()
    return sum_lx, sum_ll, bool(moves)


def _polish(
    x: Tensor, weights: Tensor, codes: Tensor, low: int, top: int, strict: bool
) -> tuple[Tensor, Tensor]:
    """Make up to five passes of `_move`, and return Σwlx and Σwl²."""
    sum_lx, sum_ll = _scale_sums(x, weights, codes)
    for _ in range(5):
        sum_lx, sum_ll, moved = _move(x, weights, codes, (sum_lx, sum_ll), low, top, strict)
        if not moved:
            break
    return sum_lx, sum_ll


def descend(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return codes 0..2*top-1 and scale of each lane from the plain rounding on; see `native.symmetric`."""
    extreme = extremes(x)
    codes = nearest(over(float(-top), extreme) * x).clamp(-top, top - 1)
    sum_lx, sum_ll = _polish(x, weights, codes, -top, top - 1, strict=False)
    empty = extreme.abs() < 1e-15
    scale = torch.where((sum_ll > 0) & ~empty, over(sum_lx, sum_ll), 0.0)
    return torch.where(empty, 0, codes + top), scale


def positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return codes 0..top and scale of numbers that are not negative; see `native.affine`."""

    def error(inverse: Tensor) -> Tensor:
        miss = x - over(1.0, inverse) * nearest(inverse * x).clamp(max=top).float()
        return total(weights * miss * miss)

    largest = largest_of(x)
    inverse = over(float(top), largest)
    best = error(inverse)
    for k in (*range(-4, 0), *range(1, 5)):
        rung = over(_rung(0.0, 0.1, k, top), largest)
        missed = error(rung)
        best, inverse = _keep(missed < best, (missed, rung), (best, inverse))
    codes = nearest(inverse * x).clamp(max=top)
    sum_lx, sum_ll = _polish(x, weights, codes, -(1 << 22), top, strict=True)
    empty = largest < 1e-15
    scale = torch.where((sum_ll > 0) & ~empty, over(sum_lx, sum_ll), 0.0)
    return torch.where(empty, 0, codes), scale


def by_importance(x: Tensor, importance: Tensor, variance: Tensor) -> Tensor:
    """Return importance * sqrt(variance + x²)."""
    return importance * root(variance + x * x)
