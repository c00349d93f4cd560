"""The program for machines with a GPU: here it says that there is none, and its checks can fail."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantize.codecs import CODECS, codec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program as a module; a dataclass looks its own module up by name."""
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, loader.name, module)
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
        yield module


@pytest.fixture
def few(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A setting that compares the CPU with itself on two rows, of two types."""
    kinds = {name: codec(name) for name in ("Q4_0", "Q4_K")}
    monkeypatch.setattr(program, "CODECS", kinds)
    return program.Setting(torch.device("cpu"), 2)


def _spoil(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    """Let every second call of a codec's method give another first byte: it is the one on the device."""
    real, calls = getattr(codec(name), method), []

    def spoilt(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        result: torch.Tensor = real(*arguments)
        if len(calls) % 2 == 0:
            result.view(torch.uint8)[0, 0] ^= 1
        return result

    monkeypatch.setattr(type(codec(name)), method, lambda _, *arguments: spoilt(*arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing() -> None:
    command = [sys.executable, "scripts/gpu_check"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "no CUDA GPU is here: nothing was run\n", "")


def test_equal_bytes_pass(program: ModuleType, few: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(["encode", "decode", "speed"], few) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok ") == 4 + 2 + 4
    assert "Q4_K with importances, equal blocks: gaussian 16/16, heavy-tailed 16/16, constant" in printed


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_another_byte_fails(
    program: ModuleType, few: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _spoil(monkeypatch, "Q4_0", name)
    outcomes = list(program.CHECKS[name](few))
    failed = [outcome.text for outcome in outcomes if not outcome.passed]
    assert len(failed) == (2 if name == "encode" else 1)
    assert all(text.startswith("Q4_0") for text in failed)
    assert ("127/128" if name == "encode" else "4095/4096") in failed[0]


def test_files_are_compared_byte_for_byte(
    program: ModuleType, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "CONVERTED", ("Q8_0",))
    outcomes = list(program.convert(few))
    assert [outcome.passed for outcome in outcomes] == [True] * 3
    assert outcomes[2].text == "demo-coder-Q8_0.gguf: the same bytes"


def test_a_file_of_other_bytes_fails(program: ModuleType, few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(folder: Path, device: str) -> Any:
        folder.mkdir()
        (folder / "a.gguf").write_bytes(folder.name.encode())
        return program.Outcome(device)

    monkeypatch.setattr(program, "_converted", converted)
    assert [outcome.passed for outcome in program.convert(few)] == [True, True, False]


def test_a_conversion_that_fails_is_a_failure(
    program: ModuleType, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "CONVERTED", ("Q9_9",))
    outcomes = list(program.convert(few))
    assert [outcome.passed for outcome in outcomes] == [False, False]
    assert "exit 2" in outcomes[0].text


def test_without_exllamav2_the_check_says_how_to_get_it(
    program: ModuleType, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSCQ_GPU_READERS", "/nowhere")
    (outcome,) = program.CHECKS["exl2"](few)
    assert outcome.passed and outcome.text.startswith("exllamav2: not run: make DIR/exllamav2 (pip install")


def test_an_unknown_check_is_a_usage_error(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "encode", "sing"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2


def test_what_a_gpu_encodes_is_checked(program: ModuleType) -> None:
    names = {kind.name for kind, _, _ in program.searches()}
    assert names == {name for name, kind in CODECS.items() if kind.gains_from_gpu}
