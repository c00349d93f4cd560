"""Slices that lie somewhere in the folder of exports already, found by what they were made of.

A *key* is the digest of all that decides a slice's bytes (`slice_key`). Two kinds of text files say where the
bytes of a key lie, a line each, as `key  sha256 of the bytes  places` (`converters.places`):

    NAME.partial.journal   of a file that is being written, or was when its run was cut off
    .NAME.keys             of a finished file: hidden, for it is of no use to anyone but the next conversion

It does not matter which export a slice was made for: Q4_K_S finds the matrices that Q4_K_M has of the same
type. It does not matter either whether the lines are true: bytes that do not have the sha256 of their line
(torn when the power went, changed since, gone) are not handed out; a line that makes no sense is passed over.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.places import Piece, parse_place, read_places
from quantize.codecs import ENCODING, Codec

JOURNAL, KEYS = ".journal", ".keys"
# Plain, these only round: a slice takes 1 to 3 ms, and 1.4 ms of hashing to be noted or found. All others
# take 5 to 560 ms, these too where there are importances to search with (2^20 weights on one core).
_ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9:]+(?: [0-9:]+)*)", re.ASCII)


def is_noted(kind: Codec, importance: torch.Tensor | None) -> bool:
    """Return whether a slice of this type takes much longer to make than to find again."""
    return kind.uses_importance and not (importance is None and kind.name in _ROUNDED)


def slice_key(
    rows: torch.Tensor, quant: str, order: int, importance: torch.Tensor | None, rounding: str = ""
) -> str:
    """Return the digest of all that decides a slice's bytes.

    `order` says how its rows change places, `rounding` names the Hessian that their errors are compensated
    with and the settings of the solver.
    """
    decided = f"{ENCODING} {quant} {order} {tuple(rows.shape)} {rows.dtype} {rounding}"
    digest = hashlib.sha256(decided.encode())
    for tensor in (rows, importance):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """Where the bytes of a key lie, and their sha256."""

    key: str
    path: Path
    piece: Piece

    @property
    def line(self) -> str:
        """The entry as a line of a journal or of a file of keys."""
        return " ".join([self.key, self.piece.sha256, *map(str, self.piece.places)]) + "\n"

    def read(self) -> bytearray | None:
        """Return the bytes, if they are there and what the entry says."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = read_places(file.fileno(), self.piece.places, size)
        except OSError:
            return None
        whole = data is not None and hashlib.sha256(data).hexdigest() == self.piece.sha256
        return data if whole else None


def read_entries(listing: Path, path: Path) -> list[Entry]:
    """Return what a journal or a file of keys says about the file at `path`; nothing if it is not there."""
    try:
        lines = listing.read_text("ascii", errors="replace").split("\n")
    except OSError:
        return []
    entries = []
    for found in filter(None, map(_LINE.fullmatch, lines)):
        places = [place for text in found[3].split(" ") if (place := parse_place(text)) is not None]
        if len(places) == found[3].count(" ") + 1:
            entries.append(Entry(found[1], path, Piece(tuple(places), found[2])))
    return entries


def journal_path(partial: Path) -> Path:
    """Return where the journal of a partial file lies."""
    return partial.with_name(partial.name + JOURNAL)


def keys_path(path: Path) -> Path:
    """Return where the keys of a finished file lie."""
    return path.with_name(f".{path.name}{KEYS}")


def keys_text(entries: Iterable[Entry]) -> bytes:
    """Return the content of a file of keys: in the order of the offsets, whatever the order of the work."""
    ordered = sorted(entries, key=lambda entry: entry.piece.places[0].offset)
    return "".join(entry.line for entry in ordered).encode("ascii")


class Donors:
    """All slices that a folder's exports have, finished and unfinished, when it is looked into."""

    def __init__(self, folder: Path) -> None:
        """Read what is noted in `folder` now: what this run will write is not from an earlier one.

        An export may be a folder within it.
        """
        journals = sorted([*folder.glob(f"*{JOURNAL}"), *folder.glob(f"*/*{JOURNAL}")])
        listings = [(path, path.with_name(path.name.removesuffix(JOURNAL))) for path in journals]
        keys = sorted([*folder.glob(f".*{KEYS}"), *folder.glob(f"*/.*{KEYS}")])
        listings += [(path, path.with_name(path.name[1:].removesuffix(KEYS))) for path in keys]
        found = (entry for listing, path in listings for entry in read_entries(listing, path))
        self._entries = {entry.key: entry for entry in found}

    def find(self, key: str) -> bytearray | None:
        """Return the bytes of a key, or None; from any thread."""
        entry = self._entries.get(key)
        return None if entry is None else entry.read()
