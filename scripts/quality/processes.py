"""Work that is measured: a process of its own makes a file or folder, and writes down what it took.

A worker is a command whose last arguments are what it makes, OUT, and its settings. Beside OUT it leaves
`OUT.json` with its seconds and the peak of its memory (scripts/bench/peers/). What has that file is not made
again, so that an interrupted benchmark goes on.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN_WORKER = (sys.executable, "-m", "scripts.bench.peers.dscq_worker")


@dataclass(frozen=True)
class Cost:
    """What a method took: seconds, and the peak of resident memory in bytes."""

    seconds: float
    peak_bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, max(self.peak_bytes, other.peak_bytes))


def run_worker(out: Path, command: Sequence[str], *last: str, threads: int) -> Cost:
    """Have a worker make `out`, unless it is there; its output goes into a log beside it."""
    figures = out.with_name(f"{out.name}.json")
    if not figures.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        number = str(threads)
        environment = {"OMP_NUM_THREADS": number, "GPTQMODEL_CPU_WORKERS": number, "PYTHONPATH": str(ROOT)}
        with out.with_name(f"{out.name}.log").open("wb") as log:
            subprocess.run(
                [*command, str(out.absolute()), *last],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=out.parent,
                env=os.environ | environment,
            )
    measured = json.loads(figures.read_text())
    return Cost(measured["seconds"], measured["peak_bytes"])
