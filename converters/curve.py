"""The curve of a model: how large, and how much is predicted to be lost; llama.cpp's recipes beside it.

A recipe's loss is predicted for the same encoders as a budget's: the difference between the two is what the
choice of types is worth, and nothing else. Recipes that this model or these statistics cannot have are left
out, as are sizes below the smallest types.

The proof of a conversion measures the KL divergence of the file's weights, and its report keeps it: those of
this model that lie in a folder of reports stand beside the predictions.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, explained
from converters.plan import ConvertOptions, Request
from converters.proof.forward import CHECKPOINT_FILE
from converters.report import SUFFIX
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
COLUMNS = (">bits per weight", ">bytes", ">predicted KL", ">measured KL", "types")


@dataclass(frozen=True)
class Point:
    """A size: what was asked for, bytes of the file, 8 * bytes / weights, and the KL in nats.

    `measured_kl` is over the proof's text, None where no report has it; `predicted_kl` is None for a file
    that a report has and these options would not make.
    """

    quant: str
    n_bytes: int
    bpw: float
    predicted_kl: float | None
    measured_kl: float | None = None

    def cells(self) -> list[str]:
        """Return the row of the table."""
        types = "allocated" if is_budget(self.quant) else self.quant
        kl = ("" if nats is None else f"{nats:.4g}" for nats in (self.predicted_kl, self.measured_kl))
        return [f"{self.bpw:.3f}", f"{self.n_bytes:,}", *kl, types]


def curve(checkpoint: Checkpoint, options: ConvertOptions, reports: Path | None = None) -> list[Point]:
    """Return the points of budgets and recipes that can be had, by size; `options` have losses.

    With `reports` those that a report of the folder has measured say so; its other sizes are added.
    """
    measured = {} if reports is None else dict(_measured(checkpoint, reports))
    quants = [f"bpw={size}" for size in SIZES] + [name for name in RECIPES if name not in ("F32", "BF16")]
    quants += [quant for quant, _ in measured if quant not in quants and is_budget(quant)]
    points = {}
    for quant in quants:
        if (point := _point(checkpoint, options, quant)) is not None:
            points[quant, point.n_bytes] = point
    for (quant, n_bytes), kl in measured.items():
        bpw = 8 * n_bytes / checkpoint.config.n_parameters
        known = points.get((quant, n_bytes), Point(quant, n_bytes, bpw, None))
        points[quant, n_bytes] = replace(known, measured_kl=kl)
    return sorted(points.values(), key=lambda point: (point.n_bytes, point.quant))


def _measured(checkpoint: Checkpoint, folder: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """Yield (quant, bytes) and measured KL of the GGUFs of this model that a folder has reports of."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            report: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if report["config"] != asdict(checkpoint.config) or report["plan"] is None:
                continue
            name, quant = str(report["plan"]["request"]).split(":", 1)
            (kl,) = (
                figure["mean"]
                for figure in (report["proof"] or {"figures": []})["figures"]
                if (figure["pair"], figure["positions"]) == (CHECKPOINT_FILE, "all")
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no report of an export, or one without a proof
        if name == "gguf" and report["source"]["name"] == checkpoint.provenance.name:
            yield (quant, int(report["plan"]["n_bytes"])), float(kl)


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
    planned = [(p.quant, p.bpw, p.predicted_kl) for p in points if p.predicted_kl is not None]
    line = [(bpw, kl) for quant, bpw, kl in planned if is_budget(quant)]
    recipes = [(quant, bpw, kl) for quant, bpw, kl in planned if not is_budget(quant)]
    axis.plot(*zip(*line, strict=True), marker=".", label="allocated")
    axis.scatter([bpw for _, bpw, _ in recipes], [kl for *_, kl in recipes], color="C1", label="recipes")
    if measured := [(p.bpw, p.measured_kl) for p in points if p.measured_kl is not None]:
        axis.scatter(*zip(*measured, strict=True), color="C2", marker="x", label="measured")
    for quant, *place in recipes:
        axis.annotate(quant, place, xytext=(3, 3), textcoords="offset points", fontsize="x-small")
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("KL divergence, nats")
    axis.grid(alpha=0.3)
    axis.legend()
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(partial, format=path.suffix[1:].lower(), metadata=metadata)
        partial.replace(path)
    pyplot.close(figure)
