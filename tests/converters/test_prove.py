"""The proof as a user of the command line meets it: tables, reports, exit codes, `*.failed`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from converters import pipeline
from converters.checkpoint import Checkpoint
from converters.plan import ConvertOptions, Written
from converters.runtimes import llama_cpp
from converters.verify import Verifier
from quantize.errors import RuntimeMissingError

Run = Callable[..., Any]
SMALL = ("--probe-tokens", 300, "--quiet")


def flip_a_scale(path: Path, written: Written) -> None:
    """Flip the sign of the first `d` of a Q8_0 tensor."""
    tensor = written.plan.by_name["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 1] ^= 0x80
    path.write_bytes(data)


@pytest.fixture
def damaging_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every conversion damage one scale of what it wrote, hashes included."""
    convert = pipeline.convert

    def damaging(
        checkpoint: Checkpoint, requests: Sequence[Any], options: ConvertOptions, on_event: Any
    ) -> Any:
        exports = convert(checkpoint, requests, options, on_event)
        for written in exports:
            flip_a_scale(written.paths[0], written)
        return exports

    monkeypatch.setattr(pipeline, "convert", damaging)


@pytest.fixture
def without_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the llama.cpp wheel be absent."""

    def missing() -> Path:
        raise RuntimeMissingError("llama.cpp is not installed", hint=llama_cpp.INSTALL)

    monkeypatch.setattr(llama_cpp, "_wheel_library", missing)


def test_convert_proves_every_file(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    done = run("convert", demo_folder, "--to", "gguf:F16", "--to", "gguf:Q8_0", "-o", tmp_path, *SMALL)
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out.count("proven, in xllamacpp") == 2
    report = json.loads((tmp_path / "demo-coder-Q8_0.report.json").read_text("utf-8"))
    assert report["proof"]["passed"]
    assert list(report["files"]) == ["demo-coder-Q8_0.gguf"]
    assert {check["layer"] for check in report["proof"]["checks"]} == {
        "file",
        "metadata",
        "tensors",
        "forward",
        "runtime",
    }


def test_json_is_the_reports_and_nothing_else(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    done = run("convert", demo_folder, "--to", "gguf:F16", "-o", tmp_path, "--json", *SMALL)
    assert done.code == 0, done.err
    (report,) = json.loads(done.out)["reports"]
    assert report == json.loads((tmp_path / "demo-coder-F16.report.json").read_text("utf-8"))


@pytest.mark.usefixtures("damaging_convert")
def test_a_failed_check_exits_3_names_itself_and_takes_the_name_away(
    run: Run, demo_folder: Path, tmp_path: Path
) -> None:
    done = run("convert", demo_folder, "--to", "gguf:Q8_0", "-o", tmp_path, *SMALL)
    assert done.code == 3
    assert not (tmp_path / "demo-coder-Q8_0.gguf").exists()
    assert (tmp_path / "demo-coder-Q8_0.gguf.failed").exists()
    assert "payload on disk" in done.err
    assert "blocks within their tensor" in done.err
    assert "model.layers.1.mlp.up_proj.weight" in done.err
    again = run("convert", demo_folder, "--to", "gguf:Q8_0", "-o", tmp_path, "--no-proof")
    assert again.code == 0


@pytest.mark.usefixtures("without_runtime")
def test_without_the_runtime_the_report_says_unproven(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    done = run("convert", demo_folder, "--to", "gguf:F16", "-o", tmp_path, *SMALL)
    assert done.code == 0, done.err
    assert f"unproven in the runtime: {llama_cpp.INSTALL}" in done.out
    verdict = json.loads((tmp_path / "demo-coder-F16.report.json").read_text("utf-8"))["proof"]["verdict"]
    assert verdict.startswith("unproven in the runtime")


@pytest.mark.usefixtures("without_runtime")
def test_require_proof_makes_a_missing_runtime_a_failure(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    done = run("convert", demo_folder, "--to", "gguf:F16", "-o", tmp_path, "--require-proof", *SMALL)
    assert done.code == 3
    assert llama_cpp.INSTALL in done.err
    assert not list(tmp_path.iterdir())  # before anything was written


def test_verify_leaves_the_file_and_hints_at_the_eos_rule(
    run: Run, demo_folder: Path, tmp_path: Path
) -> None:
    convert = (
        "convert",
        demo_folder,
        "--to",
        "gguf:F16",
        "-o",
        tmp_path,
        "--eos",
        "completion",
        "--no-proof",
    )
    assert run(*convert).code == 0
    file = tmp_path / "demo-coder-F16.gguf"
    wrong = run("verify", file, "--reference", demo_folder, *SMALL)
    assert wrong.code == 3
    assert "eos_id" in wrong.err
    assert "--eos completion" in wrong.err
    right = run("verify", file, "--reference", demo_folder, "--eos", "completion", *SMALL)
    assert right.code == 0, right.err
    assert file.exists()
    assert (tmp_path / "demo-coder-F16.verify.report.json").exists()


@pytest.mark.parametrize("place", ["demo-coder-F16.gguf", "nowhere/report.json"])
def test_a_report_has_its_place_before_the_work(
    run: Run, demo_folder: Path, tmp_path: Path, place: str
) -> None:
    convert = ("convert", demo_folder, "--to", "gguf:F16", "-o", tmp_path, "--no-proof", "-q")
    assert run(*convert).code == 0
    file = tmp_path / "demo-coder-F16.gguf"
    before = file.read_bytes()
    done = run("verify", file, "--reference", demo_folder, "--report", tmp_path / place)
    assert done.code == 2
    assert "report" in done.err
    assert file.read_bytes() == before


def test_an_interrupted_proof_names_what_is_written_and_unproven(
    run: Run, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Verifier, "verify", interrupt)
    done = run("convert", demo_folder, "--to", "gguf:F16", "-o", tmp_path, "--probe-tokens", 300)
    assert done.code == 130
    assert f"written but not proven: {tmp_path}/demo-coder-F16.gguf" in done.err


def test_a_split_is_proven_by_its_first_shard(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    split = ("convert", demo_folder, "--to", "gguf:Q8_0", "-o", tmp_path, "--split-max-size", "2M", *SMALL)
    done = run(*split)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "demo-coder-Q8_0.report.json").read_text("utf-8"))
    assert len(report["files"]) == 3
