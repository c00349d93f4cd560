"""The user's own calibration text: files, source trees, JSONL, Parquet, datasets of the hub.

Every source is checked before any is read, so that a missing file and a missing package are told at once.
A folder is one project: its files may make repository rows. Left out of a folder are hidden entries, folders
of dependencies and builds, links, files over 1 MiB, and what is not UTF-8 text; a note counts them.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

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
_DATASET_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGES: Final = {".parquet": "pyarrow", "dataset": "datasets"}
_COLUMNS: Final = ("text", "content", "instruction", "input", "output", "messages", "path")


def read_sources(names: Sequence[str]) -> Texts:
    """Return the text of all sources.

    Raises UsageError for what does not exist or needs a package that is not installed (with the install
    line), CorpusError for records that cannot be read or when there is no text at all; each with every reason.
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
        text = _text(data, skipped) if n_bytes < MOST_BYTES else skipped.add("beyond the bound on text")
        if text is not None:
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
            if path.name not in _SKIPPED_FOLDERS:
                yield from _walk(path, skipped)
        elif path.is_file():
            if path.stat().st_size > HUGE_FILE:
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
    data = _data(Path(name))
    text = _decoded(data)
    if text is None:
        raise CorpusError(f"{name}: not UTF-8 text")
    # Not splitlines: a record may hold U+2028, which is no line end in JSON.
    return _of_records(name, read_records(text.split("\n"), name), _record(name, data))


def _parquet(name: str) -> Texts:
    """Read the columns that records are known by, row after row, up to the bound on bytes."""
    pyarrow: Any = importlib.import_module("pyarrow.parquet")
    data = _data(Path(name))
    try:
        table = pyarrow.ParquetFile(name)
        columns = [column for column in table.schema_arrow.names if column in _COLUMNS]
        rows = [row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist()]
    # pyarrow's errors derive from ValueError, OSError and its own class alike.
    except Exception as error:
        raise CorpusError(f"{name}: not a Parquet file that can be read: {error}") from None
    return _of_records(name, sort_records(enumerate(rows, 1), name), _record(name, data))


def _dataset(name: str) -> Texts:
    """Read the training split of a dataset of the hub as a stream, up to the bound on bytes."""
    datasets: Any = importlib.import_module("datasets")
    rows, n_bytes, digest = list[Any](), 0, hashlib.sha256()
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            kept = {column: row[column] for column in _COLUMNS if row.get(column) is not None}
            line = repr(sorted(kept.items())).encode()
            digest.update(line)
            n_bytes += len(line)
            rows.append(kept)
            if n_bytes > MOST_BYTES:
                break
    # A network, a hub and a parser are behind this call; each has errors of its own.
    except Exception as error:
        raise CorpusError(f"{name}: the dataset cannot be read: {error}") from None
    record = FileRecord(name, digest.hexdigest(), _UNSTATED)
    return _of_records(name, sort_records(enumerate(rows, 1), name), record)


def _of_records(name: str, records: Records, record: FileRecord) -> Texts:
    return Texts(name, records.documents, records.conversations, {name: record})


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
