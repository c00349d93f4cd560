"""`stats.json`, the manifest: what the archive is, of which model and corpus, and the hashes of its members.

It is written last, so a folder that has one is a whole archive.

    format    "dscq-statistics"            version   1
    request   model: the fingerprint; corpus: what the caller says about the rows; rows_sha256; options: what
              else the statistics depend on (micro_batch, device, ranks, diagonal_only, on_nonfinite, add, and
              tokens where they do not count alike)
    threads   of torch, on each rank: they decide the last bit
    n_tokens  tokens of all rows           n_rows    their number
    kinds     the kinds of rows; rows.safetensors holds numbers into this list
    dropped   rows that were left out: [row, layer, input]
    members   file name -> {"n_bytes", "sha256"}; a reader passes over members that it does not know
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.disk import write_whole
from converters.stats.fingerprint import differences
from quantize.errors import ArchiveError

NAME = "stats.json"
PROGRESS = "progress.json"
"""What there is in place of the manifest while a run is not finished."""
SENSITIVE = "sensitive"
"""The option `tokens` of an archive whose tokens count by their gradients; others have no such option."""
FORMAT, VERSION = "dscq-statistics", 1
_HINT = "calibrate again with --fresh"


@dataclass(frozen=True)
class Member:
    """A file of the archive: its length and its sha256 in hexadecimal digits."""

    n_bytes: int
    sha256: str


_HOW = ("device", "micro_batch", "ranks")


def _short(value: object) -> str:
    """Return a value as text, of a long one how much it holds."""
    text = repr(value)
    return f"{len(value)} entries" if isinstance(value, list | dict) and len(text) > 80 else text


@dataclass(frozen=True)
class Request:
    """What is calibrated and how, made of what JSON has: any difference makes another archive."""

    model: Mapping[str, Any]
    corpus: Mapping[str, Any]
    rows_sha256: str
    options: Mapping[str, Any]

    def changes(self, now: "Request", *, made: bool = False) -> list[str]:
        """Return every difference from this request, which was begun, or `made`, to `now`.

        Of an archive that is made it no longer matters on what and in what portions it was computed.
        """
        changes = [f"model: {reason}" for reason in differences(self.model, now.model)]
        for what, begun, asked in (
            ("corpus", self.corpus, now.corpus),
            ("option", self.options, now.options),
        ):
            for key in sorted(begun.keys() | asked.keys()):
                if begun.get(key) != asked.get(key) and not (made and key in _HOW):
                    here, there = _short(asked.get(key)), _short(begun.get(key))
                    changes.append(f"{what} {key}: {here}, begun with {there}")
        if self.rows_sha256 != now.rows_sha256:
            changes.append("corpus: the rows are others")
        return changes


@dataclass(frozen=True)
class Manifest:
    """The manifest's content; see the table above."""

    request: Request
    threads: int
    n_tokens: int
    n_rows: int
    kinds: tuple[str, ...]
    dropped: tuple[tuple[int, int, str], ...]
    members: Mapping[str, Member]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `stats.json` so that it appears whole; raises OutputError."""
    document = {"format": FORMAT, "version": VERSION} | asdict(manifest)
    write_whole(folder / NAME, json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `stats.json`; raises ArchiveError for what is no manifest of this version."""
    path = folder / NAME
    document = _document(path)
    if document.get("format") != FORMAT:
        raise ArchiveError(f"{path}: format {document.get('format')!r}, expected {FORMAT!r}")
    if document.get("version") != VERSION:
        found = f"version {document.get('version')!r}, this dscq reads version {VERSION}"
        raise ArchiveError(f"{path}: {found}", hint=_HINT)
    try:
        return _manifest(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArchiveError(f"{path}: damaged: {type(error).__name__}: {error}", hint=_HINT) from None


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        what = "no statistics archive" if path.parent.is_dir() else "no such folder"
        hint = "make one with dscq calibrate"
        if (path.parent / PROGRESS).exists():
            what, hint = "its calibration was interrupted", "the same dscq calibrate command goes on with it"
        raise ArchiveError(f"{path.parent}: {what}: {NAME} is missing", hint=hint) from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ArchiveError(f"{path}: damaged: {error}", hint=_HINT) from None
    if not isinstance(document, dict):
        raise ArchiveError(f"{path}: damaged: no JSON object", hint=_HINT)
    return document


def _manifest(document: Mapping[str, Any]) -> Manifest:
    members = {
        str(name): Member(int(fields["n_bytes"]), str(fields["sha256"]))
        for name, fields in document["members"].items()
    }
    return Manifest(
        parse_request(document["request"]),
        int(document["threads"]),
        int(document["n_tokens"]),
        int(document["n_rows"]),
        tuple(map(str, document["kinds"])),
        tuple((int(row), int(layer), str(name)) for row, layer, name in document["dropped"]),
        members,
    )


def parse_request(fields: Mapping[str, Any]) -> Request:
    """Return a request from its JSON; raises TypeError or KeyError for what is none."""
    for key in ("model", "corpus", "options"):
        if not isinstance(fields[key], dict):
            raise TypeError(f"{key} is no object")
    return Request(fields["model"], fields["corpus"], str(fields["rows_sha256"]), fields["options"])
