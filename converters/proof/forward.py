"""Layer (b): the file's weights in the reference forward, against the checkpoint's, both in f32.

The file's side runs with the *file's* figures: if its rope factor is lost, this forward loses it too, and
the divergence shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from converters.bounds import FileBound
from converters.checkpoint import Checkpoint
from converters.gguf_source import GgufFile
from converters.proof.record import LATE, Check, Figure, Layer, OnProgress, ProofOptions
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


def run_forwards(
    file: GgufFile,
    reference: Checkpoint,
    rows: Sequence[Sequence[int]],
    options: ProofOptions,
    on_progress: OnProgress,
) -> Sides:
    """Push the rows through the checkpoint's weights and through the file's."""
    tensors = tuple(torch.tensor(row, dtype=torch.int64) for row in rows)
    sides = []
    for stage, config, weights in (
        ("forward of the checkpoint", reference.config, reference.weights),
        ("forward of the file", file.config, file.weights),
    ):
        model = ReferenceModel(config, weights, options.device)
        sides.append(Side(model, tuple(model.hidden(tensors, _reporter(on_progress, stage)))))
    return Sides(tensors, *sides)


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
