"""What an interrupted conversion has done, so that the next one need not do it again.

A slice's encoding is a pure function: of the rows, the quant type, the importances and the version of the
encoders. A digest of these is its *key*. While a partial file grows, its journal, beside it, gets a line for
each slice of a type that is searched for:

    key  offset  length  sha256 of the bytes

Whoever finds both files later asks for a slice by its key and gets the bytes, provided they still have that
sha256: a line that reached the disk before its bytes did, when the power went, is found out. It does not
matter what else has changed. If the file's layout has (another type for some tensor moves all that follow),
the leftover steps aside as `NAME.partial.old` and serves as a quarry until the new file is whole.

    NAME.partial           grows                            removed, with its journal, when NAME is whole
    NAME.partial.journal
    NAME.partial.old       an earlier layout's, and its     removed likewise
    NAME.partial.old.journal

Types that are not searched for (floats, Q8_0) are made as fast as they are read back: they are not noted.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TextIO

import torch

from converters.disk import PARTIAL, PartialFile, explained, open_locked
from quantize.codecs import ENCODING

JOURNAL, OLD = ".journal", ".old"


def slice_key(rows: torch.Tensor, quant: str, order: int, importance: torch.Tensor | None) -> str:
    """Return the digest of all that decides a slice's bytes; `order` says how its rows change places."""
    digest = hashlib.sha256(f"{ENCODING} {quant} {order} {tuple(rows.shape)} {rows.dtype}".encode())
    for tensor in (rows, importance):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Entry:
    path: Path
    offset: int
    n_bytes: int
    sha256: str


class JournaledFile:
    """A partial file that keeps what it was given, by keys, until it gets its final name."""

    def __init__(self, path: Path, head: bytes, n_bytes: int) -> None:
        """Create `path`.partial of `n_bytes` that begins with `head`, or go on with a dead run's.

        Raises OutputError.
        """
        self._partial = path.with_name(path.name + PARTIAL)
        self._lock, self._used = Lock(), 0
        with explained(path):
            stays = _step_aside(self._partial, head, n_bytes)
            self._entries = {**_read(_old(self._partial)), **_read(self._partial)}
            self.file = PartialFile(path, n_bytes, keep=stays)
        self._journal: TextIO | None = None  # opened with the first line: most types note nothing
        self.file.write(0, head)

    @property
    def n_reused(self) -> int:
        """Bytes that an earlier run had made."""
        return self._used

    def reuse(self, key: str, offset: int) -> torch.Tensor | None:
        """Put the bytes of a key at `offset` and return them, uint8 (n,); None where there are none."""
        entry = self._entries.get(key)
        if entry is None or (data := _checked(entry)) is None:
            return None
        if (entry.path, entry.offset) != (self._partial, offset):
            self._put(key, offset, data, entry.sha256)
        with self._lock:
            self._used += len(data)
        return torch.frombuffer(data, dtype=torch.uint8)

    def write(self, key: str, offset: int, data: memoryview) -> None:
        """Write the bytes of a key at `offset`, and note them; raises OutputError."""
        self._put(key, offset, data, hashlib.sha256(data).hexdigest())

    def _put(self, key: str, offset: int, data: bytearray | memoryview, sha256: str) -> None:
        self.file.write(offset, memoryview(data))
        with self._lock, explained(self.file.path):
            if self._journal is None:
                self._journal = _journal(self._partial).open("a", encoding="ascii")
            self._journal.write(f"{key} {offset} {len(data)} {sha256}\n")
            self._journal.flush()

    def forget(self) -> None:
        """Remove what served to go on: for a file that has its final name."""
        self._close()
        with explained(self.file.path):
            for path in _helpers(self._partial):
                path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Leave everything for a later run, or nothing where nothing was noted; harmless after `forget`."""
        if any(path.exists() for path in _helpers(self._partial)):
            self._close()
            self.file.leave()
        else:
            self.file.abandon()

    def discard(self) -> None:
        """Remove the partial file, and what served to go on."""
        self.file.abandon()
        self.forget()

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def has_journal(partial: Path) -> bool:
    """Return whether a partial file, or what is there under its name, has a journal."""
    return _journal(partial).is_file()


def goes_on(partial: Path, head: bytes, n_bytes: int) -> bool:
    """Return whether a partial file of exactly this layout lies there, with a journal."""
    if not has_journal(partial) or not partial.is_file() or partial.stat().st_size != n_bytes:
        return False
    with partial.open("rb") as file:
        return file.read(len(head)) == head


def _step_aside(partial: Path, head: bytes, n_bytes: int) -> bool:
    """Return whether a leftover's content stays in place; one of another layout gets the name `.old`."""
    if not partial.exists():
        _journal(partial).unlink(missing_ok=True)
        return False
    held = open_locked(partial)
    try:
        if goes_on(partial, head, n_bytes):
            return True
        if _read(partial):
            _journal(partial).replace(_journal(_old(partial)))
            partial.replace(_old(partial))
        _journal(partial).unlink(missing_ok=True)
        return False
    finally:
        os.close(held)


def _read(partial: Path) -> dict[str, _Entry]:
    """Return a journal's entries by their keys; a line that was cut off is passed over."""
    try:
        lines = _journal(partial).read_text("ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    words = (line.split(" ") for line in lines)
    whole = (parts for parts in words if len(parts) == 4 and len(parts[3]) == 64)
    return {key: _Entry(partial, int(at), int(size), digest) for key, at, size, digest in whole}


def _checked(entry: _Entry) -> bytearray | None:
    """Return an entry's bytes if they are what the journal says."""
    data = bytearray(entry.n_bytes)
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            n_read = file.readinto(data)
    except OSError:
        return None
    whole = n_read == entry.n_bytes and hashlib.sha256(data).hexdigest() == entry.sha256
    return data if whole else None


def _journal(partial: Path) -> Path:
    return partial.with_name(partial.name + JOURNAL)


def _old(partial: Path) -> Path:
    return partial.with_name(partial.name + OLD)


def _helpers(partial: Path) -> tuple[Path, ...]:
    return _journal(partial), _old(partial), _journal(_old(partial))
