"""The curve of a model: how large, and how much is predicted to be lost; llama.cpp's recipes beside it.

A recipe's loss is predicted for the same encoders as a budget's: the difference between the two is what the
choice of types is worth, and nothing else. Recipes that this model or these statistics cannot have are left
out, as are sizes below the smallest types.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, explained
from converters.plan import ConvertOptions, Request
from converters.targets.gguf import GgufTarget, gguf_types
from converters.targets.gguf_budget import is_budget, predicted_loss
from quantize.errors import PlanError
from quantize.recipes import RECIPES

SIZES = (
    1.8,
    2.0,
    2.2,
    2.4,
    2.6,
    2.8,
    3.0,
    3.25,
    3.5,
    3.75,
    4.0,
    4.25,
    4.5,
    4.75,
    5.0,
    5.5,
    6.0,
    6.6,
    7.5,
    8.5,
)
"""Bits per weight, 8 * bytes / weights, at which budgets are planned."""
COLUMNS = (">bits per weight", ">bytes", ">predicted KL", "types")


@dataclass(frozen=True)
class Point:
    """A size: what was asked for, bytes of the file, 8 * bytes / weights, and the predicted KL in nats."""

    quant: str
    n_bytes: int
    bpw: float
    predicted_kl: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        types = "allocated" if is_budget(self.quant) else self.quant
        return [f"{self.bpw:.3f}", f"{self.n_bytes:,}", f"{self.predicted_kl:.4g}", types]


def curve(checkpoint: Checkpoint, options: ConvertOptions) -> list[Point]:
    """Return the points of budgets and recipes that can be had, by size; `options` have losses."""
    quants = [f"bpw={size}" for size in SIZES] + [name for name in RECIPES if name not in ("F32", "BF16")]
    points = [point for quant in quants if (point := _point(checkpoint, options, quant)) is not None]
    return sorted(points, key=lambda point: (point.n_bytes, point.predicted_kl))


def _point(checkpoint: Checkpoint, options: ConvertOptions, quant: str) -> Point | None:
    request = Request("gguf", quant)
    try:
        types = gguf_types(checkpoint, request, options)
    except PlanError:  # too small
        return None
    nats = predicted_loss(types)
    if nats is None or types.faults():
        return None
    n_bytes = GgufTarget().plan_types(checkpoint, request, types).n_bytes
    return Point(quant, n_bytes, 8 * n_bytes / checkpoint.config.n_parameters, nats)


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw the curve and the recipes; the file appears whole. Raises OutputError."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    line = [point for point in points if is_budget(point.quant)]
    recipes = [point for point in points if not is_budget(point.quant)]
    axis.plot([p.bpw for p in line], [p.predicted_kl for p in line], marker=".", label="allocated")
    axis.scatter([p.bpw for p in recipes], [p.predicted_kl for p in recipes], color="C1", label="recipes")
    for point in recipes:
        axis.annotate(
            point.quant,
            (point.bpw, point.predicted_kl),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize="x-small",
        )
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("predicted KL divergence, nats")
    axis.grid(alpha=0.3)
    axis.legend()
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(partial, format=path.suffix[1:].lower(), metadata=metadata)
        partial.replace(path)
    pyplot.close(figure)
