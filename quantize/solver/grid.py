"""A grid: the values that the codes of a group can stand for.

Every format of this project that can be error-compensated writes a weight as scale * level + base, with a
scale and a base for each row and group, and levels shared by all. GPTQ's scale * (code - zero) has the base
-scale * zero, which f32 holds exactly for a scale in half precision, as it does the sum; ggml's d * q - m the
base -m; IQ4_NL has sixteen uneven levels and no base.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Columns(Protocol):
    """What gives the grid of any columns that are rounded together: a `Grid`, or groups of several widths."""

    def columns(self, places: torch.Tensor) -> "Grid":
        """Return the grid of the columns `places`, int64 (k,)."""

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights, f32 (N, K), of codes uint8 (N, K)."""


@dataclass(frozen=True)
class Grid:
    """Values scale[n, g] * levels[code] + base[n, g] for row n and the group g = group[k] of column k.

    `scale` and `base` are f32 (N, G), `group` int64 (K,), `levels` f32 (L,) ascending, L <= 256. A scale of
    zero leaves only the base; codes are then 0. `uniform` says whether the levels are 0, 1, 2, ...; None: it
    is not known, and a GPU has to be waited for to see it.
    """

    scale: torch.Tensor
    base: torch.Tensor
    group: torch.Tensor
    levels: torch.Tensor
    uniform: bool | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights, f32 (N, K), of codes uint8 (N, K)."""
        return self.levels[codes.long()] * self.scale[:, self.group] + self.base[:, self.group]

    def nearest(self, W: torch.Tensor) -> torch.Tensor:
        """Return the codes, uint8 (N, K), whose values are nearest to W: plain rounding."""
        return nearest_codes(W, self.scale[:, self.group], self.base[:, self.group], self.levels)

    def columns(self, places: torch.Tensor) -> "Grid":
        """Return the grid of the columns `places`, int64 (k,)."""
        return Grid(self.scale, self.base, self.group[places], self.levels, self.uniform)


def affine_grid(scale: torch.Tensor, zero: torch.Tensor, group: torch.Tensor, bits: int) -> Grid:
    """Return the grid of scale * (code - zero), codes 0..2^bits - 1; scale and zero are (N, G)."""
    levels = torch.arange(2**bits, dtype=torch.float32, device=scale.device)
    return Grid(scale.float(), -scale.float() * zero.float(), group, levels, uniform=True)


def is_uniform(levels: torch.Tensor) -> bool:
    """Return whether the levels are 0, 1, 2, ..., so that rounding finds the code."""
    return bool((levels == torch.arange(len(levels), device=levels.device)).all())


def nearest_codes(
    W: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """Return uint8 codes of the levels nearest to (W - base) / scale; all but levels broadcast."""
    # The inverse comes first, as in the kernel: both decide near-ties alike.
    units = (W - base) * torch.where(scale == 0, 0.0, 1.0 / scale)
    if is_uniform(levels):
        return units.clamp(0, len(levels) - 1).round_().to(torch.uint8)
    return torch.bucketize(units, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
