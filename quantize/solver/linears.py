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
from quantize.solver.compensate import compensate
from quantize.solver.descend import descend, in_place, loss, refit_scales
from quantize.solver.factor import Factor, Order, column_order, prepare
from quantize.solver.grid import affine_grid
from quantize.solver.scales import group_index, plain_scales, round_searched, search_scales

Effort = Literal["fast", "default", "high"]
ROUNDS: Mapping[str, int] = {"fast": 0, "default": 2, "high": 6}


@dataclass(frozen=True)
class Settings:
    """What to make: codes of `bits` (2, 3, 4 or 8) in groups of `group_size` columns (0: one group a row).

    `symmetric` fixes the zero-point at 2^(bits - 1). With `desc_act` the groups themselves are counted along
    falling diagonal of H, and g_idx says so; without, they are plain, and `order` is only that of rounding.
    `damp` is the share of H's mean diagonal that is added to it: it keeps the rounding from fitting the noise
    of a short calibration text. `signed_scales` lets a symmetric group's scale be negative, which is worth
    a tenth of the error; whoever turns it on vouches for a reader that multiplies by it as it is.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False
    order: Order = "group"
    effort: Effort = "default"
    damp: float = 0.05
    signed_scales: bool = False


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear as GPTQ's formats hold it: the weight of column k is scales[n, g] * (codes - zeros[n, g]).

    codes uint8 (N, K), scales f16 (N, G), zeros uint8 (N, G), 1 at the least; g_idx int32 (K,) holds each
    column's g. `error` is tr(E H Eᵀ) / tr(W H Wᵀ), the share of the output's energy that is lost (0 if there
    is none), `plain_error` the same of plain rounding to scales from the range; `log` what went otherwise
    than planned.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    error: float
    plain_error: float
    log: tuple[str, ...]

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
    order: Order = "activation" if settings.desc_act else settings.order
    name = ", ".join(weights)
    factor = prepare(H, damp=settings.damp, order=order, group_size=settings.group_size, name=name)
    along = column_order(H.diagonal().clamp(min=0), "activation") if settings.desc_act else None
    group = group_index(len(H), settings.group_size, along)
    damped = in_place(factor.hessian, factor.order)
    return {name: _quantize(W.float(), H, damped, factor, group, settings) for name, W in weights.items()}


def _quantize(
    W: torch.Tensor,
    H: torch.Tensor,
    damped: torch.Tensor,
    factor: Factor,
    group: torch.Tensor,
    settings: Settings,
) -> QuantizedLinear:
    bits, symmetric, signed = settings.bits, settings.symmetric, settings.signed_scales
    if settings.order == "activation" and not settings.desc_act:
        scale, zero = search_scales(W, damped, group, bits, symmetric, signed)
        codes = compensate(W, factor, affine_grid(scale, zero, group, bits))
    else:
        codes, scale, zero = round_searched(W, factor, group, bits, symmetric, signed)
    grid = affine_grid(scale, zero, group, bits)
    for _ in range(ROUNDS[settings.effort]):
        grid = refit_scales(W, codes, damped, grid, zeros=zero)
        codes = descend(W, codes, damped, grid)
    plain = affine_grid(*plain_scales(W, group, bits, symmetric), group, bits)
    energy = _total(W, torch.zeros_like(W), H)
    lost, plainly = (_total(W, g.values(c), H) for g, c in ((grid, codes), (plain, plain.nearest(W))))
    return QuantizedLinear(
        codes,
        grid.scale.half(),
        zero.to(torch.uint8),
        group.to(torch.int32),
        lost / energy if energy > 0 else 0.0,
        plainly / energy if energy > 0 else 0.0,
        factor.log,
    )


def _total(W: torch.Tensor, quantized: torch.Tensor, H: torch.Tensor) -> float:
    return float(loss(W, quantized, H).double().sum())


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
