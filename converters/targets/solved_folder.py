"""What the writers of GPTQ's and EXL2's folders share: all but how a linear is rounded and packed.

Linears are rounded under their inputs' Hessians, every other tensor is put into half precision where the plan
has it. What an earlier run made of the same rows, under the same key, is taken over.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock
from typing import Generic, TypeVar

import torch

from converters.donors import Donors
from converters.export_folder import ExportFolder
from converters.hessians import Hessians
from converters.journal import JournaledFile
from converters.places import Piece, Place
from converters.plan import ConvertOptions, Plan, TensorPlan
from quantize.codecs.encoder import SLICES_PER_DEVICE, failures_explained

Settings = TypeVar("Settings", bound=Hashable)
Prepared = TypeVar("Prepared")


class SolvedFolder(Generic[Settings, Prepared]):
    """The folder of one plan, being written; a subclass rounds its linears."""

    def __init__(self, plan: Plan, options: ConvertOptions, hessians: Hessians[Settings, Prepared]) -> None:
        """Create every file, or go on with an interrupted run's; raises OutputError."""
        self._plan, self._hashed, self._effort = plan, options.hash_tensors, options.effort
        self._hessians, self._lock = hessians, Lock()
        self._reused = Counter[str]()
        self._room = BoundedSemaphore(SLICES_PER_DEVICE if options.on_gpu else options.n_threads)
        self._donors = None if options.fresh else Donors(options.folder)
        self._folder = ExportFolder(plan, options)

    @property
    def reused(self) -> Mapping[str, int]:
        """Bytes that earlier runs had made, by the checkpoint's names of tensors."""
        return self._reused

    @property
    def notes(self) -> tuple[str, ...]:
        """Dampings that had to be raised, and the errors of the linears that this run rounded."""
        shares = self._shares()
        if not shares:
            return self._hessians.log
        worst = max(shares, key=lambda name: shares[name])
        mean = sum(shares.values()) / len(shares)
        summary = f"share of the outputs' energy lost: {mean:.3g} on average over {len(shares)} linears, "
        return (*self._hessians.log, f"{summary}{shares[worst]:.3g} at most ({worst})")

    def _shares(self) -> Mapping[str, float]:
        """Return the share of its output's energy that each linear lost that this run rounded."""
        raise NotImplementedError

    @contextmanager
    def _solving(self, name: str) -> Iterator[None]:
        """Keep room where a linear is solved; raises DscqError where a GPU has too little, or fails."""
        with self._room, failures_explained(self._hessians.device, f"round {name}"):
            yield

    def _put_float(self, tensor: TensorPlan, first_row: int, rows: torch.Tensor) -> Piece:
        """Write rows (n, K) in half precision."""
        place = Place(tensor.offset + 2 * first_row * rows.shape[1], 2 * rows.numel())
        data = rows.to(torch.float16).contiguous().view(torch.uint8).numpy()
        file = self._folder.files[tensor.file]
        return file.put((place,), data.data.cast("B"), hashed=self._hashed)

    def _reuse(self, name: str, file: JournaledFile, key: str, places: tuple[Place, ...]) -> Piece | None:
        """Return what an earlier run made of a linear's rows, None where there is nothing."""
        found = file.reuse(key, places, self._donors)
        if found is not None:
            with self._lock:
                self._reused[name] += found.n_bytes
        return found

    def flush(self) -> None:
        """Wait until the disk has everything."""
        self._folder.flush()

    def commit(self) -> None:
        """Give the folder its name."""
        self._folder.commit()

    def abort(self) -> None:
        """Leave what was written for the next run."""
        self._folder.abort()

    def discard(self) -> None:
        """Remove what was written."""
        self._folder.discard()
