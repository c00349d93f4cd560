"""The hidden states of all rows between two blocks, and the packs in which they pass through a block.

States have two sides: a block reads one and writes the other, and then the sides change places. So whoever
keeps them in files has, at any moment, the complete input of the block that is being worked on.

A pack is rows that follow each other in the states, up to a number of tokens; a row that is longer is a
pack of its own.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class States(Protocol):
    """Hidden states f32 (n_tokens, hidden_size) of all of a rank's tokens, row after row."""

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy, on the CPU, of the tokens start..end of the side that is current."""
        ...

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put f32 (n, hidden_size) at the tokens from `start` of the other side."""
        ...

    def turn(self) -> None:
        """Make the other side current, when it is complete."""
        ...


class MemoryStates:
    """States in memory. Both sides are one tensor: nobody reads a pack again after writing it."""

    def __init__(self, n_tokens: int, hidden_size: int) -> None:
        self._states = torch.zeros(n_tokens, hidden_size)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a copy of the tokens start..end."""
        return self._states[start:end].clone()

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put f32 (n, hidden_size) at the tokens from `start`."""
        self._states[start : start + len(states)] = states.cpu()

    def turn(self) -> None:
        """Do nothing: the sides are one."""


@dataclass(frozen=True)
class Pack:
    """Rows, by number, with their lengths; their first token in the states is `start`."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """The token after the last one."""
        return self.start + sum(self.lengths)

    def row_of(self, token: int) -> int:
        """Return the row to which the pack's token of that number belongs."""
        for row, length in zip(self.rows, self.lengths, strict=True):
            if token < length:
                return row
            token -= length
        raise IndexError("no such token in the pack")


def packs(
    rows: Sequence[int], lengths: Sequence[int], most_tokens: int, without: Collection[int] = ()
) -> Iterator[Pack]:
    """Yield the packs of `rows`, whose lengths are those of `lengths` at the same place.

    A row `without` is passed over, and the pack before it ends there.
    """
    current: list[tuple[int, int]] = []
    start = at = 0
    for row, length in zip(rows, lengths, strict=True):
        dropped = row in without
        if current and (dropped or at + length - start > most_tokens):
            yield _pack(current, start)
            current = []
        if not dropped:
            start = at if not current else start
            current.append((row, length))
        at += length
    if current:
        yield _pack(current, start)


def _pack(members: Sequence[tuple[int, int]], start: int) -> Pack:
    rows, lengths = zip(*members, strict=True)
    return Pack(rows, lengths, start)
