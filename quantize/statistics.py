"""Second-order statistics of a linear's input, and their packed form.

For a matrix W and the inputs x that a text sends through it, an error E in W costs E[|E x|^2] = tr(E H E^T)
with the Hessian H = E[x x^T]. So H, f32 (K, K), is all that an error-compensating solver (GPTQ) needs to
know of the text; its diagonal, E[x_j^2], is the imatrix that weighs the searches of the quant types.

H is gathered as the upper triangle alone, in panels of columns: torch has no symmetric rank-k product, but a
panel's product with itself and with all that is right of it is an ordinary one, and eight panels need 56 % of
the work and of the memory.

                 K
        +----+----+----+
        | p0 | p0 | p0 |      panel 0: columns 0..w, times columns 0..K
        +----+----+----+
             | p1 | p1 |      panel 1: columns w..2w, times columns w..K
             +----+----+
                  | p2 |
                  +----+

For the archive the triangle is packed as correlations, r_ij = H_ij / sqrt(H_ii H_jj), linearly in 16 bits
over [-1, 1], with the diagonal in f32 beside it: an absolute error of 1.5e-5 at most in every correlation.
The other 16-bit types were measured on a real model's Hessians (scripts/bench/statistics_packing): both spend
their bits on small correlations, err by up to 2e-4 and 2e-3 on large ones, and make a nearly singular H
indefinite, so that it cannot be factored. A column that is always zero (dead) has the correlation zero with
every other and comes back as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from quantize.packing_kernels import unpack_triangle
from quantize.products import add_columns_product_

_LEAST_PANEL, _MOST_PANEL, _PANELS = 128, 1024, 8
_STEPS = 32767
_MASKED = 1 << 22  # elements of a triangle's rows that are packed at a time


@dataclass(frozen=True)
class Statistics:
    """What `n_tokens` inputs x of a linear have in common.

    `diagonal` is the mean of x_j^2, f32 (K,); `hessian` the mean of x x^T, f32 (K, K), symmetric, or None
    where only the diagonal was gathered.
    """

    n_tokens: int
    diagonal: torch.Tensor
    hessian: torch.Tensor | None


@dataclass(frozen=True)
class PackedStatistics:
    """Statistics as the archive stores them: `correlations` are int16 (K * (K - 1) / 2,), row by row."""

    n_tokens: int
    diagonal: torch.Tensor
    correlations: torch.Tensor | None


class SecondMoment:
    """The running sum of x x^T over tokens: its upper triangle in panels, or its diagonal alone.

    Sums are f32. Each addition rounds at 6e-8 of the sum and errors of either sign cancel, so that even
    half a million tokens, added a handful at a time, agree to a few 1e-6 with sums in f64; a test holds
    them to 1e-5. That is why results do not depend on how the tokens are split beyond that.
    """

    def __init__(self, n_columns: int, device: torch.device, diagonal_only: bool = False) -> None:
        self.n_columns, self.n_tokens = n_columns, 0
        self.width = min(max(_LEAST_PANEL, -(-n_columns // _PANELS)), _MOST_PANEL)
        self.panels: list[torch.Tensor] = []
        self.squares = torch.zeros(n_columns if diagonal_only else 0, device=device)
        for start in range(0, 0 if diagonal_only else n_columns, self.width):
            end = min(start + self.width, n_columns)
            self.panels.append(torch.zeros(end - start, n_columns - start, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs f32 (n, K), which must be on the sum's device."""
        self.n_tokens += len(inputs)
        if not self.panels:
            self.squares += inputs.square().sum(0)
            return
        columns = inputs.T.contiguous()
        for number, panel in enumerate(self.panels if len(inputs) else ()):
            add_columns_product_(panel, columns, number * self.width)

    def tensors(self) -> list[torch.Tensor]:
        """Return the sums themselves, for a reduction over ranks."""
        return self.panels or [self.squares]

    def diagonal(self) -> torch.Tensor:
        """Return the mean of x_j^2, f32 (K,) on the CPU; zeros if there was no token."""
        parts = [panel.diagonal() for panel in self.panels] or [self.squares]
        return (torch.cat(parts) / max(self.n_tokens, 1)).cpu()

    def statistics(self) -> Statistics:
        """Return the means, on the CPU."""
        hessian = torch.empty(self.n_columns, self.n_columns) if self.panels else None
        if hessian is not None:
            for start, panel in zip(range(0, self.n_columns, self.width), self.panels, strict=True):
                end, means = start + len(panel), (panel / max(self.n_tokens, 1)).cpu()
                hessian[start:end, start:] = means
                hessian[end:, start:end] = means[:, len(panel) :].T
                _mirror(hessian[start:end, start:end])
        return Statistics(self.n_tokens, self.diagonal(), hessian)

    def packed(self) -> PackedStatistics:
        """Return `pack(self.statistics())` without ever holding the whole of H."""
        diagonal = self.diagonal()
        if not self.panels:
            return PackedStatistics(self.n_tokens, diagonal, None)
        packed = torch.empty(_triangle(self.n_columns), dtype=torch.int16)
        at, rows, there = 0, max(_MASKED // self.n_columns, 1), diagonal.to(self.panels[0].device)
        for start, panel in zip(range(0, self.n_columns, self.width), self.panels, strict=True):
            for first in range(0, len(panel), rows):
                part = panel[first : first + rows, first:]
                codes = _encode(part / max(self.n_tokens, 1), there[start + first :]).cpu()
                packed[at : at + len(codes)] = codes
                at += len(codes)
        return PackedStatistics(self.n_tokens, diagonal, packed)


def pack(statistics: Statistics) -> PackedStatistics:
    """Return the statistics with H as 16-bit correlations."""
    hessian, diagonal = statistics.hessian, statistics.diagonal
    if hessian is None:
        return PackedStatistics(statistics.n_tokens, diagonal, None)
    parts = [_encode(hessian[a:b, a:], diagonal[a:]) for a, b in _bands(len(diagonal))]
    return PackedStatistics(statistics.n_tokens, diagonal, torch.cat(parts))


def unpack(packed: PackedStatistics, device: str | torch.device = "cpu") -> Statistics:
    """Return the statistics with H in f32 on a device; its diagonal is exactly `diagonal`."""
    diagonal = packed.diagonal.to(device)
    if packed.correlations is None:
        return Statistics(packed.n_tokens, diagonal, None)
    codes, scales = packed.correlations.to(device), diagonal.sqrt()
    hessian = torch.empty(len(diagonal), len(diagonal), device=device)
    if hessian.device.type == "cpu":
        unpack_triangle(codes.numpy(), scales.numpy(), np.float32(_STEPS), hessian.numpy())
    else:
        _unpack(codes, scales, hessian)
    hessian.diagonal().copy_(diagonal)
    return Statistics(packed.n_tokens, diagonal, hessian)


def _unpack(codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> None:
    """Do what `unpack_triangle` does, with torch alone."""
    n, at, device = len(scales), 0, scales.device
    for start, end in _bands(n):
        mask = torch.ones(end - start, n - start, dtype=torch.bool, device=device).triu_(1)
        band = torch.zeros(mask.shape, device=device)
        n_codes = int(mask.sum())
        band[mask] = codes[at : at + n_codes].float() / _STEPS
        band *= scales[start:end, None] * scales[start:]
        hessian[start:end, start:] = band
        hessian[end:, start:end] = band[:, end - start :].T
        _mirror(hessian[start:end, start:end])
        at += n_codes


def merge(one: Statistics, other: Statistics) -> Statistics:
    """Return the statistics of both sets of tokens together.

    Either both have a Hessian or the result has none. Raises ValueError for other numbers of columns.
    """
    if one.diagonal.shape != other.diagonal.shape:
        raise ValueError(f"statistics of {len(one.diagonal)} and of {len(other.diagonal)} columns")
    n_tokens = one.n_tokens + other.n_tokens
    share = other.n_tokens / n_tokens if n_tokens else 0.0
    hessian = None
    if one.hessian is not None and other.hessian is not None:
        hessian = torch.lerp(one.hessian, other.hessian, share)
    return Statistics(n_tokens, torch.lerp(one.diagonal, other.diagonal, share), hessian)


def _triangle(n: int) -> int:
    return n * (n - 1) // 2


def _bands(n: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are few enough to be masked as a whole."""
    rows = max(_MASKED // n, 1)
    for start in range(0, n, rows):
        yield start, min(start + rows, n)


def _encode(rows: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """Return the int16 codes of the entries right of the diagonal, on which each row of H begins."""
    scales = diagonal.sqrt()
    products = scales[: len(rows), None] * scales
    # A product may underflow where neither factor is zero: no correlation can be told from such a column.
    correlations = torch.where(products > 0, rows / products, 0).clamp_(-1, 1)
    mask = torch.ones(rows.shape, dtype=torch.bool, device=rows.device).triu_(1)
    return (correlations[mask] * _STEPS).round_().to(torch.int16)


def _mirror(square: torch.Tensor) -> None:
    """Copy a square's upper triangle to the lower one."""
    square.copy_(square.triu() + square.triu(1).T)
