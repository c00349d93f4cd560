"""What a calibration leaves in the archive's folder while it runs: `progress.json` and the states.

    request   what is calibrated and how: model, corpus, rows, options; the same words as in the manifest
    threads   of the run that began it: a run that goes on uses as many, and so rounds alike
    done      number of blocks whose member is written
    side      which file of states is the input of block number `done`
    dropped   rows that are left out so far
    members   the members that are written

It is replaced after each block, when the block's member and the states behind it are on the disk. So a kill
at any moment costs one block, and what was half done is done again from the same input, to the same bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from converters.disk import explained, open_locked, write_whole
from converters.stats.manifest import PROGRESS, Member, Request, parse_request
from quantize.calibrate import Dropped
from quantize.errors import ArchiveError

NAME, LOCK = PROGRESS, "calibrate.lock"


@dataclass(frozen=True)
class Progress:
    """How far a run has come; see the table above."""

    request: Request
    threads: int
    done: int = 0
    side: int = 0
    dropped: tuple[Dropped, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)

    def after_block(self, side: int, dropped: tuple[Dropped, ...], name: str, member: Member) -> "Progress":
        """Return the progress when one more block is done."""
        members = {**self.members, name: member}
        return replace(self, done=self.done + 1, side=side, dropped=dropped, members=members)


def write_progress(folder: Path, progress: Progress) -> None:
    """Replace `progress.json`; raises OutputError."""
    write_whole(folder / NAME, json.dumps(asdict(progress), ensure_ascii=False).encode())


def read_progress(folder: Path) -> Progress | None:
    """Return what a run has left, None where there is nothing; raises ArchiveError for a damaged file."""
    path = folder / NAME
    try:
        document = json.loads(path.read_text("utf-8"))
        members = {name: Member(**fields) for name, fields in document.pop("members").items()}
        dropped = tuple(Dropped(**fields) for fields in document.pop("dropped"))
        request = parse_request(document.pop("request"))
        return Progress(request, **document, dropped=dropped, members=members)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "start over with --fresh"
        raise ArchiveError(f"{path}: damaged: {type(error).__name__}: {error}", hint=hint) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder for the body; raises OutputError if one is in it.

    The lock dies with its process; its file is removed.
    """
    path = folder / LOCK
    with explained(path):
        file = open_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
