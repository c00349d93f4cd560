"""What an interrupted conversion has done, so that the next one need not do it again.

A slice's encoding is a pure function of what its key is a digest of (`converters.donors`). While a partial
file grows, its journal, beside it, gets a line for each slice that took a search. Whoever finds both later
asks for a slice by its key, and it does not matter what else has changed. If the file's layout has (another
type for some tensor moves all that follow), the leftover steps aside as `NAME.partial.old` and is a quarry
until the new file is whole. The lines of a whole file stay, as its keys.

    NAME.partial           grows                            becomes NAME
    NAME.partial.journal                                    becomes .NAME.keys
    NAME.partial.old       an earlier layout's, and its     removed when NAME is whole
    NAME.partial.old.journal

Types that are made as fast as they are read back (floats, Q8_0, plain Q4_0) are not noted.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TextIO

from converters.disk import PARTIAL, PartialFile, explained, open_locked, write_whole
from converters.donors import JOURNAL, Donors, Entry, journal_path, keys_path, keys_text, read_entries
from converters.places import Piece, Place
from quantize.errors import OutputError

OLD = ".old"
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


class JournaledFile:
    """A partial file that keeps what it was given, by keys, until it gets its final name."""

    def __init__(self, path: Path, head: bytes, n_bytes: int, *, fresh: bool = False) -> None:
        """Create `path`.partial of `n_bytes` that begins with `head`, or go on with a dead run's.

        A `fresh` file begins anew. Raises OutputError; what a dead run left is there then as before.
        """
        self._partial = path.with_name(path.name + PARTIAL)
        self._lock, self._noted = Lock(), dict[tuple[Place, ...], Entry]()
        with explained(path):
            stays = _step_aside(self._partial, head, n_bytes, fresh)
            self.file = PartialFile(path, n_bytes, keep=stays)
        self._entries = {entry.key: entry for entry in _noted(self._partial)}
        self._journal: TextIO | None = None  # opened with the first line: most types note nothing
        try:
            self.file.write(0, head)
        except BaseException:
            self.leave()
            raise

    def reuse(self, key: str, places: tuple[Place, ...], donors: Donors | None) -> Piece | None:
        """Put the bytes of a key where they belong, and return what is there; None where there are none.

        They are looked for in this file first, where they need not be written again, then at the donors.
        """
        entry = self._entries.get(key)
        data = None if entry is None else entry.read()
        if entry is not None and data is not None and entry.piece.places == places:
            with self._lock:
                self._noted[places] = entry
            return entry.piece
        if data is None and donors is not None:
            data = donors.find(key)
        if data is None or len(data) != sum(place.n_bytes for place in places):
            return None
        return self.write(key, places, memoryview(data))

    def put(self, places: tuple[Place, ...], data: memoryview, *, hashed: bool) -> Piece:
        """Write bytes that are as quickly made again: they are not noted; raises OutputError."""
        self.file.scatter(places, data)
        return Piece(places, hashlib.sha256(data).hexdigest() if hashed else "")

    def write(self, key: str, places: tuple[Place, ...], data: memoryview) -> Piece:
        """Write the bytes of a key to their places, and note them; raises OutputError."""
        self.file.scatter(places, data)
        piece = Piece(places, hashlib.sha256(data).hexdigest())
        entry = Entry(key, self._partial, piece)
        with self._lock, explained(self.file.path):
            if self._journal is None:
                self._journal = journal_path(self._partial).open("a", encoding="ascii")
                self._journal.write("\n")  # the line before may have been cut off
            self._journal.write(entry.line)
            self._journal.flush()
            self._noted[places] = entry
        return piece

    def flush(self) -> None:
        """Wait until the disk has everything, the keys included; raises OutputError.

        Until the file is renamed they are another's: of an earlier file, whose bytes they do not fit.
        """
        self.file.flush()
        if self._noted:
            write_whole(keys_path(self.file.path), keys_text(self._noted.values()))

    def forget(self) -> None:
        """Remove what served to go on: for a file that has its final name."""
        self._close()
        with explained(self.file.path):
            for path in _beside(self._partial):
                path.unlink(missing_ok=True)
            if not self._noted:
                keys_path(self.file.path).unlink(missing_ok=True)

    def leave(self) -> None:
        """Leave everything for a later run, or nothing where nothing was noted; harmless after `forget`."""
        if any(path.exists() for path in _beside(self._partial)):
            self._close()
            self.file.leave()
        else:
            self.file.abandon()

    def discard(self) -> None:
        """Remove the partial file, and what served to go on."""
        self.file.abandon()
        self._close()
        with explained(self.file.path):
            for path in _beside(self._partial):
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def has_journal(partial: Path) -> bool:
    """Return whether a partial file, or what is there under its name, has a journal."""
    return journal_path(partial).is_file()


def goes_on(partial: Path, head: bytes, n_bytes: int) -> bool:
    """Return whether a partial file of exactly this layout lies there, with a journal."""
    if not has_journal(partial) or not partial.is_file() or partial.stat().st_size != n_bytes:
        return False
    with partial.open("rb") as file:
        return file.read(len(head)) == head


def remove_other_shards(path: Path) -> None:
    """Remove leftovers of the same export cut into another number of files; raises OutputError.

    `path` is one of the export's finished files. What another run is writing stays.
    """
    export = _SHARD.sub("", path.name)
    names = {journal.name.rpartition(PARTIAL)[0] for journal in path.parent.glob(f"*{PARTIAL}*{JOURNAL}")}
    for name in (name for name in names if _SHARD.sub("", name) == export):
        with explained(path), suppress(OutputError):
            _remove_leftover(path.with_name(name + PARTIAL))


def _remove_leftover(partial: Path) -> None:
    held = open_locked(partial)
    try:
        for leftover in (partial, *_beside(partial)):
            leftover.unlink(missing_ok=True)
    finally:
        os.close(held)


def _step_aside(partial: Path, head: bytes, n_bytes: int, fresh: bool) -> bool:
    """Return whether a leftover's content stays in place; one of another layout gets the name `.old`."""
    if not partial.exists():
        journal_path(partial).unlink(missing_ok=True)
        return False
    held = open_locked(partial)
    try:
        if not fresh and goes_on(partial, head, n_bytes):
            return True
        # Of two earlier layouts the one that has more stays.
        if not fresh and _size_noted(partial) > _size_noted(_old(partial)):
            journal_path(partial).replace(journal_path(_old(partial)))
            partial.replace(_old(partial))
        journal_path(partial).unlink(missing_ok=True)
        return False
    finally:
        os.close(held)


def _noted(partial: Path) -> list[Entry]:
    return read_entries(journal_path(partial), partial)


def _size_noted(partial: Path) -> int:
    return sum(entry.piece.n_bytes for entry in _noted(partial))


def _old(partial: Path) -> Path:
    return partial.with_name(partial.name + OLD)


def _beside(partial: Path) -> tuple[Path, ...]:
    return journal_path(partial), _old(partial), journal_path(_old(partial))
