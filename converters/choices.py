"""What a user chooses about the checkpoint that a command opens, and the opening itself.

The choices are the options of `converters.cli` word for word. Everything heavy is imported inside, so that
`--help` stays quick.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converters.terminal import Terminal

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class OpenChoices:
    """How a checkpoint is opened, and where the work is done: what all commands share that read one."""

    revision: str | None
    lora: Path | None
    low_disk: bool
    eos: Literal["model", "completion"]
    device: str | None
    threads: int | None

    @property
    def n_threads(self) -> int:
        """Worker threads: as asked, or the cores at hand."""
        return self.threads or available_cores()


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def opened(
    terminal: Terminal,
    choices: OpenChoices,
    source: str,
    name: str | None = None,
    *,
    headers_only: bool = False,
) -> "Checkpoint":
    """Return the checkpoint, opened as chosen, and say what its opening noted."""
    from converters.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(
        source,
        revision=choices.revision,
        lora=choices.lora,
        low_disk=choices.low_disk,
        eos=choices.eos,
        name=name,
        headers_only=headers_only,
        quiet=terminal.quiet,
    )
    for note in checkpoint.notes:
        terminal.say(f"note: {note}")
    return checkpoint
