"""The user's own calibration text: files, source trees, JSONL, Parquet, datasets of the hub.

Every source is checked before any is read, so that a missing file and a missing package are told at once.
A folder is one project: its files may make repository rows. Left out of a folder are hidden entries, folders
of dependencies and builds, links, files over 1 MiB, and what is not UTF-8 text; a note counts them.
"""

import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

from converters.corpus.order import shuffled
from converters.corpus.records import Records, read_records, sort_records
from converters.corpus.texts import Document, FileRecord, Texts, language_of
from quantize.errors import CorpusError, UsageError

MOST_BYTES: Final = 64 << 20
"""Text taken from one source: sixty times the default budget. More of it is passed over, with a note."""
HUGE_FILE: Final = 1 << 20
_UNSTATED: Final = "not stated"
_LONGEST_LINE: Final = 10_000  # longer ones are minified code or data
_SKIPPED_FOLDERS: Final = frozenset(
    {"node_modules", "__pycache__", "build", "dist", "target", "venv", "site-packages"}
)
_Record = TypeVar("_Record")
_DATASET_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGES: Final = {".parquet": "pyarrow", "dataset": "datasets"}
_COLUMNS: Final = ("text", "content", "instruction", "input", "output", "messages", "path")


def read_sources(names: Sequence[str]) -> Texts:
    """Return the text of all sources.

    Raises UsageError for what does not exist or needs a package that is not installed (with the install
    line), CorpusError for records that cannot be read or no text at all; each with every reason.
    """
    kinds = {name: _kind(name) for name in names}
    _refuse(kinds)
    parts, faults = list[Texts](), list[str]()
    for name, kind in kinds.items():
        try:
            parts.append(_READERS[kind](name))
        except CorpusError as error:
            faults += [error.message, *error.reasons]
    if faults:
        raise CorpusError("the calibration text cannot be read", reasons=faults)
    texts = _joined(parts)
    if not texts.documents and not texts.conversations:
        raise CorpusError(f"no readable text in {', '.join(names)}", reasons=texts.notes)
    return texts


def _kind(name: str) -> str:
    """How a source is read: folder, .jsonl, .parquet, file, dataset, or missing."""
    path = Path(name)
    if path.is_dir():
        return "folder"
    if path.is_file():
        suffix = path.suffix.lower()
        return suffix if suffix in (".jsonl", ".parquet") else "file"
    known_suffix = language_of(name) != (path.suffix.lower().lstrip(".") or "other")
    looks_like_file = known_suffix or path.suffix.lower() in (".jsonl", ".parquet")
    return "dataset" if _DATASET_ID.fullmatch(name) and not looks_like_file else "missing"


def _refuse(kinds: dict[str, str]) -> None:
    missing = [f"{name}: no such file or folder" for name, kind in kinds.items() if kind == "missing"]
    needed = {
        kind: name for name, kind in kinds.items() if kind in _PACKAGES and not _installed(_PACKAGES[kind])
    }
    absent = [f"{name}: {_PACKAGES[kind]} is not installed" for kind, name in needed.items()]
    if missing or absent:
        install = f"pip install {' '.join(_PACKAGES[kind] for kind in needed)}" if needed else ""
        raise UsageError("not all calibration sources can be read", reasons=[*missing, *absent], hint=install)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _joined(parts: Iterable[Texts]) -> Texts:
    parts = list(parts)
    return Texts(
        name="user",
        documents=tuple(chain.from_iterable(part.documents for part in parts)),
        conversations=tuple(chain.from_iterable(part.conversations for part in parts)),
        files={name: record for part in parts for name, record in part.files.items()},
        notes=tuple(chain.from_iterable(part.notes for part in parts)),
    )


@dataclass
class _Skipped:
    """Counts of a folder's files that were passed over, by reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def note(self, name: str) -> tuple[str, ...]:
        told = ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items()))
        return (f"{name}: files passed over: {told}",) if told else ()


def _folder(name: str) -> Texts:
    """Read a folder's files, in the order of their digests, until the bound on bytes is reached."""
    root, skipped = Path(name), _Skipped()
    documents, records, n_bytes = list[Document](), dict[str, FileRecord](), 0
    for relative in shuffled((str(p.relative_to(root).as_posix()) for p in _walk(root, skipped)), seed=0):
        data = _data(root / relative)
        if n_bytes >= MOST_BYTES:
            skipped.add("beyond the first 64 MiB")
        elif (text := _text(data, skipped)) is not None:
            n_bytes += len(data)
            records[f"{name}: {relative}"] = _record(f"{name}: {relative}", data)
            language = language_of(relative)
            documents.append(
                Document(text, relative, language, f"{name}: {relative}", root.resolve().name, True)
            )
    documents.sort(key=lambda document: document.path)
    return Texts(name, tuple(documents), (), records, skipped.note(name))


def _walk(folder: Path, skipped: _Skipped) -> Iterator[Path]:
    """Yield a folder's ordinary files, hidden ones, links and folders of dependencies left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and path.name.isprintable():
                yield from _walk(path, skipped)
        elif path.is_file():
            if not path.name.isprintable():  # bytes that are no text come as lone surrogates
                skipped.add("with a name that is not text")
            elif path.stat().st_size > HUGE_FILE:
                skipped.add("over 1 MiB")
            else:
                yield path


def _text(data: bytes, skipped: _Skipped) -> str | None:
    """The text of a folder's file, or None if it is none or is not written by hand."""
    text = _decoded(data)
    if text is None:
        skipped.add("not UTF-8 text")
    elif not text.strip():
        skipped.add("empty")
    elif max(map(len, text.split("\n"))) > _LONGEST_LINE:
        skipped.add(f"with lines over {_LONGEST_LINE:,} characters")
    else:
        return text
    return None


def _decoded(data: bytes) -> str | None:
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _file(name: str) -> Texts:
    data = _data(Path(name))
    text = _decoded(data)
    if text is None:
        raise CorpusError(f"{name}: not UTF-8 text")
    documents = (Document(text, Path(name).name, language_of(name), name),) if text.strip() else ()
    return Texts(name, documents, (), {name: _record(name, data)})


def _jsonl(name: str) -> Texts:
    bounded = _Bounded(name)
    try:
        with Path(name).open(encoding="utf-8-sig", newline="\n") as lines:
            records = read_records(bounded.of(lines), name)
    except UnicodeDecodeError:
        raise CorpusError(f"{name}: not UTF-8 text") from None
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror or error}") from None
    return _of_records(name, records, _file_digest(name), bounded)


def _parquet(name: str) -> Texts:
    """Read the columns that records are known by, row after row."""
    parquet: Any = importlib.import_module("pyarrow.parquet")
    bounded = _Bounded(name)
    try:
        table = parquet.ParquetFile(name)
        columns = [column for column in table.schema_arrow.names if column in _COLUMNS]
        batches = table.iter_batches(columns=columns)
        rows = list(bounded.of(row for batch in batches for row in batch.to_pylist()))
    # pyarrow's errors derive from ValueError, OSError and its own class alike.
    except Exception as error:
        raise CorpusError(f"{name}: not a Parquet file that can be read: {error}") from None
    records = sort_records(enumerate(map(_present, rows), 1), name)
    return _of_records(name, records, _file_digest(name), bounded)


def _dataset(name: str) -> Texts:
    """Read the training split of a dataset of the hub as a stream; its digest is that of the rows read."""
    datasets: Any = importlib.import_module("datasets")
    bounded, digest = _Bounded(name), hashlib.sha256()
    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        rows = list(bounded.of({c: row[c] for c in _COLUMNS if c in row} for row in stream))
    # A network, a hub and a parser are behind this call; each has errors of its own.
    except Exception as error:
        raise CorpusError(f"{name}: the dataset cannot be read: {error}") from None
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    records = sort_records(enumerate(map(_present, rows), 1), name)
    return _of_records(name, records, digest.hexdigest(), bounded)


class _Bounded:
    """Passes records on until they hold `MOST_BYTES` of text, and can say that it stopped."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.notes: tuple[str, ...] = ()

    def of(self, records: Iterable[_Record]) -> Iterator[_Record]:
        n_bytes = 0
        for number, record in enumerate(records):
            if n_bytes >= MOST_BYTES:
                self.notes = (f"{self._name}: only the first {number:,} records are used",)
                return
            n_bytes += len(str(record))
            yield record


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row without its empty cells."""
    return {column: value for column, value in row.items() if value is not None}


def _of_records(name: str, records: Records, digest: str, bounded: _Bounded) -> Texts:
    files = {name: FileRecord(name, digest, _UNSTATED)}
    return Texts(name, records.documents, records.conversations, files, bounded.notes)


def _file_digest(name: str) -> str:
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from None


def _record(name: str, data: bytes) -> FileRecord:
    return FileRecord(name, hashlib.sha256(data).hexdigest(), _UNSTATED)


_READERS: Final[dict[str, Callable[[str], Texts]]] = {
    "folder": _folder,
    "file": _file,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    "dataset": _dataset,
}
