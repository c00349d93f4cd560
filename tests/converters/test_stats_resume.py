"""A calibration that is killed, at any moment, ends in the same bytes; a changed one is refused."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.checkpoint import open_checkpoint
from converters.stats import progress, run
from converters.stats.archive import Archive
from converters.stats.manifest import Member, Request
from converters.stats.prepare import CalibrateOptions
from converters.stats.progress import locked
from converters.stats.run import calibrate_checkpoint
from converters.stats.states import FileStates
from quantize.calibrate import Dropped
from quantize.errors import ArchiveError, OutputError
from quantize.sensitivity import TokenWeights, token_weights
from quantize.states import MemoryStates
from tests.conftest import ROOT, MakeCheckpoint

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from tests.converters.test_stats_resume import calibrate
torch.set_num_threads(1)
source, folder, call, number = sys.argv[1:]
owner = {"pwrite": os, "replace": Path, "fsync": os}[call]
original, calls = getattr(owner, call), 0
def counted(*arguments):
    global calls
    calls += 1
    if calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, call, counted)
calibrate(Path(source), Path(folder))
"""


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor
    kind: str = "completion"


def rows_of(seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [Row(torch.randint(0, 900, (n,), generator=generator)) for n in (40, 3, 17, 90)]


def calibrate(source: Path, folder: Path, rows: list[Row] | None = None, **options: object) -> Archive:
    chosen = CalibrateOptions(folder, **({"micro_batch": 64} | options))  # type: ignore[arg-type]
    identity = {"name": "four rows"}
    return calibrate_checkpoint(open_checkpoint(source), rows or rows_of(), identity, chosen)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(source: Path, folder: Path, call: str, number: int) -> None:
    command = [sys.executable, "-c", CHILD, str(source), str(folder), call, str(number)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    demo_folder: Path, tmp_path: Path
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    calibrate(demo_folder, undisturbed)
    found = []
    # Two packs: writes 1 and 2 are the embedding's, 3 the progress's, 4 and 5 those of block 0.
    for call, number in [("pwrite", 2), ("pwrite", 5), ("replace", 1), ("replace", 2), ("fsync", 1)]:
        killed(demo_folder, folder, call, number)
        left = progress.read_progress(folder)
        found.append(None if left is None else left.done)
        assert not (folder / "stats.json").exists()
    # Killed while embedding; in block 0; before block 0's member; between member and progress; in block 0.
    assert found == [None, 0, 0, 0, 0]
    killed(demo_folder, folder, "pwrite", 8)
    after = progress.read_progress(folder)
    assert after is not None and after.done == 2
    calibrate(demo_folder, folder)
    assert content(folder) == content(undisturbed)


def test_a_kill_at_the_end_loses_nothing(demo_folder: Path, tmp_path: Path) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    archive = calibrate(demo_folder, undisturbed)
    # Two renamings a block, one for the first progress, then head, rows, and the manifest's own.
    killed(demo_folder, folder, "replace", 2 * archive.config.n_layers + 4)
    assert (folder / "rows.safetensors").exists() and not (folder / "stats.json").exists()
    calibrate(demo_folder, folder)
    assert content(folder) == content(undisturbed)


def interrupted(source: Path, folder: Path, **options: object) -> None:
    """Stop a run after its first block, as an interrupt would."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    chosen = CalibrateOptions(folder, **({"micro_batch": 64} | options))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(open_checkpoint(source), rows_of(), {"name": "four rows"}, chosen, stop)


def test_weights_of_tokens_outlive_an_interruption_of_their_own_run_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = make_checkpoint(), []

    def counted(*arguments: Any, **options: Any) -> TokenWeights:
        made.append(1)
        return token_weights(*arguments, **options)

    monkeypatch.setattr(run, "token_weights", counted)
    calibrate(source, tmp_path / "undisturbed", sensitivity=True)
    folder = tmp_path / "stats"
    interrupted(source, folder, sensitivity=True)
    assert len(made) == 2 and (folder / "weights.safetensors").is_file()
    calibrate(source, folder, sensitivity=True)
    assert len(made) == 2
    assert content(folder) == content(tmp_path / "undisturbed")
    # One that was left by another request, before its states were there, is made anew.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.safetensors").write_bytes(b"of other rows")
    calibrate(source, tmp_path / "other", sensitivity=True)
    assert len(made) == 3
    assert content(tmp_path / "other") == content(tmp_path / "undisturbed")


def test_blocks_that_are_done_are_not_done_again(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    interrupted(source, tmp_path / "stats")
    seen: list[tuple[int, int]] = []
    calibrate_checkpoint(
        open_checkpoint(source),
        rows_of(),
        {"name": "four rows"},
        CalibrateOptions(tmp_path / "stats"),  # the micro-batch of the run that began it
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 2)]
    calibrate(source, tmp_path / "undisturbed")
    assert content(tmp_path / "stats") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("finished", [False, True], ids=["begun", "finished"])
def test_what_changed_is_listed(make_checkpoint: MakeCheckpoint, tmp_path: Path, finished: bool) -> None:
    source, folder = make_checkpoint(), tmp_path / "stats"
    if finished:
        calibrate(source, folder)
    else:
        interrupted(source, folder)
    before = content(folder)
    with pytest.raises(ArchiveError) as caught:
        calibrate(make_checkpoint("other", seed=1), folder, rows_of(1), micro_batch=65, on_nonfinite="drop")
    reasons = caught.value.reasons
    # Of an archive that is made it no longer matters in what portions it was computed.
    assert ("option micro_batch: 65, begun with 64" in reasons) is not finished
    assert "option on_nonfinite: 'drop', begun with 'stop'" in reasons
    assert "corpus: the rows are others" in reasons
    assert "model: lm_head.weight: other values" in reasons
    assert "--fresh" in caught.value.hint
    assert content(folder) == before


def test_a_finished_archive_is_returned_as_it_is(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    calibrate(source, tmp_path / "stats")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").iterdir()}
    calibrate(source, tmp_path / "stats")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stats").iterdir()} == before


def test_fresh_starts_over(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    interrupted(source, tmp_path / "stats", micro_batch=33)
    calibrate(source, tmp_path / "stats", fresh=True)
    calibrate(source, tmp_path / "undisturbed")
    assert content(tmp_path / "stats") == content(tmp_path / "undisturbed")


def test_damage_to_what_was_left_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, folder = make_checkpoint(), tmp_path / "stats"
    interrupted(source, folder)
    (folder / "block-00000.safetensors").write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"block-00000\.safetensors is missing or has another length"):
        calibrate(source, folder)
    (folder / "progress.json").write_text("{")
    with pytest.raises(ArchiveError, match=r"progress\.json: damaged"):
        calibrate(source, folder)


def test_two_runs_keep_out_of_one_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, folder = make_checkpoint(), tmp_path / "stats"
    folder.mkdir()
    with locked(folder), pytest.raises(OutputError, match=r"calibrate\.lock: another run is writing"):
        calibrate(source, folder)


def test_states_in_files_are_those_in_memory(tmp_path: Path) -> None:
    written = torch.randn(7, 5)
    memory = MemoryStates(7, 5)
    with FileStates(tmp_path / "states-0", 7, 5) as files:
        for states in (memory, files):
            states.write(0, written[:4])
            states.write(4, written[4:])
            states.turn()
            assert torch.equal(states.read(2, 6), written[2:6])
        files.write(0, written[:1] + 1)
        assert torch.equal(files.read(0, 7), written)  # the other side is not what is read
    with FileStates(tmp_path / "states-0", 7, 5, side=1) as again:
        assert torch.equal(again.read(0, 7), written)


def test_progress_survives_the_file(tmp_path: Path) -> None:
    left = progress.Progress(
        Request({"config": {}, "tensors": {}}, {"name": "x"}, "00", {"ranks": 1}),
        threads=2,
        done=1,
        side=1,
        dropped=(Dropped(3, 0, "mlp_input"),),
        members={"block-00000.safetensors": Member(5, "ab")},
    )
    progress.write_progress(tmp_path, left)
    assert progress.read_progress(tmp_path) == left


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_states_that_are_not_whole_are_never_read_as_zeros(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, damage: str
) -> None:
    source, folder = make_checkpoint(), tmp_path / "stats"
    interrupted(source, folder)
    for states in folder.glob("states-*"):
        if damage == "missing":
            states.unlink()
        else:
            states.write_bytes(states.read_bytes()[:-4])
    with pytest.raises(ArchiveError, match="the hidden states of an interrupted run"):
        calibrate(source, folder)
    assert not (folder / "stats.json").exists()
