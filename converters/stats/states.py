"""The hidden states between two blocks, exact (f32), in two files: one is read while the other is written.

So a run that is killed in the middle of a block finds that block's whole input when it is started again.
The files are read and written through the kernel's page cache: while memory is free they stay there, and a
block reads what the one before has written from memory; where it is not, they are on the disk. Neither is
the process's own memory, and nobody has to decide.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from converters.disk import explained
from quantize.errors import ArchiveError


class FileStates:
    """`States` in `<stem>.0` and `<stem>.1`; `side` is the one that is read."""

    def __init__(
        self, stem: Path, n_tokens: int, hidden_size: int, side: int = 0, *, begun: bool = False
    ) -> None:
        """Open both files, or create them; raises OutputError.

        With `begun` the side that is read is an earlier run's: raises ArchiveError where it is not whole.
        """
        self.side, self.hidden_size = side, hidden_size
        self.paths = state_paths(stem)
        n_bytes = n_tokens * hidden_size * 4
        if begun:
            _check_whole(self.paths[side], n_bytes)
        self._files = [self._open(path, n_bytes) for path in self.paths]

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy of the tokens start..end, f32 (n, hidden_size); raises OutputError."""
        states = torch.empty(end - start, self.hidden_size)
        self._each(self.side, start, states, lambda file, part, at: os.preadv(file, [part], at))
        return states

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put f32 (n, hidden_size) at the tokens from `start` of the other side; raises OutputError."""
        self._each(1 - self.side, start, states.cpu().contiguous(), os.pwrite)

    def turn(self) -> None:
        """Wait until the disk has the other side, and read that one from now on; raises OutputError."""
        with explained(self.paths[1 - self.side]):
            os.fsync(self._files[1 - self.side])
        self.side = 1 - self.side

    def __enter__(self) -> Self:
        """Return the states, whose files the end of the context closes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _each(
        self, side: int, start: int, states: torch.Tensor, move: Callable[[int, memoryview, int], int]
    ) -> None:
        """Move all bytes of `states`, however few a call takes."""
        view = states.view(torch.uint8).reshape(-1).numpy().data
        at = start * self.hidden_size * 4
        with explained(self.paths[side]):
            while view:
                n_bytes = move(self._files[side], view, at)
                if not n_bytes:
                    raise OSError(None, "the file is shorter than its states")
                view, at = view[n_bytes:], at + n_bytes

    @staticmethod
    def _open(path: Path, n_bytes: int) -> int:
        with explained(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(file, n_bytes)
        return file


def _check_whole(path: Path, n_bytes: int) -> None:
    """Raise ArchiveError for missing or short states: they would be read as zeros."""
    found = path.stat().st_size if path.is_file() else 0
    if found != n_bytes:
        raise ArchiveError(
            f"{path}: the hidden states of an interrupted run: {found} bytes, expected {n_bytes}",
            hint="put the file back, or start over with --fresh",
        )


def state_paths(stem: Path) -> list[Path]:
    """Return the paths of both files."""
    return [stem.with_name(f"{stem.name}.{side}") for side in (0, 1)]
