"""The command line as a user meets it: exit codes, streams, messages."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from converters.cli import dscq, known_targets

ROOT = Path(__file__).parents[2]

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
    assert done.out.splitlines()[-1] == "nothing was written"


def test_dry_run_shows_types_reasons_sizes_and_needs(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(hidden_size=256, intermediate_size=352)
    options = ("--tensor-type", "attn_output=Q6_K", "--output-tensor-type", "q8_0", "-o", tmp_path / "o")
    done = run("convert", source, "--to", "gguf:Q4_K_M", "--dry-run", "--threads", 2, *options)
    assert done.code == 0, done.err
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    for name, words in {
        "blk.1.attn_v.weight": ("[128, 256]", "Q6_K", "6.562", "as recipe Q4_K_M: attn_v of the layers that"),
        "blk.0.attn_q.weight": ("[256, 256]", "Q4_K", "4.5", "36,864", "as recipe Q4_K_M"),
        "blk.0.attn_output.weight": ("Q6_K", "override attn_output=Q6_K"),
        "blk.0.attn_norm.weight": ("F32", "32", "vectors are always F32"),
        "output.weight": ("Q8_0", "8.5", "--output-tensor-type"),
    }.items():
        assert all(word in rows[name] for word in words), rows[name]
    assert "falls back to Q5_0" in done.out
    assert "bits per weight" in done.out.splitlines()[0]
    assert "gguf:Q4_K_M: override attn_output=Q6_K: 2 tensors" in done.out
    assert "tiny-Q4_K_M.gguf" in done.out
    assert rows["disk:"].endswith("are free")
    assert rows["memory:"].startswith("memory: about 390 MB to write, ")


def test_dry_run_of_a_recipe_as_json(run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(hidden_size=256, intermediate_size=352)
    done = run("convert", source, "--to", "gguf:q4_k", "-o", tmp_path / "o", "--dry-run", "--json")
    found = json.loads(done.out)
    (plan,) = found["plans"]
    assert plan["request"] == "gguf:Q4_K_M"
    n_bytes = sum(tensor["bytes"] for tensor in plan["tensors"])
    n_weights = sum(8 * tensor["bytes"] / tensor["bits_per_weight"] for tensor in plan["tensors"])
    assert plan["bits_per_weight"] == pytest.approx(8 * n_bytes / n_weights)
    fallen = [tensor["name"] for tensor in plan["tensors"] if tensor["falls_back"]]
    assert fallen == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert found["needed"] == plan["bytes"]
    assert min(found["memory"].values()) > 300_000_000


def _imatrix(path: Path, n_columns: int = 256) -> Path:
    """Write an imatrix in the older format, for two layers with matrices of 256 and 512 columns."""
    widths = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), n_columns)
    widths["ffn_down"] = 512
    names = [(f"blk.{i}.{role}.weight", width) for i in range(2) for role, width in widths.items()]
    data = struct.pack("<i", len(names))
    for name, width in names:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, width)
        data += torch.linspace(0.1, 3, width).numpy().tobytes()
    path.write_bytes(data)
    return path


def test_a_recipe_of_two_bits_needs_its_imatrix(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out = make_checkpoint(hidden_size=256, intermediate_size=512), tmp_path / "o"
    command = ("convert", source, "--to", "gguf:IQ2_S", "-o", out, "--no-proof")
    refused = run(*command)
    assert refused.code == 1
    assert refused.err.count("needs an imatrix") == 5
    assert "give one with --imatrix" in refused.err
    assert not out.exists()
    done = run(*command, "--imatrix", _imatrix(tmp_path / "imatrix.dat"))
    assert done.code == 0, done.err
    assert "gguf:IQ2_S: importances of 14 tensors from imatrix.dat (14 entries)" in done.err
    described = json.loads(run("inspect", out / "tiny-IQ2_S.gguf", "--json").out)
    assert described["findings"] == []
    assert {tensor["quant"] for tensor in described["tensors"]} == {"F32", "IQ2_XS", "IQ3_S", "Q5_K"}


def test_another_models_imatrix_is_refused(run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(hidden_size=256, intermediate_size=512)
    imatrix = _imatrix(tmp_path / "imatrix.dat", 128)
    done = run("convert", source, "--to", "gguf:Q4_K_M", "-o", tmp_path / "o", "--imatrix", imatrix)
    assert done.code == 1
    assert "blk.0.attn_q.weight: 128 columns, the model's has 256" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-type", "ffn"), "--tensor-type ffn: expected PATTERN=TYPE"),
        (("--output-tensor-type", "Q4_K_M"), "--output-tensor-type: 'Q4_K_M' is no quant type"),
        (("--token-embedding-type", "NVFP4"), "--token-embedding-type: 'NVFP4' is read but not written"),
        (("--imatrix", "absent.dat"), "absent.dat"),
    ],
)
def test_options_that_name_no_type_are_usage_errors(
    run: Run, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = run("convert", tmp_path, "--to", "gguf:Q4_K_M", *options)
    assert done.code == 2
    assert message in done.err


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


def test_completion_knows_the_targets(make_checkpoint: MakeCheckpoint) -> None:
    names = known_targets(click.Context(dscq), click.Option(["--to"]), "GGUF:f")
    assert names == ["gguf:F32", "gguf:F16"]


@pytest.mark.parametrize(
    "option",
    [
        ("--require-proof",),
        ("--probe-tokens", 500),
        ("--llama-lib", __file__),
    ],
)
def test_what_needs_a_proof_contradicts_no_proof(
    run: Run, make_checkpoint: MakeCheckpoint, option: Any
) -> None:
    done = run("convert", make_checkpoint(), "--to", "gguf:F16", "--no-proof", *option)
    assert done.code == 2
    assert f"--no-proof leaves nothing to do for {option[0]}" in done.err


@pytest.mark.parametrize("option", [("--device", "cuda:99"), ("--llama-lib", __file__)])
def test_what_the_proof_lacks_shows_before_anything_is_written(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path, option: Any
) -> None:
    done = run("convert", make_checkpoint(), "--to", "gguf:F16", "-o", tmp_path / "o", *option)
    assert done.code == 2, done.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
@pytest.mark.parametrize("option", ["--no-proof", "--dry-run"])
def test_a_device_that_cannot_encode_shows_without_a_proof_too(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path, device: str, option: str
) -> None:
    to = ("--to", "gguf:F16", "-o", tmp_path / "o", option)
    done = run("convert", make_checkpoint(), *to, "--device", device)
    assert done.code == 2, done.err
    assert f"device {device!r}" in done.err
    assert not (tmp_path / "o").exists()
    assert run("convert", tmp_path / "tiny", *to, "--device", "cpu", "--quiet").code == 0


def test_a_log_in_ascii_is_no_obstacle(make_checkpoint: MakeCheckpoint) -> None:
    command = [sys.executable, "-m", "converters.cli", "inspect", str(make_checkpoint())]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "begin\\u2581of" in done.stdout


# Tests that a shell runs in the background ignore SIGINT, and what they start inherits that.
_HEEDING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from converters.cli import main
main()
"""


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
        "-c",
        _HEEDING,
        "convert",
        str(source),
        "--to",
        "gguf:F32",
        "-o",
        str(out),
    ]
    with subprocess.Popen([*command, "--no-proof"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
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
