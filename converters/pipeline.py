"""The whole way from a checkpoint to finished files: start reading here.

    check      every request against the checkpoint: all reasons at once, before any work
    plan       every tensor's type and place, every file's size
    room       names that exist already, and the space on the disk
    stream     one read of the weights, each slice to every export
    finish     flush, then rename: a file under its final name is whole

The proof (`converters/verify.py`) reads the finished files again; `mark_failed` takes away the names of
those that do not pass.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from converters.checkpoint import Checkpoint
from converters.disk import check_room, explained, readable, write_whole
from converters.donors import keys_path
from converters.export_folder import is_export
from converters.hessians import first_tokens_of
from converters.journal import goes_on, has_journal
from converters.places import Piece, read_places
from converters.plan import ConvertOptions, Plan, Request, Written
from converters.stream import Export, OnEvent, TensorDone, stream
from converters.targets import TARGETS
from quantize.errors import OutputError, PlanError
from quantize.reference import OnBlock

__all__ = [
    "Reread",
    "TensorDone",
    "convert",
    "first_tokens_known",
    "mark_failed",
    "plan_exports",
    "refuse_taken",
    "reread_hashes",
    "with_first_tokens",
]

FAILED = ".failed"


def convert(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    options: ConvertOptions,
    on_event: OnEvent = lambda _: None,
) -> list[Written]:
    """Write the checkpoint in every format asked for, from one read of it; return them in order.

    Raises PlanError, OutputError or CheckpointError. Until every export is on the disk none has a final
    name. They get theirs one by one: if the disk fails then, those before are whole and keep them.
    """
    started = time.monotonic()
    plans = plan_exports(checkpoint, requests, options)
    check_destination(plans, options, checkpoint.source_files)
    licences = read_licences(checkpoint)
    options = with_first_tokens(checkpoint, plans, options)
    with ExitStack() as stack:
        exports = []
        for plan in plans:
            writer = TARGETS[plan.request.format].open_writer(plan, options)
            stack.callback(writer.abort)
            exports.append(Export(plan, writer))
        pieces = stream(checkpoint.weights, exports, options, on_event)
        for export in exports:
            export.writer.flush()
        if not all(plan.directory for plan in plans):  # an export that is a folder has its own
            write_licences(licences, checkpoint.provenance.name, options.folder)
        for export in exports:
            export.writer.commit()
            remove_stale(export.plan, options.folder)
    seconds = time.monotonic() - started
    return [
        _written(export, options.folder, found, seconds)
        for export, found in zip(exports, pieces, strict=True)
    ]


def with_first_tokens(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    options: ConvertOptions,
    on_block: OnBlock = lambda done, total: None,
) -> ConvertOptions:
    """Return the options with the inputs of rows' first tokens, where a plan's rounding needs them.

    That is a pass of a few tokens through the blocks; `on_block` is called with (done, in all).
    """
    compensated = any(tensor.compensated for plan in plans for tensor in plan.tensors)
    return first_tokens_known(checkpoint, options, on_block) if compensated else options


def first_tokens_known(
    checkpoint: Checkpoint, options: ConvertOptions, on_block: OnBlock = lambda done, total: None
) -> ConvertOptions:
    """Return the options with the inputs of rows' first tokens, if there is an archive which needs them."""
    if options.archive is None or options.first_tokens is not None:
        return options
    if options.archive.sensitive:  # where they weigh what they are found to weigh
        return options
    first = first_tokens_of(checkpoint, options.archive, on_block, options.device)
    return replace(options, first_tokens=first)


def _written(export: Export, folder: Path, pieces: Mapping[str, Sequence[Piece]], seconds: float) -> Written:
    plan, reused = export.plan, export.writer.reused
    n_tensors = sum(reused.get(tensor.name) == tensor.n_bytes for tensor in plan.tensors)
    n_reused, notes = sum(reused.values()), export.writer.notes
    return Written(plan, folder, pieces, seconds, n_reused, n_tensors, notes)


def plan_exports(checkpoint: Checkpoint, requests: Sequence[Request], options: ConvertOptions) -> list[Plan]:
    """Return every request's plan; raises PlanError with the reasons against any of them."""
    reasons = _weight_faults(checkpoint)
    reasons += [
        f"{request}: {reason}"
        for request in requests
        for reason in TARGETS[request.format].check(checkpoint, request, options)
    ]
    reasons += [f"{request} is asked for twice" for request in set(requests) if requests.count(request) > 1]
    if reasons:
        raise PlanError("this checkpoint cannot be written so", reasons=reasons)
    return [TARGETS[request.format].plan(checkpoint, request, options) for request in requests]


def _weight_faults(checkpoint: Checkpoint) -> list[str]:
    """Compare the weights with the config: what is not there would otherwise be written as zeros."""
    specs, faults = checkpoint.weights.specs(), []
    for name, shape in checkpoint.config.tensor_shapes().items():
        if name not in specs:
            faults.append(f"tensor {name} is missing")
        elif specs[name].shape != shape:
            faults.append(f"tensor {name} is {list(specs[name].shape)}, expected {list(shape)}")
    return faults


def check_destination(
    plans: Sequence[Plan], options: ConvertOptions, source_files: Sequence[Path] = ()
) -> None:
    """Create the folder; raises OutputError for files that exist already or too little room.

    A file that is being read is never overwritten, with `force` neither.
    """
    paths = [path for plan in plans for path in plan.paths(options.folder)]
    with explained(options.folder):
        if options.folder.exists() and not options.folder.is_dir():
            raise OutputError(f"{options.folder}: a file; -o takes a folder")
        own = [p.name for p in paths if any(p.exists() and p.samefile(s) for s in source_files)]
    if own:
        raise OutputError(
            f"{options.folder}: an export would take the place of its own source",
            reasons=[f"{name} is being read" for name in own],
            hint="write to another folder with -o, or under another --name",
        )
    foreign = [
        f"{plan.directory} was not made by a conversion"
        for plan in plans
        if plan.directory
        and plan.place(options.folder).exists()
        and not is_export(plan.place(options.folder))
    ]
    if foreign:
        raise OutputError(
            f"{options.folder}: an export would take the place of something else",
            reasons=foreign,
            hint="write to another folder with -o, or move that one",
        )
    refuse_taken(plans, options)
    files = [pair for plan in plans for pair in zip(plan.partials(options.folder), plan.files, strict=True)]
    leftovers = [
        partial
        for partial, file in files
        # One of another layout stays until the end.
        if options.fresh or not has_journal(partial) or goes_on(partial, file.head, file.n_bytes)
    ]
    check_room(options.folder, sum(plan.n_bytes for plan in plans), leftovers)
    with explained(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)


def refuse_taken(plans: Sequence[Plan], options: ConvertOptions) -> None:
    """Raise OutputError for files that exist already, unless they may be overwritten."""
    with explained(options.folder):
        there = [f"{path.name} exists" for plan in plans for path in _taken(plan, options.folder)]
    if there and not options.force:
        raise OutputError(f"{options.folder}: nothing is overwritten", reasons=there, hint="use --force")


def _taken(plan: Plan, folder: Path) -> list[Path]:
    """Return what has an export's names already: of one that is a folder, the folder."""
    names = [plan.place(folder)] if plan.directory else plan.paths(folder)
    return [path for path in names if path.exists()]


def read_licences(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the model's licence and notice files by name; raises CheckpointError for an unreadable one.

    Read before the weights, so that nothing is converted that could not be passed on.
    """
    licences = {}
    for source in checkpoint.provenance.travelling:
        if source.name.lower() != "readme.md":
            with readable(source):
                licences[source.name] = source.read_bytes()
    return licences


def write_licences(licences: Mapping[str, bytes], model: str, folder: Path) -> None:
    """Put the licence and notice files beside the exports; raises OutputError.

    They keep their names. Where another file has the name already, the model's name goes in front.
    """
    for name, data in licences.items():
        path = folder / name
        with explained(path):
            if path.exists() and path.read_bytes() != data:
                path = folder / f"{model}-{name}"
            done = path.exists() and path.read_bytes() == data
        if not done:
            write_whole(path, data)


def remove_stale(plan: Plan, folder: Path) -> None:
    """Remove what was said of an earlier export of these names: its report, its `*.failed` files."""
    from converters.report import report_path

    with explained(folder):
        report_path(plan.place(folder)).unlink(missing_ok=True)
        if plan.directory:
            shutil.rmtree(folder / (plan.directory + FAILED), ignore_errors=True)
            return
        for path in plan.paths(folder):
            path.with_name(path.name + FAILED).unlink(missing_ok=True)


def mark_failed(written: Written) -> tuple[Path, ...]:
    """Rename every file of an export, or its folder, to `*.failed`, so that nobody takes it for a good one.

    Its keys go: a conversion takes no slices from it either.
    """
    if written.plan.directory:
        place = written.place.with_name(written.place.name + FAILED)
        with explained(place):
            shutil.rmtree(place, ignore_errors=True)
            written.place.replace(place)
        return (place,)
    failed = tuple(path.with_name(path.name + FAILED) for path in written.paths)
    for path, new in zip(written.paths, failed, strict=True):
        with explained(new):
            keys_path(path).unlink(missing_ok=True)
            path.replace(new)
    return failed


@dataclass(frozen=True)
class Reread:
    """Files read back from the disk: each one's sha256, and the tensors that are not what was written."""

    file_hashes: dict[str, str]
    differing: tuple[str, ...]


def reread_hashes(written: Written) -> Reread:
    """Read an export back; its tensors' pieces are compared with what was written.

    `file_hashes` are by file name. `differing` is only meaningful for an export made with
    `hash_tensors`.
    """
    file_hashes, differing = {}, []
    for number, path in enumerate(written.paths):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for tensor in (t for t in written.plan.tensors if t.file == number):
                # A piece at a time: an embedding alone may be a gigabyte.
                if not all(_is_there(file, size, piece) for piece in written.pieces[tensor.name]):
                    differing.append(tensor.name)
            file_hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return Reread(file_hashes, tuple(differing))


def _is_there(file: BinaryIO, size: int, piece: Piece) -> bool:
    """Return whether a piece is what was written; one without a hash is not looked at."""
    if not piece.sha256:
        return True
    data = read_places(file.fileno(), piece.places, size)
    return data is not None and hashlib.sha256(data).hexdigest() == piece.sha256
