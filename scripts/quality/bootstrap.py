"""How sure a ratio of mean KL divergences is: a paired bootstrap over rows of text.

Tokens of one row depend on each other, rows hardly; so whole rows are drawn, the same ones for both sides,
which cancels what makes a row easy or hard. The generator is seeded: the same data give the same interval.
"""

from dataclasses import dataclass

import torch

DRAWS = 10_000


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means and its central 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(ours: torch.Tensor, theirs: torch.Tensor) -> Ratio:
    """Return mean(ours) / mean(theirs) of rows, f64 (rows,) each."""
    return _interval((ours.mean() / theirs.mean()).item(), _draws(ours, theirs))


def geometric_mean(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Ratio:
    """Return the geometric mean of several ratios over the same rows, which are drawn for all at once."""
    logs = [(ours.mean() / theirs.mean()).log() for ours, theirs in pairs]
    drawn = torch.stack([_draws(*pair).log() for pair in pairs]).mean(0)
    return _interval(torch.stack(logs).mean().exp().item(), drawn.exp())


def _draws(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ours), (DRAWS, len(ours)), generator=generator)
    return ours[picks].mean(1) / theirs[picks].mean(1)


def _interval(value: float, drawn: torch.Tensor) -> Ratio:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Ratio(value, low, high)
