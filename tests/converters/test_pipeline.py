"""From a checkpoint to files: the weights come back, the bytes are the same, and no half file stays."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from converters import stream
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.disk import PartialFile
from converters.gguf_source import open_gguf
from converters.imatrix import Importances
from converters.pipeline import TensorDone, convert, mark_failed, reread_hashes
from converters.plan import ConvertOptions, Request, Written
from converters.runtimes.llama_cpp import LlamaCpp
from quantize.codecs import codec
from quantize.errors import CheckpointError, OutputError, PlanError
from quantize.weights import TensorSpec, TensorWeights, Weights

ROOT = Path(__file__).parents[2]
REQUESTS = [Request("gguf", quant) for quant in ("F32", "F16", "BF16", "Q8_0", "Q4_K_M")]
F16 = [Request("gguf", "F16")]
MakeCheckpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """A small grouped-query model."""
    return open_checkpoint(make_checkpoint())


def _run(
    checkpoint: Checkpoint, folder: Path, requests: list[Request] = F16, **options: Any
) -> list[Written]:
    return convert(checkpoint, requests, ConvertOptions(folder, **options))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _in_memory(checkpoint: Checkpoint) -> Tensors:
    return {name: checkpoint.weights.load(name).clone() for name in checkpoint.weights.specs()}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class _CountingWeights:
    def __init__(self, weights: Weights) -> None:
        self.weights, self.loads = weights, Counter[str]()

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.weights.specs()

    def load(self, name: str) -> torch.Tensor:
        self.loads[name] += 1
        return self.weights.load(name)


def test_an_export_never_takes_the_place_of_its_source(checkpoint: Checkpoint, tmp_path: Path) -> None:
    [written] = _run(checkpoint, tmp_path / "own")
    before = _sha256(written.paths[0])
    source = open_checkpoint(written.paths[0])
    with pytest.raises(OutputError, match="the place of its own source"):
        _run(source, tmp_path / "own", force=True)
    assert _sha256(written.paths[0]) == before
    assert _files(_run(source, tmp_path / "other")[0].paths[0].parent) == [written.paths[0].name]


def test_a_new_file_has_no_older_files_report(checkpoint: Checkpoint, tmp_path: Path) -> None:
    [written] = _run(checkpoint, tmp_path)
    mark_failed(written)
    (tmp_path / "tiny-F16.report.json").write_text("{}")
    (tmp_path / "tiny-Q8_0.report.json").write_text("{}")
    _run(checkpoint, tmp_path)
    assert _files(tmp_path) == ["tiny", "tiny-F16.gguf", "tiny-Q8_0.report.json"]


def test_a_file_is_no_folder_to_write_to(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="-o takes a folder"):
        _run(checkpoint, tmp_path / "out")


# Multi-head, grouped-query, multi-query; a head size of its own; a tied head; rows that are no whole blocks.
SHAPES: dict[str, dict[str, Any]] = {
    "MHA": {"num_key_value_heads": 4},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "odd": {"intermediate_size": 80},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_is_written_is_what_was_there(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, shape: str, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(dtype=dtype, **SHAPES[shape]))
    for written in _run(checkpoint, tmp_path / "out", REQUESTS):
        file = open_gguf(written.paths[0])
        assert file.config == checkpoint.config
        assert file.vocabulary == checkpoint.tokenizer.vocabulary
        assert list(file.weights.specs()) == list(checkpoint.config.tensor_shapes())
        for name, kind in file.tensor_types.items():
            source = checkpoint.weights.load(name)
            rows = source.reshape(-1, source.shape[-1])
            expected = codec(kind).decode(codec(kind).encode(rows), rows.shape[1]).reshape(source.shape)
            assert torch.equal(file.weights.load(name).float(), expected), name


def test_recipes_are_written_with_their_importances(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(hidden_size=256, intermediate_size=512))
    shapes = checkpoint.config.tensor_shapes()
    rows = {n: 0.1 + torch.rand(shape[1]) for n, shape in shapes.items() if len(shape) > 1 and "layers" in n}
    importances = Importances(rows, "imatrix.gguf", "", 0)
    requests = [Request("gguf", quant) for quant in ("Q4_K_M", "Q2_K_S", "IQ2_M", "IQ1_S")]
    for written in _run(checkpoint, tmp_path, requests, importances=importances):
        file = open_gguf(written.paths[0])
        for name, kind in file.tensor_types.items():
            source = checkpoint.weights.load(name)
            if len(source.shape) > 1:
                assert torch.equal(file.blocks(name), codec(kind).encode(source, rows.get(name))), name
        searched = [n for n, kind in file.tensor_types.items() if codec(kind).uses_importance and n in rows]
        plain = {n: codec(file.tensor_types[n]) for n in searched}
        plain = {n: kind for n, kind in plain.items() if not kind.needs_importance}
        assert plain and all(
            not torch.equal(file.blocks(n), kind.encode(checkpoint.weights.load(n)))
            for n, kind in plain.items()
        )


def test_q_and_k_lie_permuted_in_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (written,) = _run(checkpoint, tmp_path, [Request("gguf", "F32")])
    tensor = written.plan.by_name["model.layers.1.self_attn.k_proj.weight"]
    source = checkpoint.weights.load(tensor.name).float()  # 2 heads of 16 rows
    row = 64 * 4
    data = written.paths[0].read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
    for head in range(2):
        for i in range(8):
            for j in (0, 1):
                at = (head * 16 + 2 * i + j) * row
                assert data[at : at + row] == source[head * 16 + j * 8 + i].numpy().tobytes()


def test_several_files_come_from_one_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = _CountingWeights(checkpoint.weights)
    _run(replace(checkpoint, weights=weights), tmp_path / "together", REQUESTS)
    assert weights.loads == Counter(list(checkpoint.weights.specs()))
    for request in REQUESTS:
        _run(checkpoint, tmp_path / "alone", [request])
    together, alone = (
        {path.name: _sha256(path) for path in (tmp_path / name).glob("*.gguf")}
        for name in ("together", "alone")
    )
    assert len(together) == len(REQUESTS)
    assert together == alone


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_bytes_do_not_depend_on_threads_slices_or_order(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    whole = _run(checkpoint, tmp_path / "whole", REQUESTS, n_threads=1, hash_tensors=True)
    monkeypatch.setattr(stream, "SLICE_ELEMENTS", 64 * 5)
    backwards = TensorWeights(dict(reversed(_in_memory(checkpoint).items())))
    again = _run(
        replace(checkpoint, weights=backwards),
        tmp_path / "sliced",
        REQUESTS,
        n_threads=n_threads,
        hash_tensors=True,
    )
    for one, two in zip(whole, again, strict=True):
        assert _sha256(one.paths[0]) == _sha256(two.paths[0])
        assert one.pieces.keys() == two.pieces.keys() == checkpoint.weights.specs().keys()


def test_torchs_threads_are_as_before(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    _run(checkpoint, tmp_path, n_threads=3)
    assert torch.get_num_threads() == before


def test_split_files_are_the_whole_file_in_pieces(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (whole,) = _run(checkpoint, tmp_path / "whole")
    limit = whole.plan.n_bytes * 2 // 3
    (split,) = _run(checkpoint, tmp_path / "split", split_max_bytes=limit, hash_tensors=True)
    assert len(split.paths) > 1
    assert _files(tmp_path / "split") == [path.name for path in split.paths]
    one, many = open_gguf(whole.paths[0]), open_gguf(split.paths[0])
    for name in one.tensor_types:
        assert torch.equal(one.blocks(name), many.blocks(name))
    assert reread_hashes(split).differing == ()


def test_progress_adds_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events: list[TensorDone] = []
    convert(checkpoint, F16, ConvertOptions(tmp_path), events.append)
    specs = checkpoint.weights.specs()
    assert [event.name for event in events] == list(specs)
    assert events[-1].n_done == events[-1].n_total == sum(spec.n_bytes for spec in specs.values())


def test_rereading_finds_a_flipped_byte(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (written,) = _run(checkpoint, tmp_path, hash_tensors=True)
    path = written.paths[0]
    good = reread_hashes(written)
    assert (good.file_hashes, good.differing) == ({path.name: _sha256(path)}, ())
    tensor = written.plan.tensors[3]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 5] ^= 1
    path.write_bytes(data)
    assert reread_hashes(written).differing == (tensor.name,)
    path.write_bytes(data[: tensor.offset])
    assert tensor.name in reread_hashes(written).differing


def test_failed_files_lose_their_names(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (written,) = _run(checkpoint, tmp_path)
    assert mark_failed(written) == (tmp_path / "tiny-F16.gguf.failed",)
    assert _files(tmp_path) == ["tiny", "tiny-F16.gguf.failed"]


# --- weights that cannot be exported


def _spoil(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][2, 5] = float("nan")
    tensors["model.layers.1.mlp.down_proj.weight"][60, :3] = float("-inf")
    tensors["model.norm.weight"][7] = float("inf")


@pytest.mark.parametrize("requests", [F16, REQUESTS])
def test_all_tensors_that_are_not_finite_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, requests: list[Request]
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(edit=_spoil))
    with pytest.raises(CheckpointError, match="not finite") as caught:
        _run(checkpoint, tmp_path / "out", requests)
    assert sorted(caught.value.reasons) == [
        "model.layers.1.mlp.down_proj.weight: 1 NaN and 3 infinite of 6144",
        "model.norm.weight: 0 NaN and 1 infinite of 64",
    ]
    assert _files(tmp_path / "out") == []


def _enlarge(tensors: Tensors) -> None:
    tensors["lm_head.weight"][3, 3] = -65536.0
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3e7


def test_all_tensors_too_large_for_the_type_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(edit=_enlarge))
    with pytest.raises(PlanError, match="choose BF16 or F32") as caught:
        _run(checkpoint, tmp_path / "out", [Request("gguf", "F16"), Request("gguf", "Q8_0")])
    assert sorted(caught.value.reasons) == [
        "lm_head.weight: 65536 does not fit F16",
        "model.layers.0.mlp.up_proj.weight: 3.00155e+07 does not fit F16",
        "model.layers.0.mlp.up_proj.weight: 3.00155e+07 does not fit Q8_0",
    ]
    assert _files(tmp_path / "out") == []
    assert _run(checkpoint, tmp_path / "out", [Request("gguf", "BF16")])


def test_all_reasons_against_all_requests_come_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    nameless = replace(checkpoint, provenance=replace(checkpoint.provenance, name=".x"))
    with pytest.raises(PlanError) as caught:
        _run(nameless, tmp_path / "out", [*F16, Request("gguf", "Q8_0"), *F16])
    fault = "the model's name '.x' cannot be a file name; give another with --name"
    assert caught.value.reasons == (
        *(f"gguf:{quant}: {fault}" for quant in ("F16", "Q8_0", "F16")),
        "gguf:F16 is asked for twice",
    )
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_config_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = _in_memory(checkpoint)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(64, 64)
    with pytest.raises(PlanError) as caught:
        _run(replace(checkpoint, weights=TensorWeights(tensors)), tmp_path)
    assert caught.value.reasons == (
        "tensor model.layers.0.self_attn.v_proj.weight is [64, 64], expected [32, 64]",
        "tensor model.norm.weight is missing",
    )


# --- the destination


def test_existing_files_are_kept_unless_forced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (path,) = _run(checkpoint, tmp_path)[0].paths
    path.write_text("mine")
    with pytest.raises(OutputError, match="nothing is overwritten") as caught:
        _run(checkpoint, tmp_path, REQUESTS)
    assert caught.value.reasons == ("tiny-F16.gguf exists",)
    assert path.read_text() == "mine"
    _run(checkpoint, tmp_path, force=True)
    assert open_gguf(path).config == checkpoint.config


def test_too_little_room_is_said_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OutputError, match=r"not enough room on the disk: \d\.\d\d GB needed, 0\.00 GB"
    ) as caught:
        _run(checkpoint, tmp_path / "a" / "b", REQUESTS)
    assert str(tmp_path / "a" / "b") in caught.value.message
    assert not (tmp_path / "a").exists()


def _failing_write(code: int, after: int) -> Callable[..., int]:
    calls, write = [0], os.pwrite

    def pwrite(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(code, os.strerror(code))
        return write(*arguments)

    return pwrite


@pytest.mark.parametrize(
    ("code", "cause"),
    [(28, "the disk is full"), (122, "quota"), (30, "read-only"), (5, "Input/output error")],
)
def test_a_disk_that_fails_in_the_middle_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _failing_write(code, after=9))
        with pytest.raises(OutputError, match=cause):
            _run(checkpoint, tmp_path / "out", REQUESTS)
    assert _files(tmp_path / "out") == []
    assert len(_run(checkpoint, tmp_path / "out", REQUESTS)) == len(REQUESTS)


def test_a_rename_that_fails_takes_the_others_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def failing(source: Path, target: Path) -> Path:
        if "00001-of" in target.name:
            raise OSError(5, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        _run(checkpoint, tmp_path / "out", split_max_bytes=500_000)
    assert _files(tmp_path / "out") == []


def test_a_folder_that_cannot_be_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        _run(checkpoint, tmp_path / "file" / "out")


# --- runs that are cut short


def _interrupt(event: TensorDone) -> NoReturn:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_only_what_the_next_can_use(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(hidden_size=256, intermediate_size=512))
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, REQUESTS, ConvertOptions(tmp_path / "out"), _interrupt)
    partial = "tiny-Q4_K_M.gguf.partial"
    assert _files(tmp_path / "out") == [partial, f"{partial}.journal"]


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from converters import pipeline
from converters.checkpoint import open_checkpoint
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
source, folder, way = sys.argv[1:]
def stop(event):
    if way == "kill" and event.n_done > event.n_total // 3:
        os.kill(os.getpid(), signal.SIGKILL)
if way == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
if way == "full":
    pipeline.check_room = lambda *_: None
requests = [Request("gguf", "F16"), Request("gguf", "Q8_0")]
convert(open_checkpoint(source), requests, ConvertOptions(Path(folder)), stop)
"""


def _in_child(*command: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _convert_in_child(source: Path, folder: Path, way: str) -> "subprocess.CompletedProcess[str]":
    return _in_child(sys.executable, "-c", CHILD, str(source), str(folder), way)


def _convert_on_a_disk(
    source: Path, folder: Path, way: str, mount: str
) -> "subprocess.CompletedProcess[str]":
    """Convert onto a small file system of its own, in a mount namespace that ends with the child."""
    if _in_child("unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt").returncode:
        pytest.skip("mounting in a user namespace is not permitted here")
    folder.mkdir()
    script = 'mount -t tmpfs -o "$5" tmpfs "$3" && cd "$3" && "$0" -c "$1" "$2" "$3" "$4"; ls -A "$3"'
    arguments = (sys.executable, CHILD, str(source), str(folder), way, mount)
    return _in_child("unshare", "-rm", "sh", "-c", script, *arguments)


@pytest.mark.parametrize(
    ("way", "mount", "cause"),
    [
        ("", "size=300k", "not enough room on the disk"),
        ("full", "size=300k", "the disk is full"),
        ("", "ro", "the file system is read-only"),
    ],
)
def test_a_full_or_read_only_disk(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, way: str, mount: str, cause: str
) -> None:
    child = _convert_on_a_disk(make_checkpoint(), tmp_path / "out", way, mount)
    assert f"OutputError: {tmp_path / 'out'}" in child.stderr
    assert cause in child.stderr
    assert child.stdout == ""  # what `ls` found


def test_a_killed_run_leaves_no_final_name_and_the_next_one_succeeds(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, source = tmp_path / "out", make_checkpoint()
    assert _convert_in_child(source, folder, "kill").returncode == -signal.SIGKILL
    assert _files(folder) == ["tiny-F16.gguf.partial", "tiny-Q8_0.gguf.partial"]
    written = _run(open_checkpoint(source), folder, [Request("gguf", "F16"), Request("gguf", "Q8_0")])
    assert _files(folder) == ["tiny-F16.gguf", "tiny-Q8_0.gguf"]
    assert [path.stat().st_size for one in written for path in one.paths] == [w.plan.n_bytes for w in written]


def test_a_size_limit_of_the_system_is_an_output_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    child = _convert_in_child(make_checkpoint(), tmp_path / "out", "limit")
    assert "OutputError" in child.stderr
    assert "files this large are not allowed there" in child.stderr
    assert _files(tmp_path / "out") == []


def test_two_runs_do_not_write_the_same_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = PartialFile(tmp_path / "tiny-F16.gguf", 10)
    with pytest.raises(OutputError, match="another run is writing this file"):
        _run(checkpoint, tmp_path)
    other.abandon()
    assert _run(checkpoint, tmp_path)


# --- what travels along


def test_licence_and_notice_travel_and_nothing_of_the_users_is_overwritten(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, folder = make_checkpoint(), tmp_path / "out"
    for name in ("LICENSE-MODEL", "NOTICE", "README.md"):
        (source / name).write_text(f"{name} of the model")
    folder.mkdir()
    (folder / "NOTICE").write_text("somebody else's")
    checkpoint = open_checkpoint(source)
    _run(checkpoint, folder)
    _run(checkpoint, folder, [Request("gguf", "Q8_0")])
    texts = {name: (folder / name).read_text() for name in _files(folder) if not name.endswith(".gguf")}
    assert texts == {
        "LICENSE-MODEL": "LICENSE-MODEL of the model",
        "NOTICE": "somebody else's",
        "tiny-NOTICE": "NOTICE of the model",
    }


@pytest.mark.runtime
def test_llama_cpp_computes_the_same_from_a_split_export(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (whole,) = _run(checkpoint, tmp_path / "whole")
    (split,) = _run(checkpoint, tmp_path / "split", split_max_bytes=whole.plan.n_bytes * 2 // 3)
    logits = []
    for written in (whole, split):
        with LlamaCpp().open(written.paths[0], n_ctx=64, n_threads=1) as session:
            logits.append(np.concatenate([block for _, block in session.logits([1, 5, 9, 40])]))
    assert logits[0].shape == (4, checkpoint.config.vocab_size)
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_licence_that_cannot_be_read_is_said_before_any_work(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    licence = folder / "LICENSE"
    licence.write_text("free", "utf-8")
    checkpoint = open_checkpoint(folder)
    licence.unlink()
    licence.mkdir()
    with pytest.raises(CheckpointError, match="LICENSE: cannot be read: Is a directory"):
        _run(checkpoint, tmp_path / "out")
    assert _files(tmp_path / "out") == []


@pytest.mark.parametrize("force", [False, True])
def test_names_too_long_for_the_disk(make_checkpoint: MakeCheckpoint, tmp_path: Path, force: bool) -> None:
    checkpoint = open_checkpoint(make_checkpoint(), name="n" * 300)
    # Only in a folder that is there does the kernel get as far as the name.
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        _run(checkpoint, tmp_path / "out", force=force)
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        _run(checkpoint, tmp_path / ("o" * 300), force=force)
