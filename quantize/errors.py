"""The errors that a user of dscq can meet.

    DscqError                    exit 1
    ├── UsageError               exit 2   a wrong or contradictory option, an unknown name
    ├── CheckpointError                   the source: missing, broken or of an unsupported kind
    ├── TokenizerError                    the tokenizer: missing, or not recognised
    ├── ImatrixError                      the imatrix: unreadable, or made from another model
    ├── CalibrationError                  the calibration met activations that are not finite
    ├── HessianError                      a Hessian that cannot be factored, even damped
    ├── ArchiveError                      the statistics archive: damaged, of another model or another run
    ├── CorpusError                       the calibration text: unreadable, or too little of it
    ├── PlanError                         what was asked cannot be made from this checkpoint
    ├── OutputError                       the destination: exists, full, read-only
    ├── RuntimeMissingError               an optional runtime is not installed; names the install line
    ├── RuntimeFailedError                a runtime refused the file or died
    └── VerificationError        exit 3   the written file is not what it should be

Every message says what was found, what was expected and which file or tensor; `reasons` holds all of
them at once, so that a user mends a checkpoint in one go; `hint` is the next step, as a command where
there is one.
"""

from collections.abc import Sequence
from typing import ClassVar


class DscqError(Exception):
    """A failure with a message for the user: one line, then all `reasons`, then a `hint`."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, reasons: Sequence[str] = (), hint: str = "") -> None:
        self.message = message
        self.reasons = tuple(reasons)
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.message, *(f"  - {reason}" for reason in self.reasons)]
        return "\n".join([*lines, self.hint] if self.hint else lines)


class UsageError(DscqError):
    """A wrong option, an unknown name (the message lists the known ones), or options that contradict."""

    exit_code = 2


class CheckpointError(DscqError):
    """The source checkpoint is missing, broken, truncated or of a kind that is not supported."""


class TokenizerError(DscqError):
    """The checkpoint's tokenizer is missing or is none of those that are recognised."""


class ImatrixError(DscqError):
    """The imatrix file cannot be read, holds what no imatrix can, or is that of another model."""


class CalibrationError(DscqError):
    """The calibration met activations that are not finite numbers; names layer, input and row."""


class HessianError(DscqError):
    """A Hessian is not finite, or cannot be factored whatever the damping; `reasons` holds every attempt."""


class ArchiveError(DscqError):
    """A statistics archive is damaged, of another version, model or run; `reasons` holds every one."""


class CorpusError(DscqError):
    """The calibration text cannot be read, or there is too little of it; `reasons` holds every fault."""


class PlanError(DscqError):
    """What was asked for cannot be made from this checkpoint; `reasons` holds every one."""


class OutputError(DscqError):
    """The destination exists already, is not writable, or has too little room."""


class RuntimeMissingError(DscqError):
    """An optional runtime is not installed; `hint` is the exact install line."""


class RuntimeFailedError(DscqError):
    """A runtime refused to load the file or failed while it ran."""


class VerificationError(DscqError):
    """A check of the proof failed; `reasons` names each failed check."""

    exit_code = 3
