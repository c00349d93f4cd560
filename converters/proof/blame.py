"""Whose fault an error is: only what goes wrong with the written file may fail a check.

A proof reads two models, and the other one may fail too: the network drops while a shard of the checkpoint is
fetched, its disk goes away, a runtime cannot be started. The file is not worse for it, and must keep its
name. Work on anything but the file is therefore done inside `not_the_file`, whose errors pass by the layers
and reach the user as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantize.errors import CheckpointError, DscqError
from quantize.weights import TensorSpec, Weights


class NotTheFileError(Exception):
    """Carries an error that says nothing about the written file past those who judge it."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


@contextmanager
def not_the_file() -> Iterator[None]:
    """Mark errors as being about something else than the written file."""
    try:
        yield
    except NotTheFileError:
        raise
    except Exception as error:
        raise NotTheFileError(error) from error


@dataclass(frozen=True)
class BlamelessWeights:
    """The checkpoint's weights, whose errors are not the file's. `source` names them to the user."""

    weights: Weights
    source: str

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec by name."""
        with not_the_file():
            return self.weights.specs()

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor; raises NotTheFileError, with a CheckpointError for the disk's errors."""
        with not_the_file():
            try:
                return self.weights.load(name)
            except OSError as error:
                raise CheckpointError(f"{self.source}: {name} cannot be read: {error}") from error


def one_line(error: Exception) -> str:
    """Return what happened and all reasons in one line, without the hint."""
    if isinstance(error, DscqError):
        return ": ".join(part for part in (_first_line(error.message), "; ".join(error.reasons)) if part)
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
