"""The Hessians that are in use: unpacked and factored once, for all linears and threads that share an input.

A conversion goes through the matrices in the order of the model, and those of one input follow each other. So
the last two inputs are enough to keep: that of the matrix that the slowest thread is still at, and the next.
"""

from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock

from converters.stats.archive import Archive
from quantize.errors import ArchiveError
from quantize.solver.linears import Input, Settings, prepare_input

_KEPT = 2


class Hessians:
    """The Hessians of an archive, factored for the solver on a device when they are asked for."""

    def __init__(self, archive: Archive, device: str = "cpu") -> None:
        """Raises ArchiveError for an archive that has diagonals alone."""
        check_hessians(archive)
        self.archive, self.device = archive, device
        self._made: OrderedDict[tuple[str, Settings], Future[Input]] = OrderedDict()
        self._lock, self._log = Lock(), list[str]()

    @property
    def log(self) -> tuple[str, ...]:
        """What went otherwise than planned: a damping that had to be raised."""
        return tuple(self._log)

    def input_of(self, name: str, settings: Settings) -> Input:
        """Return the input of a matrix, by its name in the checkpoint; raises HessianError, ArchiveError.

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

    def _make(self, name: str, settings: Settings) -> Input:
        H = self.archive.statistics(name).hessian
        if H is None:
            raise ArchiveError(f"{self.archive.folder}: no Hessian for {name}")
        shared = prepare_input(H.to(self.device), settings, name)
        self._log += shared.factor.log
        return shared


def check_hessians(archive: Archive) -> None:
    """Raise ArchiveError for an archive that has diagonals alone."""
    if archive.diagonal_only:
        raise ArchiveError(
            f"{archive.folder}: holds diagonals alone; compensated rounding needs whole Hessians",
            hint="calibrate again without --diagonal-only",
        )
