"""Where the bytes of a slice lie in a file: one run, or many of the same width at equal distances.

GGUF stores a matrix row by row, so that a slice of rows is one run. GPTQ and EXL2 pack words along the other
side: there a slice of the model's rows is a stripe of columns, a run in every row of words.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

_TEXT = re.compile(r"([0-9]{1,15}):([0-9]{1,15})(?::([0-9]{1,15}):([0-9]{1,15}))?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """`count` runs of `width` bytes, the first at `offset`, each `stride` bytes behind the one before."""

    offset: int
    width: int
    count: int = 1
    stride: int = 0

    def __str__(self) -> str:
        run = f"{self.offset}:{self.width}"
        return run if self.count == 1 else f"{run}:{self.count}:{self.stride}"

    @property
    def n_bytes(self) -> int:
        """Bytes in all."""
        return self.width * self.count

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.offset + (self.count - 1) * self.stride + self.width

    def runs(self) -> Iterable[tuple[int, int]]:
        """Yield each run's offset in the file, and in the bytes of the place."""
        return ((self.offset + i * self.stride, i * self.width) for i in range(self.count))


@dataclass(frozen=True)
class Piece:
    """A slice as it was written: its places, whose bytes follow each other, and the sha256 of these."""

    places: tuple[Place, ...]
    sha256: str

    @property
    def n_bytes(self) -> int:
        """Bytes in all."""
        return sum(place.n_bytes for place in self.places)


def parse_place(text: str) -> Place | None:
    """Return the place that `str(place)` was of; None for any other text."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    numbers = [int(number) for number in found.groups() if number is not None]
    return Place(*numbers)


def read_places(file: int, places: Iterable[Place], size: int) -> bytearray | None:
    """Return the bytes of places in a file that is open for reading and `size` bytes long.

    None where the file ends before them, which is seen before room is made: the numbers may be any.
    """
    kept = tuple(places)
    if any(place.end > size or place.n_bytes > size for place in kept):
        return None
    data = bytearray(sum(place.n_bytes for place in kept))
    view, at = memoryview(data), 0
    for place in kept:
        for offset, within in place.runs():
            if os.preadv(file, [view[at + within : at + within + place.width]], offset) != place.width:
                return None
        at += place.n_bytes
    return data
