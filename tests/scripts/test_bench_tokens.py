"""The parity benchmark runs, and finds nothing on the demo model that it cannot explain."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.runtime
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the `llama` extra")
def test_a_short_run_leaves_nothing_unexplained(demo_folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "tokens.json"
    command = [
        sys.executable,
        "scripts/bench/tokens",
        str(demo_folder),
        "--strings",
        "570",
        "--json",
        str(result),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text("utf-8"))
    assert figures["strings"] > 900
    assert set(figures["differences"]) <= {"unicode 16", "wide spaces"}
