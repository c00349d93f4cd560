"""Layer (b): the file's weights in the reference forward, against the checkpoint's, both in f32.

The file's side runs with the *file's* figures: if its rope factor is lost, this forward loses it too, and
the divergence shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from converters.bounds import FileBound
from converters.proof.record import LATE, Check, Figure, Layer, OnProgress
from quantize.metrics import Comparison, chunks
from quantize.reference import ReferenceModel

POSITIONS = 128
"""Logits are compared this many positions at a time: 32,256 f64 of each are 33 MB."""

CHECKPOINT_FILE = "checkpoint -> file"


@dataclass(frozen=True)
class Side:
    """A model and its final hidden states of every row."""

    model: ReferenceModel
    hidden: tuple[torch.Tensor, ...]

    def logits(self, row: int, start: int, end: int) -> torch.Tensor:
        """Return f32 (end - start, vocab) of one row's positions."""
        return self.model.logits(self.hidden[row][start:end])


@dataclass(frozen=True)
class Sides:
    """Both forwards over the same rows of ids."""

    rows: tuple[torch.Tensor, ...]
    checkpoint: Side
    file: Side


def run_forward(
    stage: str,
    model: ReferenceModel,
    rows: Sequence[torch.Tensor],
    on_progress: OnProgress,
) -> Side:
    """Push rows of ids, int64, through a model; `stage` is what the progress calls it."""
    return Side(model, tuple(model.hidden(rows, _reporter(on_progress, stage))))


def _reporter(on_progress: OnProgress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(stage, done, total)


def compare_forwards(sides: Sides, bound: FileBound) -> tuple[list[Check], list[Figure]]:
    """Return the checks and figures of the file's side against the checkpoint's."""
    comparison = Comparison()
    for row, ids in enumerate(sides.rows):
        for start, end in chunks(len(ids), POSITIONS):
            pair = sides.checkpoint.logits(row, start, end), sides.file.logits(row, start, end)
            comparison.add(*pair, ids[start + 1 : end + 1], start)
    figures = list(figures_of(comparison, CHECKPOINT_FILE))
    return [kl_check("forward", figure, bound.weights_kl) for figure in figures], figures


def figures_of(comparison: Comparison, pair: str) -> Iterator[Figure]:
    """Yield the figures over all positions, and over the late ones if there are any."""
    if (everywhere := comparison.divergence()) is not None:
        yield Figure(pair, "all", everywhere)
    if (late := comparison.divergence(from_position=LATE)) is not None:
        yield Figure(pair, "late", late)


def kl_check(layer: Layer, figure: Figure, bound: float) -> Check:
    """Hold a figure's mean KL divergence against a bound, which is doubled for the late positions.

    They are few, and beyond what small models were trained on.
    """
    allowed = bound if figure.positions == "all" else 2 * bound
    where = "" if figure.positions == "all" else f", positions from {LATE}"
    found = figure.divergence
    detail = f"top-1 agreement {found.top1_agreement:.4f} over {found.n_positions} positions"
    return Check(layer, f"mean KL {figure.pair}{where}", found.mean <= allowed, found.mean, allowed, detail)
