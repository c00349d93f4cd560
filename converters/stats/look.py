"""What `dscq inspect` says of a statistics archive: facts, a row for each input of each block, and a plot."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.disk import PARTIAL, explained
from converters.stats.archive import Archive
from quantize.errors import DscqError, UsageError
from quantize.llama import HEAD, block_tensor
from quantize.portrait import Portrait, portray
from quantize.reference import HEAD_INPUT, INPUTS

COLUMNS = [
    "layer",
    "input of",
    ">columns",
    ">dead",
    ">outliers",
    ">largest / median",
    ">effective rank",
    ">condition",
]
_PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class InputRow:
    """One input: its layer (the head's is the number of layers), the linears that it feeds, its figures."""

    layer: int
    input: str
    linears: str
    portrait: Portrait

    def cells(self) -> list[str]:
        """Return the row of the table."""
        seen = self.portrait
        whole = [seen.effective_rank, seen.condition]
        texts = [
            "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in whole
        ]
        counts = [f"{seen.n_columns}", f"{seen.n_dead}", f"{seen.n_outliers}", f"{seen.largest:,.1f}"]
        return [str(self.layer), self.linears, *counts, *texts]


def archive_facts(archive: Archive) -> dict[str, str]:
    """Return what the archive is of: label -> text."""
    manifest, config = archive.manifest, archive.config
    n_bytes = sum(member.n_bytes for member in manifest.members.values())
    options = ", ".join(f"{name} {value}" for name, value in manifest.request.options.items())
    return {
        "model": f"{config.n_layers} layers, {config.hidden_size} wide, MLP {config.intermediate_size}",
        "corpus": str(manifest.request.corpus.get("name", "")),
        "tokens": f"{manifest.n_tokens:,} in {manifest.n_rows} rows: {', '.join(manifest.kinds)}",
        "dropped rows": str(len(manifest.dropped)),
        "statistics": "diagonals" if archive.diagonal_only else "Hessians",
        "options": options,
        "size": f"{n_bytes:,} bytes in {len(manifest.members)} files",
    }


def input_rows(archive: Archive, on_row: Callable[[int, int], None]) -> list[InputRow]:
    """Return every input's figures, block by block; `on_row` is called with (done, in all)."""
    places = list(_places(archive))
    rows = []
    for number, (layer, name, linears, tensor) in enumerate(places, 1):
        rows.append(InputRow(layer, name, linears, portray(archive.statistics(tensor))))
        on_row(number, len(places))
    return rows


def _places(archive: Archive) -> Iterator[tuple[int, str, str, str]]:
    """Yield (layer, input, its linears, the name of one of their tensors)."""
    config = archive.config
    for layer in range(config.n_layers):
        for name in dict.fromkeys(INPUTS.values()):
            linears = [linear for linear, needed in INPUTS.items() if needed == name]
            short = ", ".join(linear.rpartition(".")[2].removesuffix("_proj") for linear in linears)
            yield layer, name, short, block_tensor(layer, linears[0])
    yield config.n_layers, HEAD_INPUT, "head", archive.linears()[-1] if config.tied_head else HEAD


def archive_document(archive: Archive, rows: list[InputRow]) -> dict[str, Any]:
    """Return everything as plain data for `--json`."""
    inputs = [asdict(row) for row in rows]
    for row in inputs:  # JSON has no name for what no number is
        seen = row["portrait"]
        row["portrait"] = {key: v if v is None or math.isfinite(v) else None for key, v in seen.items()}
    head = {"path": str(archive.folder), "kind": "statistics archive", "facts": archive_facts(archive)}
    return head | {"inputs": inputs}


def check_plot(path: Path) -> None:
    """Raise before the work what would stop the plot: UsageError for a suffix, DscqError for matplotlib."""
    if path.suffix.lower() not in _PLOTS:
        raise UsageError(f"--plot {path}: expected a name that ends in {' or '.join(_PLOTS)}")
    try:
        import matplotlib  # noqa: F401  # only asked whether it is there
    except ImportError:
        raise DscqError(
            "--plot needs matplotlib, which is not installed", hint="pip install matplotlib"
        ) from None


def plot(rows: list[InputRow], path: Path) -> None:
    """Draw the figures over the layers, a line an input; the file appears whole. Raises OutputError."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    panels: dict[str, Callable[[Portrait], float]] = {
        "effective rank, share of the columns": lambda p: (p.effective_rank or 0) / p.n_columns,
        "condition at 1 % damping": lambda p: p.condition or 1,
        "largest column / median": lambda p: p.largest,
    }
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 9), sharex=True, layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(INPUTS.values()):
            of_input = [row for row in rows if row.input == name]
            values = [value(row.portrait) for row in of_input]
            axis.plot([row.layer for row in of_input], values, marker=".", label=name.replace("_", " "))
        axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        figure.savefig(
            partial,
            format=path.suffix[1:].lower(),
            metadata={"Date": None} if path.suffix == ".svg" else None,
        )
        partial.replace(path)
    pyplot.close(figure)
