"""The command line as a user meets it: exit codes, streams, messages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Any]


def test_convert_writes_what_was_asked_and_says_so(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    done = run(
        "convert",
        make_checkpoint(),
        "--to",
        "GGUF:f16",
        "--to",
        "gguf:q8_0",
        "-o",
        tmp_path / "o",
        "--no-proof",
    )
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["tiny-F16.gguf", "tiny-Q8_0.gguf"]
    assert [line.split(" (")[0] for line in done.out.splitlines()] == [
        f"wrote {tmp_path}/o/tiny-F16.gguf",
        f"wrote {tmp_path}/o/tiny-Q8_0.gguf",
    ]


def test_dry_run_writes_nothing(run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    done = run("convert", make_checkpoint(), "--to", "gguf:Q8_0", "-o", tmp_path / "o", "--dry-run")
    assert done.code == 0, done.err
    assert not (tmp_path / "o").exists()
    assert "blk.1.ffn_down.weight" in done.out
    assert "nothing was written" in done.out


def test_dry_run_as_json(run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    options = ("--to", "gguf:Q8_0", "-o", tmp_path / "o")
    plan = json.loads(run("convert", source, *options, "--dry-run", "--json").out)["plans"][0]
    assert run("convert", source, *options, "--no-proof").code == 0
    assert (tmp_path / "o" / plan["files"][0]["name"]).stat().st_size == plan["bytes"]


def test_a_fallback_is_named_with_its_reason(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(intermediate_size=80)
    done = run("convert", source, "--to", "gguf:Q8_0", "-o", tmp_path / "o", "--no-proof", "-q")
    assert done.code == 0
    assert done.err == ""
    done = run("convert", source, "--to", "gguf:Q8_0", "-o", tmp_path / "o", "--no-proof", "--force")
    assert "gguf:Q8_0: blk.0.ffn_down.weight becomes F16" in done.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gguf:Q9_9", "--to gguf:Q9_9: unknown type 'Q9_9'"),
        ("onnx:Q8_0", "--to onnx:Q8_0: unknown format 'onnx'"),
        ("Q8_0", "--to Q8_0: unknown format 'Q8_0'"),
    ],
)
def test_unknown_names_list_the_known(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path, target: str, message: str
) -> None:
    done = run("convert", make_checkpoint(), "--to", target, "-o", tmp_path / "o")
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")
    assert "gguf:" in done.err


def test_nothing_is_overwritten_without_force(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "o"
    out.mkdir()
    (out / "tiny-F16.gguf").write_text("mine")
    done = run("convert", source, "--to", "gguf:F16", "-o", out, "--no-proof")
    assert done.code == 1
    assert "tiny-F16.gguf exists" in done.err
    assert "--force" in done.err
    assert (out / "tiny-F16.gguf").read_text() == "mine"


def test_a_missing_source_says_what_was_looked_for(run: Run, tmp_path: Path) -> None:
    done = run("convert", tmp_path / "nothing", "--to", "gguf:F16")
    assert done.code == 1
    assert "no such folder" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments", [("convert",), ("convert", "x"), ("frobnicate",), ("verify", "absent.gguf")]
)
def test_usage_errors_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).code == 2


@pytest.mark.parametrize("size", ["4Q", "0", "-1G", "GiB"])
def test_a_size_that_is_none_is_a_usage_error(run: Run, size: str) -> None:
    done = run("convert", "x", "--to", "gguf:F16", "--split-max-size", size)
    assert done.code == 2
    assert "size" in done.err


def test_split_and_inspect(run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = make_checkpoint(), tmp_path / "o"
    assert (
        run("convert", source, "--to", "gguf:F32", "-o", out, "--split-max-size", "700K", "--no-proof").code
        == 0
    )
    first = min(out.iterdir())
    assert first.name.startswith("tiny-F32-00001-of-")
    described = json.loads(run("inspect", first, "--json").out)
    assert described["facts"]["RoPE"] == "theta 100000, linear scaling factor 4"
    assert described["findings"] == []
    assert len(described["tensors"]) == 21


def test_inspect_a_checkpoint_lists_tensors(run: Run, make_checkpoint: MakeCheckpoint) -> None:
    done = run("inspect", make_checkpoint(dtype=torch.float32), "--tensors")
    assert done.code == 0
    assert "model.layers.1.mlp.down_proj.weight" in done.out
    assert "float32" in done.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.code == 0
    assert "_DSCQ_COMPLETE" in done.out


def test_completion_offers_the_options() -> None:
    asked = {"_DSCQ_COMPLETE": "bash_complete", "COMP_WORDS": "dscq convert --spl", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['dscq']; from converters.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert "--split-max-size" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_130_and_leaves_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, number: signal.Signals
) -> None:
    source, out = (
        make_checkpoint(num_hidden_layers=24, hidden_size=512, intermediate_size=1024),
        tmp_path / "o",
    )
    command = [
        sys.executable,
        "-m",
        "converters.cli",
        "convert",
        str(source),
        "--to",
        "gguf:F32",
        "-o",
        str(out),
    ]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([*command, "--no-proof"], cwd=root, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        for line in process.stderr:
            if line.startswith("convert"):
                break
        process.send_signal(number)
        deadline = time.monotonic() + 60
        rest = process.stderr.read()
        assert process.wait(timeout=max(deadline - time.monotonic(), 1)) == 130, rest
    assert "Traceback" not in rest
    assert not [path for path in out.iterdir() if path.suffix == ".gguf"]
