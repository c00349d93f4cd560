"""A conversion that goes on: the bytes of an undisturbed run, and nothing made twice or wrongly reused."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.imatrix import Importances
from converters.journal import JournaledFile, slice_key
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request, Written
from converters.stream import TensorDone
from quantize.codecs.encoder import Encoder
from quantize.errors import OutputError
from quantize.weights import TensorWeights

ROOT = Path(__file__).resolve().parents[2]
Q4, Q6 = Request("gguf", "Q4_K_M"), Request("gguf", "Q6_K")


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def checkpoint(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were encoded, a slice each, of types that are searched for."""
    calls: list[int] = []
    whole = Encoder.encode

    def noted(self: Encoder, kind, rows, importance=None):  # type: ignore[no-untyped-def]
        if kind.uses_importance:
            calls.append(len(rows))
        return whole(self, kind, rows, importance)

    monkeypatch.setattr(Encoder, "encode", noted)
    return calls


def stop_after(n_tensors: int) -> Callable[[TensorDone], None]:
    """Return a listener that ends the run when so many tensors are done."""
    done: Iterator[int] = iter(range(1, 1000))

    def stop(_: TensorDone) -> None:
        if next(done) == n_tensors:
            raise StoppedError

    return stop


def run(checkpoint: Checkpoint, folder: Path, *requests: Request, **options: object) -> list[Written]:
    chosen = ConvertOptions(folder, force=True, n_threads=1, hash_tensors=True)
    return convert(checkpoint, requests or (Q4,), replace(chosen, **options))  # type: ignore[arg-type]


def interrupt(
    checkpoint: Checkpoint, folder: Path, n_tensors: int, *requests: Request, **options: object
) -> None:
    chosen = replace(ConvertOptions(folder, n_threads=1), **options)  # type: ignore[arg-type]
    with pytest.raises(StoppedError):
        convert(checkpoint, requests or (Q4,), chosen, stop_after(n_tensors))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "LICENSE"}


@pytest.mark.parametrize("n_tensors", [2, 9, 30, 47])
def test_the_next_run_goes_on_and_ends_in_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int], n_tensors: int
) -> None:
    undisturbed = run(checkpoint, tmp_path / "whole")
    n_whole = len(encoded)
    encoded.clear()
    interrupt(checkpoint, tmp_path / "out", n_tensors)
    n_before = len(encoded)
    encoded.clear()
    resumed = run(checkpoint, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed[0].tensor_hashes == undisturbed[0].tensor_hashes
    # What was encoded but not settled when the run ended was noted as well.
    assert n_before > 0 and len(encoded) <= n_whole - n_before + 1
    assert resumed[0].n_reused > 0 and undisturbed[0].n_reused == 0


def test_another_type_for_some_tensors_makes_only_those_anew(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    interrupt(checkpoint, tmp_path / "out", 40)
    encoded.clear()
    changed = {"tensor_types": (("blk.0.ffn_gate", "Q5_K"),)}
    run(checkpoint, tmp_path / "out", **changed)
    n_anew = len(encoded)
    encoded.clear()
    run(checkpoint, tmp_path / "whole", **changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert n_anew <= len(encoded) - 25


def test_a_second_change_after_a_second_interruption_still_finds_the_first(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    interrupt(checkpoint, tmp_path / "out", 46)
    changed = {"tensor_types": (("blk.0.ffn_gate", "Q5_K"),)}
    interrupt(checkpoint, tmp_path / "out", 5, **changed)
    assert "demo-coder-Q4_K_M.gguf.partial.old" in contents(tmp_path / "out")
    encoded.clear()
    run(checkpoint, tmp_path / "out", **changed)
    assert len(encoded) <= 4
    run(checkpoint, tmp_path / "whole", **changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_importances_make_only_their_tensors_anew(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    names = [name for name, shape in checkpoint.config.tensor_shapes().items() if len(shape) > 1]
    rows = {n: torch.ones(checkpoint.config.tensor_shapes()[n][1]) for n in names if "embed" not in n}
    given = Importances(rows, "a.gguf", "", 0)
    interrupt(checkpoint, tmp_path / "out", 46, importances=given)
    name = "model.layers.1.mlp.up_proj.weight"
    other = replace(given, rows=rows | {name: torch.linspace(1, 2, len(rows[name]))})
    encoded.clear()
    run(checkpoint, tmp_path / "out", importances=other)
    assert len(encoded) <= 3
    run(checkpoint, tmp_path / "whole", importances=other)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_weight_that_has_changed_is_never_reused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out", 46)
    tensors = {name: checkpoint.weights.load(name).clone() for name in checkpoint.weights.specs()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.25
    changed = replace(checkpoint, weights=TensorWeights(tensors))
    run(changed, tmp_path / "out")
    run(changed, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_torn_bytes_are_found_out_and_made_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out", 46)
    partial = tmp_path / "out" / "demo-coder-Q4_K_M.gguf.partial"
    journal = partial.with_name(partial.name + ".journal")
    lines = journal.read_text("ascii").splitlines()
    with partial.open("r+b") as file:
        file.seek(int(lines[4].split()[1]))
        file.write(bytes(64))
    journal.write_text("\n".join([*lines[:-1], lines[-1][:70]]), "ascii")  # and the last line is cut off
    run(checkpoint, tmp_path / "out")
    run(checkpoint, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_several_exports_in_shards_go_on_too(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    requests, options = (Q4, Q6, Request("gguf", "F16")), {"split_max_bytes": 1_500_000}
    interrupt(checkpoint, tmp_path / "out", 30, *requests, **options)
    encoded.clear()
    run(checkpoint, tmp_path / "out", *requests, **options)
    n_rest = len(encoded)
    encoded.clear()
    run(checkpoint, tmp_path / "whole", *requests, **options)
    assert n_rest < len(encoded) / 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_run_goes_on(demo_folder: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from converters.checkpoint import open_checkpoint
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
def stop(event):
    if event.n_done > event.n_total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(open_checkpoint(sys.argv[1]), [Request("gguf", "Q4_K_M")], ConvertOptions(Path(sys.argv[2])), stop)
"""
    command = [sys.executable, "-c", code, str(demo_folder), str(tmp_path / "out")]
    killed = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    written = run(checkpoint, tmp_path / "out")
    assert written[0].n_reused > 0.3 * written[0].plan.n_bytes
    run(checkpoint, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_loses_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = JournaledFile.write, iter(range(1000))

    def fails_at_last(self: JournaledFile, key: str, offset: int, data: memoryview) -> None:
        if next(calls) == 20:
            raise OutputError("the disk is full")
        whole(self, key, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(JournaledFile, "write", fails_at_last)
        with pytest.raises(OutputError, match="the disk is full"):
            convert(checkpoint, [Q4], ConvertOptions(tmp_path / "out", n_threads=1))
    assert run(checkpoint, tmp_path / "out")[0].n_reused > 0


def test_a_leftover_without_a_journal_is_no_donor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo-coder-Q4_K_M.gguf.partial").write_bytes(b"x" * 1000)
    assert run(checkpoint, tmp_path / "out")[0].n_reused == 0
    run(checkpoint, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_key_tells_apart_all_that_decides_the_bytes() -> None:
    rows, weights = torch.ones(2, 256), torch.ones(256)
    keys = [
        slice_key(rows, "Q4_K", 0, None),
        slice_key(rows, "Q5_K", 0, None),
        slice_key(rows, "Q4_K", 64, None),
        slice_key(rows, "Q4_K", 0, weights),
        slice_key(rows, "Q4_K", 0, 2 * weights),
        slice_key(rows.bfloat16(), "Q4_K", 0, None),
        slice_key(rows.reshape(1, 512), "Q4_K", 0, None),
        slice_key(-rows, "Q4_K", 0, None),
    ]
    assert len(set(keys)) == len(keys)
