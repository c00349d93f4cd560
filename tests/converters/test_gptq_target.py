"""GPTQ folders as they are written: bytes, threads, interruptions, what was there before."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters import stream
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.hessians import first_tokens_of
from converters.pipeline import convert, mark_failed, plan_exports, reread_hashes
from converters.plan import ConvertOptions, Request, Written
from converters.stats.archive import Archive, open_archive
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from converters.targets import parse_request
from converters.targets.gptq import module_specs
from converters.targets.gptq_spec import GptqSpec
from quantize.codecs.gptq import VERSIONS, dequantize
from quantize.errors import ArchiveError, OutputError, PlanError
from quantize.llama import block_tensor
from quantize.reference import INPUTS
from quantize.solver.linears import quantize_linears

G32 = Request("gptq", "4bit-32g")


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor
    kind: str = "completion"


@pytest.fixture(scope="module")
def checkpoint(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


@pytest.fixture(scope="module")
def archive(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    generator = torch.Generator().manual_seed(1)
    rows = [Row(torch.randint(0, 2300, (160,), generator=generator)) for _ in range(6)]
    folder = tmp_path_factory.mktemp("stats")
    return calibrate_checkpoint(checkpoint, rows, {"name": "random"}, CalibrateOptions(folder))


def run(
    checkpoint: Checkpoint, archive: Archive, folder: Path, *requests: Request, **options: object
) -> Written:
    chosen = ConvertOptions(folder, archive=archive, hash_tensors=True, **options)  # type: ignore[arg-type]
    return convert(checkpoint, requests or [G32], chosen)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("quant", ["4bit-32g", "3bit-64g,asym", "8bit--1g,desc_act", "2bit-32g,asym,v2"])
def test_the_folder_holds_what_the_solver_finds(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path, quant: str
) -> None:
    request = parse_request(f"gptq:{quant}")
    written = run(checkpoint, archive, tmp_path, request)
    config = json.loads((written.place / "quantize_config.json").read_text())
    tensors = load_file(written.place / "model.safetensors")
    spec, layer = written.plan.directory, 2
    assert spec == "gptq-" + quant.replace(",", "-")
    weights = {
        name: checkpoint.weights.load(block_tensor(layer, name)).float()
        for name in ("mlp.up_proj", "mlp.gate_proj")
    }
    H = archive.statistics(block_tensor(layer, "mlp.up_proj")).hessian
    assert H is not None
    first = first_tokens_of(checkpoint, archive)
    H, damp_scale = first.strengthen(H, layer, "mlp_input", archive.manifest.n_tokens)
    assert damp_scale < 1
    settings = GptqSpec(config["bits"], config["group_size"], config["desc_act"], config["sym"]).settings(
        "default"
    )
    settings = replace(settings, damp=settings.damp * damp_scale)
    for name, found in quantize_linears(weights, H, settings).items():
        qweight, qzeros, scales, g_idx = (
            tensors[f"model.layers.{layer}.{name}.{part}"]
            for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        version = VERSIONS[config["checkpoint_format"]]
        stored = dequantize(qweight, qzeros, scales, g_idx, config["bits"], version)
        assert torch.equal(stored, found.weights())
    head = checkpoint.weights.load("lm_head.weight")
    assert torch.equal(tensors["lm_head.weight"], head.half())
    quantized = {block_tensor(i, name) for i in range(checkpoint.config.n_layers) for name in INPUTS}
    assert len(tensors) == 4 * len(quantized) + len(checkpoint.config.tensor_shapes()) - len(quantized)
    assert reread_hashes(written).differing == ()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_bytes_do_not_depend_on_threads(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path, n_threads: int
) -> None:
    one = run(checkpoint, archive, tmp_path / "one", n_threads=2)
    other = run(checkpoint, archive, tmp_path / "other", n_threads=n_threads)
    assert contents(one.place) == contents(other.place)
    assert list(tmp_path.glob("one/*.partial")) == []


def test_an_interrupted_run_goes_on(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(checkpoint, archive, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(event: stream.TensorDone) -> None:
        if event.name == block_tensor(2, "mlp.up_proj"):
            raise StoppedError

    options = ConvertOptions(tmp_path / "out", archive=archive, hash_tensors=True)
    with pytest.raises(StoppedError):
        convert(checkpoint, [G32], options, stop)
    assert not (tmp_path / "out" / "gptq-4bit-32g").exists()
    resumed = run(checkpoint, archive, tmp_path / "out")
    assert contents(resumed.place) == contents(whole.place)
    assert 0.2 * resumed.plan.n_bytes < resumed.n_reused < resumed.plan.n_bytes
    assert resumed.n_tensors_reused > 14 and whole.n_reused == 0
    changed = run(checkpoint, archive, tmp_path / "out", force=True, effort="fast")
    assert changed.n_reused == 0 and contents(changed.place) != contents(whole.place)


def test_slices_of_a_linear_make_one_matrix(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(run(checkpoint, archive, tmp_path / "whole").place / "model.safetensors")
    monkeypatch.setattr(stream, "SLICE_ELEMENTS", 40 * checkpoint.config.hidden_size)
    written = run(checkpoint, archive, tmp_path / "sliced")
    assert reread_hashes(written).differing == ()
    sliced = load_file(written.place / "model.safetensors")
    for name, tensor in whole.items():
        # A product of fewer rows may sum in another order: near-ties fall to either side.
        assert float((tensor != sliced[name]).float().mean()) < 0.01, name


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path
) -> None:
    first = run(checkpoint, archive, tmp_path)
    with pytest.raises(OutputError, match="nothing is overwritten"):
        run(checkpoint, archive, tmp_path)
    (first.place / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    again = run(checkpoint, archive, tmp_path, force=True)
    assert set(contents(again.place)) == {file.name for file in again.plan.files}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["gptq-4bit-32g"]
    (failed,) = mark_failed(again)
    assert failed.name == "gptq-4bit-32g.failed" and not again.place.exists()


def test_a_folder_that_is_no_export_is_never_replaced(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path
) -> None:
    (tmp_path / "gptq-4bit-32g").mkdir()
    (tmp_path / "gptq-4bit-32g" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="not made by a conversion"):
        run(checkpoint, archive, tmp_path, force=True)


def test_overrides_are_rules_for_the_readers(
    checkpoint: Checkpoint, archive: Archive, tmp_path: Path
) -> None:
    rules = (("down_proj", "8bit-32g"), ("layers.0.", "3bit-32g"))
    written = run(checkpoint, archive, tmp_path, module_bits=rules)
    specs = module_specs(checkpoint.config, GptqSpec(4, 32), ConvertOptions(tmp_path, module_bits=rules))
    assert [
        specs[f"model.layers.{name}_proj.weight"].bits for name in ("0.mlp.down", "0.mlp.up", "1.mlp.up")
    ] == [8, 3, 4]
    config = json.loads((written.place / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {
        "+:.*(?:down_proj)": {"bits": 8, "group_size": 32},
        "+:.*(?:layers.0.)": {"bits": 3, "group_size": 32},
    }
    with pytest.raises(PlanError, match="no linear of a decoder block"):
        plan_exports(checkpoint, [G32], ConvertOptions(tmp_path, module_bits=(("head", "8bit-32g"),)))


def test_gpus_that_cannot_share_a_model_are_refused_before_the_work(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(
        PlanError, match=r"--tp 4: down_proj: 640 / 4 = 160 columns are no multiple of the group"
    ):
        plan_exports(checkpoint, [Request("gptq", "4bit-64g")], ConvertOptions(tmp_path, tensor_parallel=4))
    (plan,) = plan_exports(checkpoint, [G32], ConvertOptions(tmp_path, tensor_parallel=2))
    assert ("vLLM gptq", "loads") in [reader[:2] for reader in plan.readers]


def test_without_hessians_there_is_no_gptq(checkpoint: Checkpoint, archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="needs a statistics archive"):
        convert(checkpoint, [G32], ConvertOptions(tmp_path))
    request = archive.manifest.request
    manifest = replace(
        archive.manifest, request=replace(request, options={**request.options, "diagonal_only": True})
    )
    with pytest.raises(ArchiveError, match="holds diagonals alone"):
        run(checkpoint, replace(archive, manifest=manifest), tmp_path)


def test_gguf_and_gptq_come_from_one_read(checkpoint: Checkpoint, archive: Archive, tmp_path: Path) -> None:
    options = ConvertOptions(tmp_path / "both", archive=archive)
    both = convert(checkpoint, [G32, Request("gguf", "Q8_0")], options)
    alone = run(checkpoint, archive, tmp_path / "alone")
    assert [one.place.name for one in both] == ["gptq-4bit-32g", "demo-coder-Q8_0.gguf"]
    assert contents(both[0].place) == contents(alone.place)
    assert open_archive(archive.folder).folder == archive.folder
