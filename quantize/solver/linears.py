"""The linears of one input, quantized for GPTQ: from weights and a Hessian to codes, scales and zero-points.

One factorization serves all linears that share the input. Then, for each, by the effort:

    fast      searched scales, compensated rounding
    default   and twice: scales refitted to the codes, codes to the scales
    high      and the same six times

The scales are half precision throughout, and what the loss is measured with is what a reader computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from quantize.errors import UsageError
from quantize.products import linear
from quantize.solver.compensate import compensate
from quantize.solver.descend import descend, in_place, refit_scales
from quantize.solver.factor import Factor, Order, column_order, prepare
from quantize.solver.grid import affine_grid
from quantize.solver.scales import group_index, round_searched, search_scales

Effort = Literal["fast", "default", "high"]
ROUNDS: Mapping[str, int] = {"fast": 0, "default": 2, "high": 6}


@dataclass(frozen=True)
class Settings:
    """What to make: codes of `bits` (2, 3, 4 or 8) in groups of `group_size` columns (0: one group a row).

    `symmetric` fixes the zero-point at 2^(bits - 1). With `desc_act` the groups themselves are counted along
    falling diagonal of H, and g_idx says so; without, they are plain, and `order` is only that of rounding.
    `damp` is the share of H's mean diagonal that is added to it: it keeps the rounding from fitting the noise
    of a short calibration text. `signed_scales` lets a symmetric group's scale be negative, which is worth
    a tenth of the error: its one level more lies where it is needed. Readers multiply by a scale as it is.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False
    order: Order = "group"
    effort: Effort = "default"
    damp: float = 0.05
    signed_scales: bool = True


@dataclass(frozen=True)
class Input:
    """What all linears of an input share: their Hessian, factored, and g_idx, int64 (K,)."""

    factor: Factor
    group: torch.Tensor
    settings: Settings


@dataclass(frozen=True)
class QuantizedLinear:
    """Rows of a linear for GPTQ: the weight of column k is scales[n, g] * (codes - zeros[n, g]).

    codes uint8 (N, K), scales f16 (N, G), zeros uint8 (N, G), 1 at the least; g_idx int32 (K,) holds each
    column's g. `lost` is tr(E H Eᵀ) and `energy` tr(W H Wᵀ).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    lost: float
    energy: float

    @property
    def error(self) -> float:
        """The share of the output's energy that is lost; 0 if there is none."""
        return self.lost / self.energy if self.energy > 0 else 0.0

    def weights(self) -> torch.Tensor:
        """Return Ŵ, f32 (N, K), as a reader computes it."""
        group = self.g_idx.long()
        steps = self.codes.float() - self.zeros.float()[:, group]
        return self.scales.float()[:, group] * steps


def quantize_linears(
    weights: Mapping[str, torch.Tensor], H: torch.Tensor, settings: Settings
) -> dict[str, QuantizedLinear]:
    """Quantize all linears W (N, K) of one input with the Hessian H, f32 (K, K), on H's device.

    The same arguments give the same codes. Raises UsageError for settings or shapes that do not fit, before
    any work, and HessianError where H cannot be factored.
    """
    _check(weights, H, settings)
    shared = prepare_input(H, settings, ", ".join(weights))
    return {name: quantize_rows(W, shared) for name, W in weights.items()}


def prepare_input(H: torch.Tensor, settings: Settings, name: str = "") -> Input:
    """Factor a Hessian, f32 (K, K), for `quantize_rows`; raises HessianError. `name` is for messages."""
    order: Order = "activation" if settings.desc_act else settings.order
    factor = prepare(H, damp=settings.damp, order=order, group_size=settings.group_size, name=name)
    along = column_order(H.diagonal().clamp(min=0), "activation") if settings.desc_act else None
    return Input(factor, group_index(len(H), settings.group_size, along, H.device), settings)


def quantize_rows(W: torch.Tensor, shared: Input) -> QuantizedLinear:
    """Quantize rows W (N, K) of a linear on the Hessian's device; several threads may share the input.

    Rows do not influence each other, but for how sums are ordered: see `compensate`.
    """
    W, settings, order = W.float(), shared.settings, shared.factor.order
    codes, scale, zero = _rounded(W, shared)
    # From here on in the order of rounding, in which the Hessian is.
    ordered, codes = W[:, order].contiguous(), codes[:, order].contiguous()
    grid = affine_grid(scale, zero, shared.group[order], settings.bits)
    for _ in range(ROUNDS[settings.effort]):
        grid = refit_scales(ordered, codes, shared.factor.hessian, grid, zeros=zero)
        codes = descend(ordered, codes, shared.factor.hessian, grid)
    lost, energy = (_total(error, shared.factor) for error in (ordered - grid.values(codes), ordered))
    in_place = torch.empty_like(codes)
    in_place[:, order] = codes
    return QuantizedLinear(
        in_place, grid.scale.half(), zero.to(torch.uint8), shared.group.to(torch.int32), lost, energy
    )


def _rounded(W: torch.Tensor, shared: Input) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scale and zero after compensation."""
    settings, factor, group = shared.settings, shared.factor, shared.group
    bits, symmetric, signed = settings.bits, settings.symmetric, settings.signed_scales
    if settings.order == "activation" and not settings.desc_act:
        damped = in_place(factor.hessian, factor.order)
        scale, zero = search_scales(W, damped, group, bits, symmetric, signed)
        return compensate(W, factor, affine_grid(scale, zero, group, bits)), scale, zero
    return round_searched(W, factor, group, bits, symmetric, signed)


def _total(error: torch.Tensor, factor: Factor) -> float:
    """Return tr(E H Eᵀ), without the damping, of errors f32 (N, K) in the order of rounding."""
    damped = linear(error, factor.hessian) * error
    return max(float((damped - error.square() * factor.added).double().sum()), 0.0)


def _check(weights: Mapping[str, torch.Tensor], H: torch.Tensor, settings: Settings) -> None:
    reasons = []
    if settings.bits not in (2, 3, 4, 8):
        reasons.append(f"bits {settings.bits}: GPTQ's readers know 2, 3, 4 and 8")
    if settings.group_size < 0:
        reasons.append(f"group size {settings.group_size}: a positive number is expected, or 0 for one group")
    if settings.effort not in ROUNDS:
        reasons.append(f"effort {settings.effort!r}: known are {', '.join(get_args(Effort))}")
    for name, W in weights.items():
        if W.ndim != 2 or W.shape[1:] != H.shape[1:]:
            reasons.append(f"{name}: a matrix {tuple(W.shape)} for a Hessian {tuple(H.shape)}")
        elif not bool(torch.isfinite(W).all()):
            reasons.append(f"{name}: holds weights that are not finite")
    if reasons:
        raise UsageError("these linears cannot be quantized with these settings", reasons=reasons)
