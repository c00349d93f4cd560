"""EXL2's linears: from weights, a Hessian and a layout to codes and 4-bit scales.

Inputs are ordered by falling diagonal of H, and that one order is EXL2's permutation, the order of the groups
and the order of rounding. So one factorization serves all linears of an input and all their layouts, and a
group's scales can be searched when the walk comes to it, in weights that hold all errors so far.

A step is scale² m, the scale 1..16 of one output, m of the whole group: h(q_scale_max / 256). What is
searched is therefore first each output's best step, then the m whose sixteen steps serve all outputs best,
each output with one of the nearest. Later, with the codes at hand, the loss of a group is a parabola in every
output's step, and the best m and scales are found anew from the parabolas alone; then codes are moved to the
new steps (descend). By the effort that is done 0, 2 or 6 times, as for GPTQ.

A group's m is shared by all outputs: a matrix must come whole, not in slices of its outputs. m is stored as
q_scale_max = 256 m, which halves hold exactly, so no rounding is left to the reader. What the solver does not
model is the rounding of each weight to half precision, at most 1/32 of a step (8 bits); the error that is
returned has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch

from quantize.codecs.exl2 import Exl2Linear, Group, group_faults, shape_faults, step_sizes
from quantize.errors import UsageError
from quantize.layouts import Layout
from quantize.products import linear
from quantize.solver.compensate import BLOCK, Walk
from quantize.solver.descend import loss, move_block
from quantize.solver.exl2_groups import TINY, fit, group_grid, search_group
from quantize.solver.factor import Factor, prepare
from quantize.solver.grid import Grid
from quantize.solver.linears import ROUNDS, Effort


@dataclass(frozen=True)
class QuantizedExl2:
    """`linear` as the codec packs it; `error` is tr(E H Eᵀ) / tr(W H Wᵀ) of what the runtime will compute
    with, the share of the output's energy that is lost (0 if there is none); `log` what went otherwise than
    planned."""

    linear: Exl2Linear
    error: float
    log: tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """The grid of all groups, in the stored order: `scales` uint8 (N, G), `maxima` f32 (G,), the m of each.

    It is to `descend` and to a `Walk` what a `Grid` is, as long as they ask for columns of one width.
    """

    groups: tuple[Group, ...]
    scales: torch.Tensor
    maxima: torch.Tensor

    def sizes(self) -> torch.Tensor:
        """Return each output's step in each group, f32 (N, G)."""
        return step_sizes(self.scales, self.stored_maxima())

    def stored_maxima(self) -> torch.Tensor:
        """Return q_scale_max, f16 (G,)."""
        return (self.maxima * 256).half()

    def columns(self, places: torch.Tensor) -> Grid:
        """Return the grid of neighbouring columns `places`, int64 (k,), whose groups have one width."""
        of = self._of[places]
        first, last = int(of[0]), int(of[-1])
        widths = {group.bits for group in self.groups[first : last + 1]}
        if len(widths) != 1:
            raise ValueError(f"columns of the widths {sorted(widths)} at once")
        (bits,) = widths
        some = slice(first, last + 1)
        scale = step_sizes(self.scales[:, some], self.stored_maxima()[some])
        levels = torch.arange(2**bits, dtype=torch.float32, device=scale.device)
        return Grid(scale, -scale * 2 ** (bits - 1), of - first, levels, uniform=True)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes - 2^(bits - 1), f32 (N, K)."""
        zeros = torch.tensor([2.0 ** (group.bits - 1) for group in self.groups], device=codes.device)
        return codes.float() - zeros[self._of]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights, f32 (N, K), of codes uint8 (N, K)."""
        return self.levels(codes) * self.sizes()[:, self._of]

    @cached_property
    def _of(self) -> torch.Tensor:
        """The group of each column, int64 (K,)."""
        sizes = torch.tensor([group.size for group in self.groups], device=self.scales.device)
        return torch.arange(len(self.groups), device=self.scales.device).repeat_interleave(sizes)


def quantize_exl2(
    weights: Mapping[str, torch.Tensor],
    H: torch.Tensor,
    layouts: Mapping[str, Layout],
    effort: Effort = "default",
    damp: float = 0.05,
) -> dict[str, QuantizedExl2]:
    """Quantize all linears W (N, K) of one input with the Hessian H, f32 (K, K), on H's device.

    `layouts` has one for each name; `damp` is the share of H's mean diagonal that is added to it. Each W is
    whole: its groups' maxima are shared by all its rows. The same arguments give the same codes. Raises
    UsageError, with all reasons, before any work, and HessianError where H cannot be factored.
    """
    _check(weights, H, layouts, effort)
    factor = prepare(H, damp=damp, order="activation", name=", ".join(weights))
    return {
        name: quantize_matrix(W, H, factor, layouts[name].groups(W.shape[1]), effort)
        for name, W in weights.items()
    }


def quantize_matrix(
    W: torch.Tensor, H: torch.Tensor, factor: Factor, groups: tuple[Group, ...], effort: Effort = "default"
) -> QuantizedExl2:
    """Quantize one linear W (N, K) with an H that is factored already, in activation order."""
    codes, steps = round_groups(W, factor, groups)
    stored = W.float()[:, factor.order].contiguous()
    for _ in range(ROUNDS[effort]):
        codes, steps = improve(stored, codes, factor.hessian, steps)
    made = Exl2Linear(codes, groups, steps.scales, steps.stored_maxima(), factor.order)
    energy = float(loss(W, torch.zeros_like(W), H).double().sum())
    lost = float(loss(W, made.weights(), H).double().sum())
    return QuantizedExl2(made, lost / energy if energy > 0 else 0.0, factor.log)


def round_groups(W: torch.Tensor, factor: Factor, groups: tuple[Group, ...]) -> tuple[torch.Tensor, Steps]:
    """Compensate W, f32 (N, K), choosing each group's steps when the walk comes to it.

    Returns codes, uint8 (N, K), in the stored order, and the steps.
    """
    walk, count = Walk(W, factor), len(groups)
    scales = torch.ones(len(W), count, dtype=torch.uint8, device=W.device)
    steps = Steps(groups, scales, torch.full((count,), TINY, device=W.device))
    starts = _starts(groups)
    for i, (group, start) in enumerate(zip(groups, starts, strict=True)):
        end = start + group.size
        inside = factor.feedback[start:end, start:end]
        scales[:, i], steps.maxima[i] = search_group(
            walk.target[:, start:end], inside, factor.weights[start:end], group.bits
        )
        for first in range(start, end, BLOCK):
            walk.take(first, min(first + BLOCK, end), steps)
    return walk.codes()[:, factor.order], steps


def improve(
    W: torch.Tensor, codes: torch.Tensor, H: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, Steps]:
    """Return better codes and steps: group after group, first its m and scales are moved to their best for
    the codes, then each code to its best for the steps.

    All is in the stored order: W f32 (N, K), codes uint8 (N, K), H f32 (K, K). The loss of all outputs
    together never rises, up to the rounding of f32; that of a single one may, where m moves.
    """
    gradient, codes = linear(W - steps.values(codes), H), codes.clone()
    steps = replace(steps, scales=steps.scales.clone(), maxima=steps.maxima.clone())
    for i, (group, start) in enumerate(zip(steps.groups, _starts(steps.groups), strict=True)):
        end = start + group.size
        inside, slope = H[start:end, start:end].contiguous(), gradient[:, start:end].contiguous()
        shape = codes[:, start:end].float() - 2.0 ** (group.bits - 1)
        fitted = fit(
            slope, shape, linear(shape, inside), steps.scales[:, i], float(steps.maxima[i]), group.bits
        )
        steps.scales[:, i], steps.maxima[i] = fitted.scales, fitted.maximum
        found, moves = move_block(fitted.slope, inside, group_grid(group, fitted.sizes), codes[:, start:end])
        codes[:, start:end] = found
        if end < W.shape[1]:  # columns that are done are looked at no more: the next round begins anew
            moves = torch.addcmul(moves, fitted.moved[:, None], shape)
            gradient[:, end:] -= linear(moves, H[end:, start:end].contiguous())
    return codes, steps


def _starts(groups: tuple[Group, ...]) -> list[int]:
    return [sum(group.size for group in groups[:i]) for i in range(len(groups))]


def linear_faults(name: str, W: torch.Tensor, H: torch.Tensor, layouts: Sequence[Layout]) -> list[str]:
    """Return every reason why a linear cannot be quantized under these layouts; an empty list if it can."""
    if W.ndim != 2 or W.shape[1:] != H.shape[1:]:
        return [f"{name}: a matrix {tuple(W.shape)} for a Hessian {tuple(H.shape)}"]
    n, k = W.shape
    faults = [] if layouts else ["has no layout"]
    if not bool(torch.isfinite(W).all()):
        faults.append("holds weights that are not finite")
    faults += shape_faults(n, k)
    for each in layouts:
        faults += [f"{each.name}: {fault}" for fault in group_faults(each.groups(k), k)]
    return [f"{name}: {fault}" for fault in faults]


def _check(
    weights: Mapping[str, torch.Tensor], H: torch.Tensor, layouts: Mapping[str, Layout], effort: str
) -> None:
    reasons = []
    if effort not in ROUNDS:
        reasons.append(f"effort {effort!r}: known are {', '.join(get_args(Effort))}")
    for name, W in weights.items():
        reasons += linear_faults(name, W, H, [layouts[name]] if name in layouts else [])
    if reasons:
        raise UsageError("these linears cannot be quantized for EXL2", reasons=reasons)
