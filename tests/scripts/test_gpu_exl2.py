"""`scripts/gpu_check exl2` on a CPU: ExLlamaV2 is stood in for; worker, comparison, verdicts are the real."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.checkpoint import open_checkpoint
from converters.exl2_measurement import nominal
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from scripts import gpu_readers
from scripts.gpu_readers import exl2
from tests.converters.exl2_model import Row, one_block

ROOT = Path(__file__).parents[2]
Compare = Callable[[], list[tuple[str, bool]]]


@pytest.fixture(scope="module")
def source(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_block(demo_folder, tmp_path_factory.mktemp("source") / "demo-block")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EXL2 folder from few tokens and layouts that nothing was measured for."""
    place, checkpoint = tmp_path_factory.mktemp("folder"), open_checkpoint(source)
    rows = [Row(torch.arange(start, start + 160)) for start in (0, 1000)]
    archive = calibrate_checkpoint(checkpoint, rows, {"name": "few"}, CalibrateOptions(place / "stats"))
    measurement = nominal(checkpoint.config)
    options = ConvertOptions(place / "out", archive=archive, measurement=measurement, effort="fast")
    return convert(checkpoint, [Request("exl2", "4.25")], options)[0].place


@pytest.fixture
def compare(source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Return the comparison of the folder, with the stand-in as the program's environment."""
    python = tmp_path / "readers" / "exllamav2" / "bin" / "python"
    python.parent.mkdir(parents=True)
    path = f"{ROOT / 'tests' / 'scripts' / 'stand_in'}:{ROOT}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n', "utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("DSCQ_GPU_READERS", str(tmp_path / "readers"))
    monkeypatch.setattr(gpu_readers, "PROMPTS", gpu_readers.PROMPTS[:1])
    return lambda: list(exl2.compare(folder, source, tmp_path))


def test_without_an_environment_nothing_is_run_and_it_says_so(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSCQ_GPU_READERS", raising=False)
    ((text, passed),) = exl2.compare(folder, source, tmp_path)
    assert text.startswith("exllamav2: not run: make DIR/exllamav2 (pip install exllamav2==0.3.2") and passed


def test_the_same_logits_pass_and_it_says_what_ran(compare: Compare) -> None:
    (ran, _), *others = found = compare()
    assert [passed for _, passed in found] == [True] * 4, found
    for part in ("exllamav2, exl2-4.25: exllamav2 stand-in, torch ", ", plain attention; ", " x EXL2-"):
        assert part in ran
    everywhere, late, continuation = (text for text, _ in others)
    assert "exl2-4.25: positions: 6" in everywhere and "bound 0.005, top-1 agreement 0.99" in everywhere
    assert "positions from 4096 on: 256, mean KL " in late
    assert continuation.endswith("24 of 24 new tokens as in f32")


@pytest.mark.parametrize(
    ("fault", "verdicts", "said"),
    [
        ("rope, bos", [True, False, False, False], ["bound 0.005", "BOS must stand once, in front"]),
        ("crash", [False], ["exit 1: no kernel image is available"]),
    ],
)
def test_what_is_wrong_fails(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, fault: str, verdicts: list[bool], said: list[str]
) -> None:
    monkeypatch.setenv("FAULT", fault)
    found = compare()
    assert [passed for _, passed in found] == verdicts, found
    assert all(part in " ".join(text for text, _ in found) for part in said)


def test_every_size_is_made_with_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run, word for word; the conversions themselves are tested elsewhere."""
    commands: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command[3:]))
    folders = exl2.made_folders(tmp_path, Path("model"))
    assert [folder.name for folder in folders] == ["exl2-3", "exl2-4.25", "exl2-6-h8"]
    calibrate, convert_ = commands
    assert calibrate[:4] == ["calibrate", "model", "-o", str(tmp_path / "stats")]
    assert convert_[:4] == ["convert", "model", "--stats", str(tmp_path / "stats")]
    assert [each for each in convert_ if each.startswith("exl2:")] == ["exl2:3", "exl2:4.25", "exl2:6,h8"]
