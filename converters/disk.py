"""Files that are whole or not there at all.

A file grows as `NAME.partial` in its own folder, gets its full length at once (so that a full disk shows
at the start), is flushed to the disk, and only then renamed. Whoever is killed leaves a `.partial` file,
never one under the final name; the next run takes the leftover over. A lock on it, which dies with its
process, keeps two runs from writing the same file.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.places import Place
from quantize.errors import CheckpointError, OutputError

PARTIAL = ".partial"
# Bytes per write. Larger ones make Linux look for large runs of free pages for its cache: measured on ext4,
# the same data takes three to four times the processor time in writes of 2 MiB.
_WRITE_BYTES = 1 << 17

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files this large are not allowed there",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a part of the path is not a folder",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the file and the cause."""
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"{path}: cannot be written: {cause}") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the file that cannot be read, and the cause."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise CheckpointError(f"{error.filename or path}: cannot be read: {cause}") from error


def check_room(folder: Path, n_bytes: int, reusable: Sequence[Path] = ()) -> None:
    """Raise OutputError unless `n_bytes` fit the folder's disk; leftovers in `reusable` count as free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with explained(folder):
        free = shutil.disk_usage(existing).free
        free += sum(path.stat().st_blocks * 512 for path in reusable if path.is_file())
    if n_bytes > free:
        needed, available = f"{n_bytes / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise OutputError(
            f"{folder}: not enough room on the disk: {needed} needed, {available} available",
            hint="free some room, or write elsewhere with -o",
        )


class PartialFile:
    """A file of known length, written at any offset by any thread, that appears when it is whole."""

    def __init__(self, path: Path, n_bytes: int, *, keep: bool = False) -> None:
        """Create `path`.partial, or take over a dead run's: empty, or with what it holds to `keep`.

        Raises OutputError, and leaves there what was to be kept.
        """
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        with explained(path):
            self._file = open_locked(self.partial)
            try:
                if not keep:
                    os.ftruncate(self._file, 0)
                _reserve(self._file, n_bytes)
            except OSError:
                if keep:
                    self.leave()
                else:
                    self.abandon()
                raise

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`; raises OutputError."""
        view = memoryview(data)
        with explained(self.path):
            while view:
                n_written = os.pwrite(self._file, view[:_WRITE_BYTES], offset)
                view, offset = view[n_written:], offset + n_written

    def scatter(self, places: Sequence[Place], data: memoryview) -> None:
        """Write `data`, the bytes of the places one after the other, to where they belong."""
        at = 0
        for place in places:
            for offset, within in place.runs():
                self.write(offset, data[at + within : at + within + place.width])
            at += place.n_bytes

    def flush(self) -> None:
        """Wait until the disk has everything; raises OutputError."""
        with explained(self.path):
            os.fsync(self._file)

    def rename(self) -> None:
        """Give the file its final name, replacing what has it; raises OutputError."""
        with explained(self.path):
            self.partial.replace(self.path)
        self._close()

    def abandon(self) -> None:
        """Remove the partial file; harmless after `rename`."""
        if self._file >= 0:
            self.partial.unlink(missing_ok=True)
            self._close()

    def leave(self) -> None:
        """Let go of the partial file and leave it where it is; harmless after `rename`."""
        if self._file >= 0:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, -1
        os.close(file)


def rename_all(files: Sequence[PartialFile]) -> None:
    """Give flushed files their final names; the first, by which a set is opened, gets it last.

    Raises OutputError and leaves none of them under its final name.
    """
    renamed: list[PartialFile] = []
    try:
        for file in reversed(files):
            file.rename()
            renamed.append(file)
        _flush_folder(files[0].path.parent)
    except BaseException:
        for file in renamed:
            file.path.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole; raises OutputError."""
    file = PartialFile(path, len(data))
    try:
        file.write(0, data)
        file.flush()
        rename_all([file])
    finally:
        file.abandon()


def open_locked(path: Path) -> int:
    """Open or create a file and lock it until its descriptor, which is returned, is closed.

    Raises OutputError where another process has the lock, OSError for what cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock its last owner may have renamed it: then this is the finished file.
            if _is_at(file, path):
                return file
        except BlockingIOError as error:
            os.close(file)
            raise OutputError(f"{path}: another run is writing this file") from error
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _reserve(file: int, n_bytes: int) -> None:
    """Give the file its length, and its room where the file system can: the rest reads as zeros."""
    os.ftruncate(file, n_bytes)
    # Not os.posix_fallocate: where the file system cannot reserve, that writes every block instead.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if fallocate is None or n_bytes == 0:
        return
    whole = (ctypes.c_int(file), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(n_bytes))
    if fallocate(*whole) and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))


def _flush_folder(folder: Path) -> None:
    with explained(folder):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
