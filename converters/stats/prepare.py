"""Before a calibration works: its request, the folder, what an earlier run left, the room on the disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, check_room, explained
from converters.stats import manifest, progress
from converters.stats.archive import Archive, open_archive
from converters.stats.fingerprint import differences, fingerprint
from converters.stats.manifest import SENSITIVE, Request, read_manifest
from converters.stats.members import (
    HEAD,
    ROWS,
    WEIGHTS,
    Rows,
    TokenRow,
    archive_bytes,
    block_member,
    file_hash,
    gather_rows,
)
from converters.stats.progress import Progress, read_progress
from quantize.calibrate import micro_batch_for
from quantize.errors import ArchiveError, OutputError, UsageError
from quantize.llama import LlamaConfig
from quantize.reference import INPUTS

STATES = "states-"
_MOST_KINDS = 256
_LISTED = 12


@dataclass(frozen=True)
class CalibrateOptions:
    """How to calibrate into `folder`.

    `device` is where the forward runs; `diagonal_only` gathers no Hessians, only what an imatrix needs; `add`
    is another archive of the same model, whose statistics and rows go into the new one; with `on_nonfinite`
    "drop" a row with activations that are not finite is left out (and recorded) rather than an error;
    `micro_batch` is in tokens, None: by the memory that is free, or as an earlier run began; `fresh` starts
    over, and replaces an archive that is there. With `sensitivity` tokens count by their gradients
    (quantize/sensitivity.py) and not alike.
    """

    folder: Path
    device: str = "cpu"
    diagonal_only: bool = False
    add: Path | None = None
    on_nonfinite: Literal["stop", "drop"] = "stop"
    micro_batch: int | None = None
    fresh: bool = False
    sensitivity: bool = False


@dataclass(frozen=True)
class Task:
    """What is left to do: where to start (an earlier run's, if `begun`), the new rows, `base` to add to."""

    progress: Progress
    begun: bool
    rows: Rows
    base: Archive | None


def prepare(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    identity: Mapping[str, Any],
    options: CalibrateOptions,
    n_ranks: int,
) -> Task | None:
    """Check everything and return what is to be done; None where the archive is there already.

    The folder must exist. Raises UsageError, ArchiveError, OutputError as `calibrate_checkpoint` says.
    """
    _check_folder(options.folder)
    gathered, model = gather_rows(rows), fingerprint(checkpoint)
    base = None if options.add is None else _base(options, model)
    if options.fresh:
        _clear(options.folder)
    begun = read_progress(options.folder)
    made = read_manifest(options.folder).request if (options.folder / manifest.NAME).exists() else None
    earlier = made or (begun.request if begun is not None else None)
    request = _request(model, gathered, identity, options, n_ranks, base, earlier)
    if earlier is not None and (changes := earlier.changes(request, made=made is not None)):
        what = "holds an archive of another request" if made else "was begun with another request"
        hint = "use another folder, or start over with --fresh"
        raise ArchiveError(f"{options.folder}: {what}", reasons=changes, hint=hint)
    if made is not None:
        return None
    if begun is not None:
        _check_members(options.folder, begun)
    check_room(
        options.folder, needed_bytes(checkpoint.config, gathered, base, options), _ours(options.folder)
    )
    return Task(begun or Progress(request, torch.get_num_threads()), begun is not None, gathered, base)


def needed_bytes(config: LlamaConfig, rows: Rows, base: Archive | None, options: CalibrateOptions) -> int:
    """Return the bytes of disk that the run takes: the archive, and until it is done the states, twice."""
    n_tokens = len(rows.ids) + (base.manifest.n_tokens if base is not None else 0)
    states = 2 * 4 * len(rows.ids) * config.hidden_size
    weights = 4 * len(rows.ids) * config.n_layers * len(set(INPUTS.values())) if options.sensitivity else 0
    return archive_bytes(config, n_tokens, options.diagonal_only) + states + weights


def remove_leftovers(folder: Path) -> None:
    """Remove what was only needed to go on; raises OutputError."""
    with explained(folder):
        for path in (*folder.glob(f"{STATES}*"), folder / WEIGHTS, folder / progress.NAME):
            path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove an archive and what a run left, the manifest first: half an archive must not look whole."""
    with explained(folder):
        for path in _ours(folder):
            if path.name != progress.LOCK:  # which this run holds
                path.unlink()


def _ours(folder: Path) -> list[Path]:
    """Return the files of the folder that a calibration writes."""
    names = (manifest.NAME, progress.NAME, block_member("*"), HEAD, ROWS, WEIGHTS)
    patterns = (*names, *(f"{name}{PARTIAL}" for name in names), f"{STATES}*", progress.LOCK)
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _check_folder(folder: Path) -> None:
    """Refuse somebody else's folder. Parts of an archive may be there, from a run killed while it cleared."""
    if (folder / manifest.NAME).exists() or (folder / progress.NAME).exists():
        return
    if others := sorted(path.name for path in set(folder.iterdir()) - set(_ours(folder))):
        raise OutputError(
            f"{folder}: no statistics archive, and not empty: {', '.join(others[:_LISTED])}",
            hint="give a new folder",
        )


def _check_members(folder: Path, begun: Progress) -> None:
    reasons = [
        f"{name} is missing or has another length"
        for name, member in begun.members.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != member.n_bytes
    ]
    if reasons:
        raise ArchiveError(
            f"{folder}: what the earlier run left is damaged", reasons=reasons, hint="start over with --fresh"
        )


def check_rows(rows: Sequence[TokenRow], config: LlamaConfig) -> None:
    """Raise UsageError, with every reason, for rows that the model cannot take."""
    reasons = list(_row_reasons(rows, config.vocab_size))
    n_kinds = len({row.kind for row in rows})
    if n_kinds > _MOST_KINDS:
        reasons.append(f"{n_kinds} kinds of rows, at most {_MOST_KINDS} are possible")
    if reasons or not rows:
        hint = f"token ids must lie between 0 and {config.vocab_size - 1}"
        found = reasons[:_LISTED] or ["there are none"]
        raise UsageError("rows that cannot be calibrated with", reasons=found, hint=hint)


def _row_reasons(rows: Sequence[TokenRow], vocab_size: int) -> Iterator[str]:
    for number, row in enumerate(rows):
        if len(row.ids) == 0:
            yield f"row {number} is empty"
            continue
        low, high = (int(bound) for bound in torch.aminmax(row.ids))
        if low < 0 or high >= vocab_size:
            yield f"row {number} has token ids from {low} to {high}"


def _base(options: CalibrateOptions, model: Mapping[str, Any]) -> Archive:
    """Open the archive to add to; it must be of the same model and hold the same statistics."""
    assert options.add is not None
    if options.add.resolve() == options.folder.resolve():
        raise UsageError(f"{options.add}: cannot be added to itself", hint="write the sum to another folder")
    base = open_archive(options.add)
    reasons = differences(base.manifest.request.model, model)
    if base.diagonal_only != options.diagonal_only:
        reasons.append("one has Hessians, the other the diagonals only")
    if base.sensitive != options.sensitivity:
        reasons.append("in one tokens count by their gradients, in the other alike")
    if reasons:
        raise ArchiveError(f"{options.add}: cannot be added to", reasons=reasons)
    return base


def _request(
    model: Mapping[str, Any],
    rows: Rows,
    identity: Mapping[str, Any],
    options: CalibrateOptions,
    n_ranks: int,
    base: Archive | None,
    earlier: Request | None,
) -> Request:
    """Return the request; a micro-batch that nobody asked for is the earlier run's, or by free memory."""
    corpus = dict(identity)
    if base is not None:
        name = f"{base.manifest.request.corpus.get('name', '')} + {identity.get('name', '')}"
        corpus = {"name": name, "added": dict(identity), "to": dict(base.manifest.request.corpus)}
    micro_batch = options.micro_batch
    if micro_batch is None and earlier is not None:
        micro_batch = earlier.options["micro_batch"]
    if micro_batch is None:
        config = LlamaConfig(**model["config"])
        micro_batch = micro_batch_for(
            max(config.hidden_size, config.intermediate_size), free_bytes(options.device)
        )
    how = {
        "micro_batch": micro_batch,
        "device": torch.device(options.device).type,
        "ranks": n_ranks,
        "diagonal_only": options.diagonal_only,
        "on_nonfinite": options.on_nonfinite,
        "add": None if base is None else file_hash(base.folder / manifest.NAME),
    }
    if options.sensitivity:  # archives from before there was the choice have no such entry
        how["tokens"] = SENSITIVE
    return Request(model, corpus, rows.sha256(), how)


def free_bytes(device: str) -> int:
    """Return the bytes of memory that are free where the forward runs."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = (line.split() for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
