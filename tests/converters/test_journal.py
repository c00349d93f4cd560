"""A conversion that goes on: the bytes of an undisturbed run, and nothing made twice or wrongly reused."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters import disk
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.donors import Donors, is_noted, keys_path, slice_key
from converters.imatrix import Importances
from converters.journal import JournaledFile
from converters.pipeline import convert, mark_failed, reread_hashes
from converters.places import Piece, Place
from converters.plan import ConvertOptions, Request, Written
from converters.stream import TensorDone
from quantize.codecs import codec
from quantize.codecs.encoder import Encoder
from quantize.errors import OutputError
from quantize.weights import TensorWeights

ROOT = Path(__file__).resolve().parents[2]
Q4, Q6 = Request("gguf", "Q4_K_M"), Request("gguf", "Q6_K")
AT_4 = (Place(4, 4),)


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def checkpoint(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were encoded, a slice each, where that takes long enough to be noted."""
    calls: list[int] = []
    whole = Encoder.encode

    def noted(self: Encoder, kind, rows, importance=None):  # type: ignore[no-untyped-def]
        if is_noted(kind, importance):
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
    """Return the files of a folder, the hidden keys of its exports included."""
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
    assert resumed[0].pieces == undisturbed[0].pieces
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
    lines = [line for line in journal.read_text("ascii").splitlines() if line]
    with partial.open("r+b") as file:
        file.seek(int(lines[4].split()[2].split(":")[0]))
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

    def fails_at_last(self: JournaledFile, key: str, places: tuple[Place, ...], data: memoryview) -> Piece:
        if next(calls) == 20:
            raise OutputError("the disk is full")
        return whole(self, key, places, data)

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


def test_a_journal_may_say_anything(tmp_path: Path) -> None:
    path, key, digest = tmp_path / "a.gguf", "a" * 64, hashlib.sha256(b"work").hexdigest()
    partial = tmp_path / "a.gguf.partial"
    partial.write_bytes(b"head" + b"work" + bytes(8))
    nonsense = [
        f"{key} {digest} x:4",
        f"{key} {digest} 4:{'9' * 15}",
        f"{key} {digest} 4:4:2",
        f"{key} {digest} 4:2:{'9' * 15}:2",
        f"{key} {digest} 4:2 :",
        f"{key} {digest} -4:4",
        "\0\0 \xff",
        key,
    ]
    for line in nonsense:
        partial.with_name(partial.name + ".journal").write_text(line, "latin-1")
        file = JournaledFile(path, b"head", 16)
        assert file.reuse(key, AT_4, None) is None
        file.leave()
    file = JournaledFile(path, b"head", 16)
    file.write(key, AT_4, memoryview(b"work"))  # behind the line that was cut off
    file.leave()
    found = JournaledFile(path, b"head", 16).reuse(key, AT_4, None)
    assert found == Piece(AT_4, digest) and partial.read_bytes()[4:8] == b"work"


@pytest.mark.parametrize("place", ["reserve", "head"])
def test_a_disk_without_room_for_the_rest_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    key = "a" * 64
    file = JournaledFile(tmp_path / "a.gguf", b"head", 16)
    file.write(key, AT_4, memoryview(b"work"))
    file.leave()
    with monkeypatch.context() as patched:
        patched.setattr(*((disk, "_reserve") if place == "reserve" else (os, "pwrite")), full)
        with pytest.raises(OutputError, match="the disk is full"):
            JournaledFile(tmp_path / "a.gguf", b"head", 16)
    assert JournaledFile(tmp_path / "a.gguf", b"head", 16).reuse(key, AT_4, None) is not None


def test_of_two_earlier_layouts_the_fuller_stays(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    interrupt(checkpoint, tmp_path / "out", 46)
    interrupt(checkpoint, tmp_path / "out", 3, tensor_types=(("blk.0.ffn_gate", "Q5_K"),))
    encoded.clear()
    run(checkpoint, tmp_path / "out", tensor_types=(("blk.0.ffn_gate", "Q3_K"),))
    assert len(encoded) <= 4
    assert not [name for name in contents(tmp_path / "out") if "partial" in name]


# --- finished exports as donors


def test_an_edited_plan_makes_only_what_has_changed(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    first = run(checkpoint, tmp_path / "out")
    encoded.clear()
    changed = {"tensor_types": (("blk.0.ffn_gate", "Q5_K"),)}
    second = run(checkpoint, tmp_path / "out", **changed)
    shape = checkpoint.config.tensor_shapes()["model.layers.0.mlp.gate_proj.weight"]
    assert encoded == [shape[0]]  # one slice: the tensor as a whole
    searched = [t for t in first[0].plan.tensors if is_noted(codec(t.quant), None)]
    assert second[0].n_tensors_reused == len(searched) - 1
    whole = run(checkpoint, tmp_path / "whole", **changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert second[0].pieces == whole[0].pieces
    assert reread_hashes(second[0]).differing == ()


def test_an_interrupted_remake_leaves_the_finished_file_and_its_keys(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    run(checkpoint, tmp_path / "out")
    before = contents(tmp_path / "out")
    interrupt(checkpoint, tmp_path / "out", 9, force=True, tensor_types=(("ffn_gate", "Q5_K"),))
    assert before.items() <= contents(tmp_path / "out").items()
    encoded.clear()
    run(checkpoint, tmp_path / "out")
    assert encoded == []
    assert contents(tmp_path / "out") == before


def test_another_recipe_takes_the_matrices_of_the_same_type(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    run(checkpoint, tmp_path / "out")
    encoded.clear()
    other = Request("gguf", "Q4_K_S")
    written = run(checkpoint, tmp_path / "out", other)
    n_anew = len(encoded)
    encoded.clear()
    run(checkpoint, tmp_path / "whole", other)
    assert n_anew < len(encoded) / 2 and written[0].n_tensors_reused >= len(encoded) - n_anew
    name = "demo-coder-Q4_K_S.gguf"
    assert contents(tmp_path / "out")[name] == contents(tmp_path / "whole")[name]


@pytest.mark.parametrize("finished", [False, True])
def test_tensors_move_between_shards(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int], finished: bool
) -> None:
    if finished:
        run(checkpoint, tmp_path / "out", split_max_bytes=1_500_000)
    else:
        interrupt(checkpoint, tmp_path / "out", 46, split_max_bytes=1_000_000)
    encoded.clear()
    run(checkpoint, tmp_path / "out", split_max_bytes=700_000)
    assert len(encoded) <= (0 if finished else 3)
    run(checkpoint, tmp_path / "whole", split_max_bytes=700_000)
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert whole.items() <= out.items()
    assert finished or whole == out  # no leftover of the other shards


def test_what_another_run_is_writing_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = JournaledFile(tmp_path / "demo-coder-Q4_K_M-00001-of-00009.gguf", b"head", 16)
    other.write("a" * 64, AT_4, memoryview(b"work"))
    run(checkpoint, tmp_path)
    assert contents(tmp_path)[other.file.partial.name] == b"head" + b"work" + bytes(8)
    other.leave()
    run(checkpoint, tmp_path)
    assert sorted(contents(tmp_path)) == [".demo-coder-Q4_K_M.gguf.keys", "demo-coder-Q4_K_M.gguf"]


def test_a_finished_file_that_was_changed_gives_only_what_is_whole(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    [written] = run(checkpoint, tmp_path / "whole")
    [path] = run(checkpoint, tmp_path / "out")[0].paths
    tensor = written.plan.by_name["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset + tensor.n_bytes // 2] ^= 1
    path.write_bytes(data)
    encoded.clear()
    run(checkpoint, tmp_path / "out")
    assert encoded == [tensor.n_rows]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_exports_of_one_run_are_not_each_others_earlier_run(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    written = run(checkpoint, tmp_path, Q4, Request("gguf", "Q4_K_S"), Q6)
    assert [one.n_reused for one in written] == [0, 0, 0]
    assert len(encoded) == sum(is_noted(codec(t.quant), None) for one in written for t in one.plan.tensors)


def test_fresh_takes_nothing_from_earlier_runs(
    checkpoint: Checkpoint, tmp_path: Path, encoded: list[int]
) -> None:
    run(checkpoint, tmp_path / "out")
    n_whole = len(encoded)
    interrupt(checkpoint, tmp_path / "out", 30, Q6)
    interrupt(checkpoint, tmp_path / "out", 30, force=True, tensor_types=(("ffn_gate", "Q5_K"),))
    encoded.clear()
    written = run(checkpoint, tmp_path / "out", fresh=True)
    assert len(encoded) == n_whole
    assert (written[0].n_reused, written[0].n_tensors_reused) == (0, 0)


def test_a_file_that_failed_its_proof_is_no_donor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    [written] = run(checkpoint, tmp_path)
    assert keys_path(written.paths[0]).is_file()
    mark_failed(written)
    assert not keys_path(written.paths[0]).exists()
    assert Donors(tmp_path).find("a" * 64) is None
    assert run(checkpoint, tmp_path)[0].n_reused == 0


def test_what_is_made_as_fast_as_found_has_no_keys(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rounded, options = Request("gguf", "Q4_0"), {"output_tensor_type": "Q4_0", "pure": True}
    run(checkpoint, tmp_path, Request("gguf", "F16"), Request("gguf", "Q8_0"))
    run(checkpoint, tmp_path, rounded, **options)
    assert not [name for name in contents(tmp_path) if name.startswith(".")]
    name = "model.layers.0.mlp.gate_proj.weight"
    measured = {name: torch.ones(checkpoint.config.tensor_shapes()[name][1])}
    importances = Importances(measured, "a.gguf", "", 0)
    run(checkpoint, tmp_path, rounded, importances=importances, **options)
    keys = [name for name in contents(tmp_path) if name.startswith(".")]
    assert keys == [".demo-coder-Q4_0.gguf.keys"]
    assert len(contents(tmp_path)[keys[0]].splitlines()) == 1  # that tensor's
