"""EXL2 folders as they are written: bits, budget, threads, interruptions, what was there before."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import stream
from converters.checkpoint import open_checkpoint
from converters.exl2_measurement import DAMP, nominal
from converters.exl2_source import linear_of, open_exl2
from converters.hessians import first_tokens_of
from converters.pipeline import convert, mark_failed, plan_exports, reread_hashes
from converters.places import Piece
from converters.plan import ConvertOptions, Request, Written
from converters.targets import parse_request
from converters.targets.exl2_types import budget_of, choose, n_weights, parse_layout
from quantize.codecs.exl2 import Exl2Tensors, decode
from quantize.errors import ArchiveError, CheckpointError, OutputError, PlanError
from quantize.llama import HEAD
from quantize.solver.exl2 import quantize_exl2
from tests.converters.exl2_model import Model
from tests.quantize.exl2_reader import read
from tests.quantize.exl2_runtime import VARIABLE, Runtime

SIZE = Request("exl2", "3.5")
UP = "model.layers.0.mlp.up_proj"
PARTS = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")


@pytest.fixture(scope="module")
def written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return run(model, tmp_path_factory.mktemp("out"))


def run(model: Model, folder: Path, *requests: Request, **options: Any) -> Written:
    return convert(model.checkpoint, requests or [SIZE], model.options(folder, **options))[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def linear(tensors: dict[str, torch.Tensor], module: str) -> Exl2Tensors:
    return Exl2Tensors(*(tensors[f"{module}.{part}"] for part in PARTS))


def test_an_output_matrix_that_takes_long_stops_nobody(model: Model) -> None:
    """It is begun first, and the others, more than the queue holds, are written meanwhile."""
    plan = plan_exports(model.checkpoint, [SIZE], model.options(Path()))[0]
    others, began = threading.Semaphore(0), list[str]()

    class Slow:
        def put(self, name: str, first_row: int, rows: torch.Tensor) -> Piece:
            began.append(name)
            if name == HEAD:
                assert all(others.acquire(timeout=30) for _ in range(len(plan.tensors) - 1))
            else:
                others.release()
            return Piece((), "")

    done: list[str] = []
    export, options = stream.Export(plan, Slow()), model.options(Path(), n_threads=2)  # type: ignore[arg-type]
    pieces = stream.stream(model.checkpoint.weights, [export], options, lambda each: done.append(each.name))
    assert HEAD in began[:2] and done[0] == HEAD  # of two threads the second may be the quicker
    assert sorted(done) == sorted(plan.by_name) and all(len(each) == 1 for each in pieces[0].values())


def test_the_folder_holds_what_the_solver_finds(model: Model, written: Written) -> None:
    tensors = load_file(written.place / "output.safetensors")
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    for together in (names, [HEAD]):
        weights = {name: model.checkpoint.weights.load(name).float() for name in together}
        H = model.archive.statistics(together[0]).hessian
        assert H is not None
        damp = DAMP
        if together == names:
            first = first_tokens_of(model.checkpoint, model.archive)
            H, damp_scale = first.strengthen(H, 0, "mlp_input", model.archive.manifest.n_tokens)
            damp *= damp_scale
        layouts = {name: parse_layout(written.plan.by_name[name].quant) for name in together}
        for name, found in quantize_exl2(weights, H, layouts, "fast", damp).items():
            stored = decode(linear(tensors, name.removesuffix(".weight")), len(weights[name]))
            assert torch.equal(stored, found.linear.weights())
    embedding = model.checkpoint.weights.load("model.embed_tokens.weight")
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding.half())
    assert len(tensors) == 5 * 8 + 4
    assert reread_hashes(written).differing == ()


def test_a_second_reader_sees_the_same_weights(written: Written) -> None:
    """Plain Python over the file's own numbers; the permutation is none that changes nothing."""
    folder = open_exl2(written.place)
    name = "model.layers.0.self_attn.k_proj.weight"
    stored = linear_of(folder.weights.stored, name)
    n = folder.weights.shapes[name][0]
    maxima = [bits & 0xFFFF for bits in stored.q_scale_max.view(torch.int16).tolist()]
    words, scales = stored.q_weight.tolist(), stored.q_scale.tolist()
    rows = read(words, stored.q_invperm.tolist(), scales, maxima, stored.q_groups.tolist(), n)
    assert torch.equal(torch.tensor(rows), folder.weights.load(name))
    assert stored.q_invperm.tolist() != sorted(stored.q_invperm.tolist())


@pytest.mark.parametrize("bits", ["2.7", "3", "3.4375", "4.25", "5.5", "6.5625", "8"])
def test_a_folder_is_never_above_its_budget(model: Model, tmp_path: Path, bits: str) -> None:
    """Nor much below it; what counts are the bytes of the linears' tensors."""
    request, config = parse_request(f"exl2:{bits}"), model.checkpoint.config
    (plan,) = plan_exports(model.checkpoint, [request], model.options(tmp_path))
    used = sum(8 * t.n_bytes for t in plan.tensors if ".layers." in t.name and t.compensated)
    assert 0.98 * float(bits) * n_weights(config) < used <= float(bits) * n_weights(config)
    (other,) = plan_exports(
        model.checkpoint, [request], replace(model.options(tmp_path), measurement=None, archive=None)
    )
    assert abs(other.n_bytes - plan.n_bytes) < 0.03 * plan.n_bytes
    assert any("nothing is measured yet" in note for note in other.notes)


def test_more_bits_lose_less(model: Model) -> None:
    config = model.checkpoint.config
    sizes = [Fraction(bits) for bits in ("2.7", "3.5", "4.25", "5.5", "8")]
    found = [choose(config, model.measurement, bits, 6) for bits in sizes]
    assert all(one.loss > other.loss > 0 for one, other in pairwise(found))
    assert all(one.bits <= budget_of(config, bits) for one, bits in zip(found, sizes, strict=True))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_bytes_do_not_depend_on_threads(
    model: Model, written: Written, tmp_path: Path, n_threads: int
) -> None:
    assert contents(run(model, tmp_path, n_threads=n_threads).place) == contents(written.place)


def test_an_interrupted_run_goes_on(model: Model, written: Written, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(event: stream.TensorDone) -> None:
        if event.name == f"{UP}.weight":
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(model.checkpoint, [SIZE], model.options(tmp_path), stop)
    assert not (tmp_path / "exl2-3.5").exists()
    resumed = run(model, tmp_path)
    assert contents(resumed.place) == contents(written.place)
    assert resumed.n_tensors_reused >= 6 and written.n_reused == 0
    changed = run(model, tmp_path, force=True, effort="default")
    assert changed.n_reused == 0 and contents(changed.place) != contents(written.place)


def test_a_folder_is_replaced_as_a_whole(model: Model, tmp_path: Path) -> None:
    first = run(model, tmp_path)
    with pytest.raises(OutputError, match="nothing is overwritten"):
        run(model, tmp_path)
    (first.place / "model.safetensors.index.json").write_bytes(b"stale")
    again = run(model, tmp_path, force=True)
    assert set(contents(again.place)) == {file.name for file in again.plan.files}
    (failed,) = mark_failed(again)
    assert failed.name == "exl2-3.5.failed" and not again.place.exists()


def test_the_config_is_as_exllamav2_reads_it(model: Model, written: Written) -> None:
    config = json.loads((written.place / "config.json").read_text())
    assert config["rope_theta"] == 100000 and config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert "rope_parameters" not in config
    stated = config["quantization_config"]
    assert (stated["quant_method"], stated["bits"], stated["head_bits"]) == ("exl2", 3.5, 6)
    assert stated["calibration"] == {"rows": 6, "length": 160, "dataset": "random"}
    assert not list(written.place.glob("*.index.json"))


def test_every_limit_is_named_by_tensor(model: Model, tmp_path: Path, make_checkpoint: Any) -> None:
    odd = open_checkpoint(make_checkpoint("odd", intermediate_size=80))
    with pytest.raises(PlanError) as caught:
        plan_exports(odd, [SIZE], ConvertOptions(tmp_path))
    assert sorted(caught.value.reasons) == [
        f"exl2:3.5: model.layers.{layer}.mlp.down_proj.weight: 80 inputs: a multiple of 32 is expected"
        for layer in (0, 1)
    ]
    tied = open_checkpoint(
        make_checkpoint("tied", tie_word_embeddings=True, edit=lambda tensors: tensors.pop(HEAD, None))
    )
    with pytest.raises(PlanError, match=r"lm_head\.weight is tied to the embedding"):
        plan_exports(tied, [SIZE], ConvertOptions(tmp_path))
    with pytest.raises(PlanError, match=r"2.3 bits per weight: this model takes 2\.\d+ at the least"):
        plan_exports(model.checkpoint, [Request("exl2", "2.3")], model.options(tmp_path))


def test_without_hessians_or_measurement_nothing_is_written(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="needs a statistics archive"):
        convert(model.checkpoint, [SIZE], ConvertOptions(tmp_path))
    with pytest.raises(ArchiveError, match="needs a measurement"):
        convert(model.checkpoint, [SIZE], model.options(tmp_path, measurement=None))
    assert nominal(model.checkpoint.config).gathered_by == ""


def test_weights_that_are_not_finite_are_refused(model: Model, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    shutil.copytree(model.source, source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{UP}.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        convert(open_checkpoint(source), [SIZE], model.options(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


def exllamav2() -> Path:
    package = os.environ.get(VARIABLE)
    if not package:
        pytest.skip(f"{VARIABLE} names no package of ExLlamaV2 (scripts/exllamav2_sources fetches it)")
    return Path(package)


def test_exllamav2s_own_code_sees_the_same_weights(written: Written, tmp_path: Path) -> None:
    """Its loader and its dequantization, compiled for the CPU, over every linear of the folder."""
    package = exllamav2()
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile ExLlamaV2's kernels with")
    runtime, folder = Runtime(package, tmp_path), open_exl2(written.place)
    assert len(folder.weights.groups) == 8
    for name in folder.weights.groups:
        theirs = runtime.weights(linear_of(folder.weights.stored, name))
        ours = folder.weights.load(name)
        assert torch.equal(theirs[: len(ours)].float(), ours), name


def test_exllamav2s_own_config_reader_takes_the_folder(written: Written) -> None:
    """Its CUDA extension is stood in for by an empty module: the reader is plain Python."""
    code = (
        "import json, sys, types; sys.modules['exllamav2_ext'] = types.ModuleType('exllamav2_ext'); "
        "sys.path.insert(0, sys.argv[1]); from exllamav2.config import ExLlamaV2Config; "
        "c = ExLlamaV2Config(sys.argv[2]); print(json.dumps([c.rotary_embedding_base, c.scale_pos_emb, "
        "c.max_seq_len, c.bos_token_id, c.eos_token_id, sorted(c.tensor_file_map)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, exllamav2().parent, written.place],
        capture_output=True,
        text=True,
        check=True,
    )
    *figures, names = json.loads(done.stdout.splitlines()[-1])
    assert figures == [100000.0, 4.0, 16384, 2213, 2221]
    assert names == sorted(load_file(written.place / "output.safetensors"))
