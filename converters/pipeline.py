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
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, check_room, explained, readable, write_whole
from converters.journal import goes_on, has_journal
from converters.plan import ConvertOptions, Plan, Request, Written
from converters.stream import Export, OnEvent, TensorDone, stream
from converters.targets import TARGETS
from quantize.errors import OutputError, PlanError

__all__ = ["Reread", "TensorDone", "convert", "mark_failed", "plan_exports", "reread_hashes"]

FAILED = ".failed"
_CHUNK_BYTES = 1 << 22


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
    with ExitStack() as stack:
        exports = []
        for plan in plans:
            writer = TARGETS[plan.request.format].open_writer(plan, options)
            stack.callback(writer.abort)
            exports.append(Export(plan, writer))
        hashes = stream(checkpoint.weights, exports, options, on_event)
        for export in exports:
            export.writer.flush()
        write_licences(licences, checkpoint.provenance.name, options.folder)
        for export in exports:
            export.writer.commit()
            remove_stale(export.plan, options.folder)
    seconds = time.monotonic() - started
    paths = [tuple(options.folder / file.name for file in plan.files) for plan in plans]
    reused = [export.writer.n_reused for export in exports]
    return [
        Written(plan, files, digests, seconds, n_reused)
        for plan, files, digests, n_reused in zip(plans, paths, hashes, reused, strict=True)
    ]


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
    paths = [options.folder / file.name for plan in plans for file in plan.files]
    with explained(options.folder):
        if options.folder.exists() and not options.folder.is_dir():
            raise OutputError(f"{options.folder}: a file; -o takes a folder")
        there = [f"{path.name} exists" for path in paths if path.exists()]
        own = [p.name for p in paths if any(p.exists() and p.samefile(s) for s in source_files)]
    if own:
        raise OutputError(
            f"{options.folder}: an export would take the place of its own source",
            reasons=[f"{name} is being read" for name in own],
            hint="write to another folder with -o, or under another --name",
        )
    if there and not options.force:
        raise OutputError(f"{options.folder}: nothing is overwritten", reasons=there, hint="use --force")
    leftovers = [
        partial
        for plan in plans
        for file in plan.files
        if not has_journal(partial := options.folder / (file.name + PARTIAL))
        or goes_on(partial, file.head, file.n_bytes)  # one of another layout stays until the end
    ]
    check_room(options.folder, sum(plan.n_bytes for plan in plans), leftovers)
    with explained(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)


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

    stale = [folder / (file.name + FAILED) for file in plan.files]
    for path in (report_path(folder / plan.files[0].name), *stale):
        with explained(path):
            path.unlink(missing_ok=True)


def mark_failed(written: Written) -> tuple[Path, ...]:
    """Rename every file of an export to `*.failed`, so that nobody takes it for a good one."""
    failed = tuple(path.with_name(path.name + FAILED) for path in written.paths)
    for path, new in zip(written.paths, failed, strict=True):
        with explained(new):
            path.replace(new)
    return failed


@dataclass(frozen=True)
class Reread:
    """Files read back from the disk: each one's sha256, and the tensors that are not what was written."""

    file_hashes: dict[str, str]
    differing: tuple[str, ...]


def reread_hashes(written: Written) -> Reread:
    """Read an export back in one pass; its tensors are compared with `written.tensor_hashes`.

    `file_hashes` are by file name. `differing` is only meaningful for an export made with
    `hash_tensors`.
    """
    file_hashes, differing = {}, []
    for number, path in enumerate(written.paths):
        whole = hashlib.sha256()
        with path.open("rb") as file:
            for tensor in (t for t in written.plan.tensors if t.file == number):
                _hash_bytes(file, tensor.offset - file.tell(), whole)
                digest = _hash_bytes(file, tensor.n_bytes, whole)
                if written.tensor_hashes and digest != written.tensor_hashes[tensor.name]:
                    differing.append(tensor.name)
            _hash_bytes(file, path.stat().st_size - file.tell(), whole)
        file_hashes[path.name] = whole.hexdigest()
    return Reread(file_hashes, tuple(differing))


def _hash_bytes(file: BinaryIO, n_bytes: int, whole: "hashlib._Hash") -> str:
    part = hashlib.sha256()
    while n_bytes > 0:
        data = file.read(min(n_bytes, _CHUNK_BYTES))
        if not data:
            break
        part.update(data)
        whole.update(data)
        n_bytes -= len(data)
    return part.hexdigest()
