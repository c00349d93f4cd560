"""Everything that a person sees while dscq works: progress, notes, tables, errors.

Results go to standard output, the rest to standard error, so that `dscq ... --json | jq` works. On a terminal
a long stage is one bar with rate and time left; elsewhere it is one line per step, which is what a log file
and a job scheduler want. `quiet` leaves results and errors only.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantize.errors import DscqError

Advance = Callable[[int, str], None]
"""Called after each step with the amount done (bytes or steps) and what it was."""


class RateColumn(ProgressColumn):
    """Done, total and rate, in bytes or in steps."""

    def render(self, task: Task) -> Text:
        """Return `1.2 GB of 2.7 GB  310 MB/s`, or `12 of 24`."""
        done, total = int(task.completed), int(task.total or 0)
        if task.fields["unit"] != "bytes":
            return Text(f"{done} of {total} {task.fields['unit']}")
        return Text(f"{decimal(done)} of {decimal(total)}  {decimal(int(task.speed or 0))}/s")


@dataclass
class Terminal:
    """The user's two streams. `as_json` keeps tables off standard output."""

    quiet: bool = False
    as_json: bool = False
    out: Console = field(default_factory=Console)
    err: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, text: str) -> None:
        """Print a note on standard error unless quiet."""
        if not self.quiet:
            self.err.print(text, markup=False, highlight=False, soft_wrap=True)

    def error(self, error: DscqError) -> None:
        """Print an error: its line, every reason, the hint."""
        self.err.print("error: ", style="bold red", end="")
        self.err.print(str(error), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
        """Show a stage of `total` bytes or steps; the body calls what it is given after each step."""
        if self.quiet:
            yield lambda amount, note: None
        elif self.err.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, unit=unit, note="")
                yield lambda amount, note: bar.update(
                    task, advance=amount, note="" if unit != "bytes" else note
                )
        else:
            yield _Lines(self, title, total, unit).advance

    @contextmanager
    def stages(self, unit: str = "steps") -> Iterator[Callable[[str, int, int], None]]:
        """Show stages that announce themselves: the body calls (stage, steps done, steps in all)."""
        with ExitStack() as current:
            shown = _Stages(self, unit, current)
            yield shown.report

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), RateColumn(), TimeRemainingColumn())
        return Progress(*columns, TextColumn("{task.fields[note]}"), console=self.err, transient=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a result table on standard output; columns whose name starts with `>` are right-aligned."""
        if self.as_json:
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in columns:
            right = column.startswith(">")
            table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        wide = self.out if self.out.is_terminal else Console(file=self.out.file, width=160)
        wide.print(table)

    def result(self, text: str) -> None:
        """Print one line of result on standard output."""
        if not self.as_json:
            self.out.print(text, markup=False, highlight=False, soft_wrap=True)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the machine-readable result on standard output if `--json` was given."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass
class _Stages:
    """One bar (or run of lines) at a time, replaced when another stage reports."""

    terminal: Terminal
    unit: str
    current: ExitStack
    title: str = ""
    done: int = 0
    advance: Advance | None = None

    def report(self, title: str, done: int, total: int) -> None:
        """Move the stage to `done` of `total`; a new title, or a step back, begins a new stage."""
        if self.advance is None or title != self.title or done < self.done:
            self.current.close()
            self.title, self.done = title, 0
            self.advance = self.current.enter_context(self.terminal.stage(title, total, self.unit))
        self.advance(done - self.done, f"{done} of {total}")
        self.done = done


@dataclass
class _Lines:
    """Progress where there is no terminal: a line a step."""

    terminal: Terminal
    title: str
    total: int
    unit: str
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, amount: int, note: str) -> None:
        """Print share done, the step's name, the rate and the time left."""
        self.done += amount
        seconds = max(time.monotonic() - self.started, 1e-6)
        left = seconds * max(self.total - self.done, 0) / max(self.done, 1)
        share = 100 * self.done / max(self.total, 1)
        rate = f"  {decimal(int(self.done / seconds))}/s" if self.unit == "bytes" else ""
        self.terminal.say(f"{self.title}  {share:5.1f} %  {note}{rate}  {left:.0f} s left")
