"""The measuring: every linear of the decoder blocks at every layout, from the archive, input by input.

The linears of an input share its Hessian, which is factored once. Inputs are independent of each other, so
each is a worker's task, and their order decides nothing. What is done is noted beside the file to be, a line
an input, and a run that was cut off goes on from there.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from converters.disk import explained
from converters.exl2_measurement import (
    DAMP,
    Measurement,
    decoder_linears,
    document_of,
    from_document,
    layouts_of,
    measurement_key,
    write_measurement,
)
from converters.hessians import hessian
from converters.proof.tensors import one_torch_thread_each
from converters.stats.archive import Archive
from quantize.first_tokens import FirstTokens
from quantize.layout_errors import LayoutError, Prediction, predict
from quantize.weights import Weights

MOST_WORKERS = 4  # each holds a Hessian, its factor and a few matrices
OnProgress = Callable[[str, int, int], None]
STAGE = "measure"
_NOTES = ".notes"


def measure(
    archive: Archive,
    weights: Weights,
    path: Path,
    *,
    n_threads: int,
    device: str = "cpu",
    first: FirstTokens | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Measurement:
    """Measure all linears, write the file at `path`, and return what is in it.

    The archive is that of the weights' model. The rows' `first` tokens count as they will in the rounding
    (converters/hessians.py). Raises HessianError, ArchiveError, OutputError.
    """
    inputs = list(_by_input(archive).values())
    notes = _Notes(path, measurement_key(archive))
    done = dict(notes.found)
    left = [names for names in inputs if not all(name in done for name in names)]
    count = len(inputs) - len(left)
    on_progress(STAGE, count, len(inputs))
    with one_torch_thread_each(min(n_threads, MOST_WORKERS)) as pool:
        for found in pool.map(lambda names: _predict(archive, weights, names, device, first), left):
            notes.add(found)
            done |= found
            count += 1
            on_progress(STAGE, count, len(inputs))
    document = document_of(notes.key, archive.config, done, archive.gradients())
    write_measurement(path, document)
    notes.forget()
    return from_document(document)


def _by_input(archive: Archive) -> dict[str, list[str]]:
    """Return the linears of each input, in the model's order."""
    inputs: dict[str, list[str]] = {}
    for name in decoder_linears(archive.config):
        inputs.setdefault(archive.identity(name), []).append(name)
    return inputs


def _predict(
    archive: Archive, weights: Weights, names: list[str], device: str, first: FirstTokens | None
) -> dict[str, Prediction]:
    H, damp_scale = hessian(archive, names[0], device, first)
    matrices = {name: weights.load(name).to(device) for name in names}
    return predict(matrices, H, {name: layouts_of(name) for name in names}, damp=DAMP * damp_scale)


class _Notes:
    """What an interrupted run has measured: lines of JSON, each with the key."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key, self._lock = path.with_name(path.name + _NOTES), key, Lock()
        self.found: dict[str, Prediction] = {}
        with explained(self.path):
            lines = self.path.read_text("ascii").splitlines() if self.path.is_file() else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
        for line in lines:
            self.found |= _parsed(line, key)

    def add(self, found: Mapping[str, Prediction]) -> None:
        """Note what was found."""
        errors = {name: [[each.bits, each.error] for each in one.errors] for name, one in found.items()}
        energies = {name: one.energy for name, one in found.items()}
        line = json.dumps({"key": self.key, "energies": energies, "errors": errors})
        with self._lock, explained(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(line + "\n")

    def forget(self) -> None:
        """Remove the notes."""
        with explained(self.path):
            self.path.unlink(missing_ok=True)


def _parsed(line: str, key: str) -> dict[str, Prediction]:
    """Return what a line says; nothing for a line that was cut off, or is of another key."""
    try:
        noted: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    if noted.get("key") != key:
        return {}
    found = {}
    for name, errors in noted["errors"].items():
        rows = zip(layouts_of(name), errors, strict=True)
        layouts = tuple(LayoutError(layout, int(bits), float(error)) for layout, (bits, error) in rows)
        found[name] = Prediction(float(noted["energies"][name]), layouts)
    return found
