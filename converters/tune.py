"""`dscq tune`, `dscq convert --tune`: a finished GGUF with better scales, and otherwise the same bytes.

The codes of every matrix stay; the half-precision `d` and `dmin` of its blocks are trained against the
checkpoint that the file was made from (quantize/tuning.py), on rows of the statistics archive. Types without
a `d` that can be moved (floats, Q8_0), the embedding and the output matrix stay as they are.
The file is copied under a temporary name, patched, and renamed when it is whole.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from converters.calibration import check_free
from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, check_room, explained
from converters.donors import keys_path
from converters.gguf_file import TensorEntry, read_head
from converters.gguf_source import GgufFile, open_gguf
from converters.names import gguf_name, is_rotary, permute
from converters.places import Piece, Place
from converters.plan import Plan, Written
from converters.stats.archive import Archive
from quantize.codecs import CODECS
from quantize.codecs.fields import FieldCodec
from quantize.errors import OutputError, UsageError
from quantize.llama import block_tensor
from quantize.reference import INPUTS, ReferenceModel, usable_device
from quantize.scaled import ScaledMatrix
from quantize.sensitivity import sample_rows
from quantize.tuning import OnStep, Settings, Tuned, tune

TOKENS = 1 << 16
"""Tokens that are trained on, at the most: the beginnings of evenly spread rows."""


@dataclass(frozen=True)
class TunedFile:
    """The file that was written, the mean KL of the first and of the last eight steps, and how much moved."""

    path: Path
    before: float
    after: float
    n_matrices: int

    @property
    def summary(self) -> str:
        """What was trained, and what came of it on the rows that it was trained on."""
        kl = f"{self.before:.4g} at first, {self.after:.4g} at last"
        return f"scales of {self.n_matrices} matrices trained, KL of the rows trained on {kl}"


def tune_file(
    path: Path,
    checkpoint: Checkpoint,
    archive: Archive,
    output: Path,
    settings: Settings,
    device: str = "cpu",
    *,
    force: bool = False,
    on_step: OnStep = lambda done, total, kl: None,
) -> TunedFile:
    """Write at `output` what `path` becomes by training.

    Raises CheckpointError for a file that is no GGUF, UsageError for one that is split, has another model's
    figures or nothing to move, ArchiveError for another model's archive, OutputError.
    """
    archive.check_model(checkpoint)
    file = open_gguf(path)
    _check(path, file, checkpoint)
    if not scaled_matrices(file):
        kinds = ", ".join(sorted(set(file.tensor_types.values())))
        raise UsageError(f"{path}: no scales to move: its types are {kinds}")
    check_output(path, output, force=force)
    return _tuned(path, file, checkpoint, archive, output, settings, device, on_step)[0]


def can_be_tuned(plan: Plan) -> bool:
    """Return whether a plan's file has scales that can be moved."""
    linears = tuple(f".{linear}.weight" for linear in INPUTS)
    return any(
        isinstance(CODECS.get(tensor.quant), FieldCodec)
        for tensor in plan.tensors
        if tensor.name.endswith(linears)
    )


def tune_written(
    written: Written,
    checkpoint: Checkpoint,
    archive: Archive,
    settings: Settings,
    device: str = "cpu",
    *,
    on_step: OnStep = lambda done, total, kl: None,
) -> Written:
    """Train the file that a conversion has just written, in its place; return what is written now.

    The pieces of what was trained have new hashes, and no later conversion takes over any slice of the file.
    Raises OutputError.
    """
    (path,) = written.paths
    tuned, pieces = _tuned(path, open_gguf(path), checkpoint, archive, path, settings, device, on_step)
    with explained(path):
        keys_path(path).unlink(missing_ok=True)
    changed = {name: (piece,) for name, piece in pieces.items()}
    return replace(written, pieces={**written.pieces, **changed}, notes=(*written.notes, tuned.summary))


def _tuned(
    path: Path,
    file: GgufFile,
    checkpoint: Checkpoint,
    archive: Archive,
    output: Path,
    settings: Settings,
    device: str,
    on_step: OnStep,
) -> tuple[TunedFile, dict[str, Piece]]:
    """Train, and write the file; return what came of it, and the trained matrices' pieces by name."""
    matrices = scaled_matrices(file)
    rows = sample_rows(archive.rows().text(), min(TOKENS, settings.n_steps * settings.tokens))
    weights = file.as_stored(checkpoint.weights)
    reference = ReferenceModel(checkpoint.config, weights, usable_device(device))
    model = ReferenceModel(checkpoint.config, file.weights, usable_device(device))
    found = tune(reference, model, matrices, rows, settings, on_step)
    pieces = _write(path, output, matrices, found, file.config.head_dim)
    eighth = min(8, len(found.losses))
    before, after = (sum(part) / eighth for part in (found.losses[:eighth], found.losses[-eighth:]))
    return TunedFile(output, before, after, len(matrices)), pieces


def scaled_matrices(file: GgufFile) -> dict[str, ScaledMatrix]:
    """Return the linears of the decoder blocks whose types have a scale that can be moved."""
    found = {}
    for layer in range(file.config.n_layers):
        for name in (block_tensor(layer, linear) for linear in INPUTS):
            kind = CODECS.get(file.tensor_types[name])
            if isinstance(kind, FieldCodec):
                n_columns = file.weights.specs()[name].shape[-1]
                found[name] = ScaledMatrix(kind, file.blocks(name), n_columns)
    return found


def check_output(path: Path, output: Path, *, force: bool = False) -> None:
    """Raise OutputError for an output that is there, that is the file itself, or that has no room."""
    if output.exists() and output.samefile(path):
        raise OutputError(f"{output}: is the file that is read", hint="choose another name")
    check_free(output, force=force)
    check_room(output.parent, path.stat().st_size)


def _check(path: Path, file: GgufFile, checkpoint: Checkpoint) -> None:
    if len(file.paths) > 1:
        hint = "convert without --split-max-size"
        raise UsageError(f"{path}: is split; tuning takes a single file", hint=hint)
    theirs, ours = file.config.tensor_shapes(), checkpoint.config.tensor_shapes()
    reasons = [
        f"{name} has the shape {theirs.get(name)}, the checkpoint's {ours.get(name)}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if reasons:
        raise UsageError(f"{path}: was not made from {checkpoint.provenance.name}", reasons=reasons[:5])


def _write(
    path: Path, output: Path, matrices: Mapping[str, ScaledMatrix], found: Tuned, head_dim: int
) -> dict[str, Piece]:
    head, partial = read_head(path), output.with_name(output.name + PARTIAL)
    places, pieces = {entry.name: entry for entry in head.tensors}, dict[str, Piece]()
    with explained(output):
        try:
            shutil.copyfile(path, partial)
            with partial.open("r+b") as file:
                for name, matrix in matrices.items():
                    blocks = matrix.moved(found.ratios[name])
                    ordered = permute(blocks, head_dim) if is_rotary(name) else blocks
                    pieces[name] = _patch(file, head.data_start, places[gguf_name(name)], ordered)
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return pieces


def _patch(file: BinaryIO, start: int, entry: TensorEntry, data: torch.Tensor) -> Piece:
    content = data.contiguous().numpy().tobytes()
    if len(content) != entry.n_bytes:
        raise AssertionError(f"{entry.name}: {len(content)} bytes in place of {entry.n_bytes}")
    file.seek(start + entry.offset)
    file.write(content)
    place = Place(start + entry.offset, len(content))
    return Piece((place,), hashlib.sha256(content).hexdigest())
