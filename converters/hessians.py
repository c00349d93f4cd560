"""The Hessians that are in use: unpacked and factored once, for all linears and threads that share an input.

A conversion goes through the matrices in the order of the model, and those of one input follow each other. So
the last two inputs are enough to keep: that of the matrix that the slowest thread is still at, and the next.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

import torch

from converters.checkpoint import Checkpoint
from converters.stats.archive import Archive
from quantize.errors import ArchiveError
from quantize.first_tokens import FirstTokens, first_tokens
from quantize.reference import INPUTS, OnBlock

Settings = TypeVar("Settings", bound=Hashable)
Prepared = TypeVar("Prepared")
Prepare = Callable[[torch.Tensor, float, Settings, str], tuple[Prepared, tuple[str, ...]]]
"""From H, what its damping is to be multiplied with, settings and a name for messages, to what a solver
shares, and what went otherwise than planned."""

_KEPT = 2
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class Hessians(Generic[Settings, Prepared]):
    """The Hessians of an archive, prepared for a solver on a device when they are asked for."""

    def __init__(
        self,
        archive: Archive,
        prepare: Prepare[Settings, Prepared],
        device: str = "cpu",
        first: FirstTokens | None = None,
    ) -> None:
        """Raises ArchiveError for an archive that has diagonals alone.

        With `first`, the first tokens of rows get their share in the Hessians of the blocks.
        """
        check_hessians(archive)
        self.archive, self.device, self._prepare, self._first = archive, device, prepare, first
        self._made: OrderedDict[tuple[str, str, Settings], Future[Prepared]] = OrderedDict()
        self._lock, self._log = Lock(), list[str]()

    @property
    def log(self) -> tuple[str, ...]:
        """What went otherwise than planned: a damping that had to be raised."""
        return tuple(self._log)

    def prepared(self, name: str, settings: Settings, device: str | None = None) -> Prepared:
        """Return what is shared by the matrices of an input, by the checkpoint's name of one of them.

        On another `device` than that of all others, if one is named. Whoever asks first makes it, and the
        others wait. Raises HessianError where H cannot be factored, ArchiveError.
        """
        device = device or self.device
        key = (self.archive.identity(name), device, settings)
        with self._lock:
            found = self._made.get(key)
            made = self._made.setdefault(key, Future())
            while len({identity for identity, *_ in self._made}) > _KEPT:
                self._made.popitem(last=False)
        if found is None:
            try:
                made.set_result(self._make(name, settings, device))
            except BaseException as error:
                made.set_exception(error)
        return made.result()

    def _make(self, name: str, settings: Settings, device: str) -> Prepared:
        H, damp_scale = hessian(self.archive, name, device, self._first)
        made, log = self._prepare(H, damp_scale, settings, name)
        self._log += log
        return made


def hessian(
    archive: Archive, name: str, device: str = "cpu", first: FirstTokens | None = None
) -> tuple[torch.Tensor, float]:
    """Return the Hessian of a matrix's input, f32 (K, K), by its name, and what to multiply its damping with.

    With `first`, the first tokens of rows have their share in it, if it is a block's. Raises ArchiveError.
    """
    H, block = archive.statistics(name, device).hessian, _BLOCK.fullmatch(name)
    if H is None:
        raise ArchiveError(f"{archive.folder}: no Hessian for {name}")
    if first is None or block is None:
        return H, 1.0
    return first.strengthen(H, int(block[1]), INPUTS[block[2]], archive.manifest.n_tokens)


def first_tokens_of(
    checkpoint: Checkpoint,
    archive: Archive,
    on_block: OnBlock = lambda done, total: None,
    device: str = "cpu",
) -> FirstTokens:
    """Push what the archive's rows begin with through the checkpoint, on a device."""
    ids = [int(row[0]) for row in archive.rows().text()]
    return first_tokens(checkpoint.config, checkpoint.weights, ids, on_block, device)


def check_hessians(archive: Archive) -> None:
    """Raise ArchiveError for an archive that has diagonals alone."""
    if archive.diagonal_only:
        raise ArchiveError(
            f"{archive.folder}: holds diagonals alone; compensated rounding needs whole Hessians",
            hint="calibrate again without --diagonal-only",
        )
