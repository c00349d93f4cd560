"""The interface of a target: one format that a checkpoint can be written in.

A target answers three questions in turn: what stands against it (`check`), what exactly would be written
(`plan`), and then it writes (`open_writer`). It is handed rows, never a whole model, and it may be
handed the same rows together with other targets: one read of the checkpoint serves all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from converters.checkpoint import Checkpoint
from converters.places import Piece
from converters.plan import ConvertOptions, Plan, Request


class Writer(Protocol):
    """Files being written under temporary names: after the last row `flush`, then `commit`; or `abort`."""

    @property
    def reused(self) -> Mapping[str, int]:
        """Bytes that earlier runs had made already, by the checkpoint's names of tensors."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What went otherwise than planned, for the log and the report."""
        ...

    def put(self, name: str, first_row: int, rows: torch.Tensor) -> Piece:
        """Encode rows (n, K) of a tensor and write them; return what was written, and where.

        Rows come in the plan's `row_step`, in any order, from several threads at once; they are finite
        and below the plan's `overflow`. Raises OutputError when the disk refuses.
        """
        ...

    def flush(self) -> None:
        """Wait until the disk has everything; raises OutputError."""
        ...

    def commit(self) -> None:
        """Give the flushed files their final names, all or none; raises OutputError."""
        ...

    def abort(self) -> None:
        """Leave what was written for a later run, where that can use it; harmless after `commit`."""
        ...

    def discard(self) -> None:
        """Remove what was written: no run can go on from there."""
        ...


class Target(Protocol):
    """One format."""

    @property
    def format(self) -> str:
        """The name in `--to NAME:QUANT`."""
        ...

    @property
    def quants(self) -> Sequence[str]:
        """The quant types or recipes of the format, in the spelling of their world."""
        ...

    def parse(self, text: str) -> str:
        """Return the quant that is meant, in its own spelling; raises UsageError, listing what is known."""
        ...

    def needs_hessians(self, request: Request) -> bool:
        """Return whether it cannot be written without a statistics archive that has Hessians."""
        ...

    def check(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> list[str]:
        """Return every reason why this checkpoint cannot be written so; it must not read weights."""
        ...

    def plan(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> Plan:
        """Return what would be written; raises PlanError with all reasons where options forbid it."""
        ...

    def open_writer(self, plan: Plan, options: ConvertOptions) -> Writer:
        """Create the plan's files under temporary names; raises OutputError."""
        ...
