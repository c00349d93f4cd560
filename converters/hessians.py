"""The Hessians that are in use: unpacked and factored once, for all linears and threads that share an input.

A conversion goes through the matrices in the order of the model, and those of one input follow each other. So
the last two inputs are enough to keep: that of the matrix that the slowest thread is still at, and the next.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

import torch

from converters.stats.archive import Archive
from quantize.errors import ArchiveError

Settings = TypeVar("Settings", bound=Hashable)
Prepared = TypeVar("Prepared")
Prepare = Callable[[torch.Tensor, Settings, str], tuple[Prepared, tuple[str, ...]]]
"""From H, settings and a name for messages to what a solver shares, and what went otherwise than planned."""

_KEPT = 2


class Hessians(Generic[Settings, Prepared]):
    """The Hessians of an archive, prepared for a solver on a device when they are asked for."""

    def __init__(self, archive: Archive, prepare: Prepare[Settings, Prepared], device: str = "cpu") -> None:
        """Raises ArchiveError for an archive that has diagonals alone."""
        check_hessians(archive)
        self.archive, self.device, self._prepare = archive, device, prepare
        self._made: OrderedDict[tuple[str, Settings], Future[Prepared]] = OrderedDict()
        self._lock, self._log = Lock(), list[str]()

    @property
    def log(self) -> tuple[str, ...]:
        """What went otherwise than planned: a damping that had to be raised."""
        return tuple(self._log)

    def prepared(self, name: str, settings: Settings) -> Prepared:
        """Return what is shared by the matrices of an input, by the checkpoint's name of one of them.

        Raises HessianError where H cannot be factored, ArchiveError.

        Whoever asks first makes it, and the others wait.
        """
        key = (self.archive.identity(name), settings)
        with self._lock:
            found = self._made.get(key)
            made = self._made.setdefault(key, Future())
            while len({identity for identity, _ in self._made}) > _KEPT:
                self._made.popitem(last=False)
        if found is None:
            try:
                made.set_result(self._make(name, settings))
            except BaseException as error:
                made.set_exception(error)
        return made.result()

    def _make(self, name: str, settings: Settings) -> Prepared:
        H = self.archive.statistics(name).hessian
        if H is None:
            raise ArchiveError(f"{self.archive.folder}: no Hessian for {name}")
        made, log = self._prepare(H.to(self.device), settings, name)
        self._log += log
        return made


def check_hessians(archive: Archive) -> None:
    """Raise ArchiveError for an archive that has diagonals alone."""
    if archive.diagonal_only:
        raise ArchiveError(
            f"{archive.folder}: holds diagonals alone; compensated rounding needs whole Hessians",
            hint="calibrate again without --diagonal-only",
        )
