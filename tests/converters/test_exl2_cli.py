"""`dscq convert --to exl2:`, `verify` and `inspect` as a user runs them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.bounds import bound_of
from converters.corpus import rows
from converters.pipeline import convert
from converters.plan import Request
from converters.proof.record import Proof, ProofOptions
from converters.verify import verify
from quantize.errors import UsageError
from quantize.layout_errors import predict
from tests.converters.exl2_model import Model

Run = Callable[..., Any]
UP = "model.layers.0.mlp.up_proj"
SHORT = ("--probe-tokens", 64, "--threads", 1)


@pytest.fixture(scope="module")
def made(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = model.options(tmp_path_factory.mktemp("out"))
    return convert(model.checkpoint, [Request("exl2", "4.25")], options)[0].place


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def prove(folder: Path, model: Model, **options: Any) -> Proof:
    return verify(folder, model.checkpoint, ProofOptions(n_tokens=128, n_threads=1, **options))


def failed(proof: Proof) -> set[str]:
    return {f"{check.layer}: {check.name}" for check in proof.failures}


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "output.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_everything_missing_is_made_first_and_serves_the_next_size(
    model: Model, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(rows.CorpusOptions, n_rows=4, length=96, n_long=0)
    monkeypatch.setattr(rows, "CorpusOptions", few)
    monkeypatch.setattr("converters.exl2_measure.predict", partial(predict, rows=4))
    out = tmp_path / "out"
    common = ("convert", model.source, "-o", out, "--effort", "fast")
    done = run(*common, "--to", "exl2:4.25", *SHORT)
    assert done.code == 0, done.err
    assert "calibrating: statistics on the built-in text" in done.err
    assert f"measuring: what each layout costs, once for all sizes, in {out / 'measurement.json'}" in done.err
    assert "unproven in the runtime: needs a CUDA GPU" in done.out
    sizes = ("--to", "exl2:3,h8", "--to", "exl2:6", "--to", "gguf:Q4_0")
    again = run(*common, *sizes, "--stats", out / "stats", "--json", "--no-proof")
    assert again.code == 0, again.err
    assert "measuring" not in again.err
    assert (out / "exl2-3-h8" / "output.safetensors").is_file()
    assert [path.name for path in out.glob("*.gguf")] == ["demo-block-Q4_0.gguf"]


def test_a_measurement_of_another_archive_is_not_overwritten(model: Model, tmp_path: Path, run: Run) -> None:
    document = json.loads(model.file.read_text("ascii")) | {"key": "0" * 64}
    (tmp_path / "measurement.json").write_text(json.dumps(document), "ascii")
    common = ("convert", model.source, "--to", "exl2:4", "-o", tmp_path, "--stats", model.archive.folder)
    done = run(*common, "--no-proof")
    assert (done.code, "measured on another model" in done.err) == (1, True)
    assert "or measure anew with --force" in done.err
    given = run(*common, "--no-proof", "--measurement", tmp_path / "measurement.json")
    assert (given.code, "measured on another model" in given.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measurement.json"]


def test_a_given_measurement_is_used(model: Model, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    common = ("convert", model.source, "--to", "exl2:4", "-o", out, "--measurement", model.file)
    done = run(*common, "--stats", model.archive.folder, "--no-proof", "--effort", "fast")
    assert (done.code, "measuring" in done.err) == (0, False)
    assert sorted(path.name for path in out.iterdir()) == ["exl2-4"]


def test_a_dry_run_says_what_is_missing(model: Model, tmp_path: Path, run: Run) -> None:
    common = ("convert", model.source, "--to", "exl2:3.5", "-o", tmp_path / "out", "--dry-run")
    done = run(*common)
    assert done.code == 0, done.err
    assert "nothing is measured yet: sizes are as the budget says, layouts will be others" in done.out
    done = run(*common, "--measurement", model.file, "--stats", model.archive.folder)
    assert "predicted KL divergence of these linears, roughly:" in done.out
    assert "by the budget, predicted error" in done.out.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "gptq:4bit-32g", "--measurement", __file__), "--measurement: only for exl2:"),
        (("--to", "exl2:4", "--tp", "2"), "--tp: only for gptq:"),
        (("--to", "exl2:4", "--pure"), "--pure: only for gguf:"),
        (("--to", "exl2:4", "--tensor-type", "down=4bit-32g"), "a type of gptq:, which is not asked for"),
        (("--to", "exl2:1"), "expected bits per weight, 2.3 to 8"),
        (("--to", "exl2"), "--to exl2: the type is missing"),
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(
    model: Model, tmp_path: Path, run: Run, options: tuple[str, ...], message: str
) -> None:
    done = run("convert", model.source, "-o", tmp_path / "out", *options)
    assert (done.code, message in done.err) == (2, True)


def test_a_runtime_that_is_required_is_missed_before_the_work(
    model: Model, made: Path, tmp_path: Path, run: Run
) -> None:
    common = ("convert", model.source, "--to", "exl2:4", "-o", tmp_path, "--stats", model.archive.folder)
    done = run(*common, "--require-proof")
    assert (done.code, "needs a CUDA GPU" in done.err) == (3, True)
    assert list(tmp_path.iterdir()) == []
    assert failed(prove(made, model, require_runtime=True)) == {"runtime: installed"}


def test_a_good_folder_passes(model: Model, made: Path) -> None:
    proof = prove(made, model)
    assert proof.failures == ()
    assert (proof.runtime.status, proof.runtime.hint) == ("unproven in the runtime", "needs a CUDA GPU")
    assert proof.quant_types["F16"] == 1 and proof.quant_types["EXL2-8/6bit"] >= 1
    assert sum(proof.quant_types.values()) == 9


def test_a_folder_without_the_rope_factor_exits_3(model: Model, folder: Path, run: Run) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    done = run("verify", folder, "--reference", model.source, *SHORT)
    assert done.code == 3
    assert "metadata: rope_factor: the file says 1.0, the checkpoint 4.0" in done.err
    assert (folder.parent / "exl2-4.25.verify.report.json").is_file()


def test_what_is_wrong_with_a_tensor_is_named(model: Model, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.q_invperm"].copy_(torch.arange(256)))
    assert "tensors: gain" in failed(prove(folder, model))


def test_one_turned_block_is_found(model: Model, folder: Path) -> None:
    """All bits of one output's first group turned: its codes are mirrored, whatever their width."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        height = int(tensors[f"{UP}.q_groups"][3])
        tensors[f"{UP}.q_weight"][:height, 7].bitwise_not_()

    edit_tensors(folder, turn)
    [check] = [check for check in prove(folder, model).failures if "blocks" in check.name]
    assert f"{UP}.weight (EXL2-" in check.detail and "row 7 block 0 is off" in check.detail


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.q_scale"), f"{UP}.q_scale is missing"),
        (lambda t: t[f"{UP}.q_groups"][0:1].fill_(7), "group 0 has 7 bits"),
        (lambda t: t[f"{UP}.q_invperm"][0:1].fill_(300), f"{UP}: q_invperm: not a permutation"),
        (lambda t: t.update({f"{UP}.bias": torch.ones(640).half()}), f"{UP}.bias is not zero"),
        (lambda t: t[f"{UP}.q_scale_max"][1:2].neg_(), f"{UP}.q_scale_max: maxima below zero"),
        (lambda t: t.update({f"{UP}.q_perm": torch.ones(1)}), f"{UP}.q_perm is not part of a Llama"),
        (lambda t: t.update({f"{UP}.q_scale_max": torch.ones(3)}), "expected F16"),
    ],
)
def test_a_folder_that_does_not_open_exits_3(
    model: Model, folder: Path, run: Run, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(folder, edit)
    done = run("verify", folder, "--reference", model.source, *SHORT)
    assert (done.code, message in done.err) == (3, True), done.err


def test_inspect_describes_the_folder(model: Model, folder: Path, run: Run) -> None:
    done = run("inspect", folder, "--json")
    found = json.loads(done.out)
    assert (done.code, found["kind"], found["findings"]) == (0, "EXL2 folder", [])
    assert found["facts"]["quantization"].startswith("EXL2, 4.2")
    assert found["facts"]["head"] == "EXL2-8/6bit"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_scaling"]["rope_type"] = "linear"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (said,) = json.loads(run("inspect", folder, "--json").out)["findings"]
    assert "both type and rope_type: exllamav2 does not load the folder" in said


def test_every_width_has_bounds() -> None:
    for narrowest in (2, 3, 4, 5, 6, 8):
        assert bound_of(f"EXL2-8/{narrowest}bit") == bound_of(f"EXL2-{narrowest}bit")
    with pytest.raises(UsageError, match="no bounds"):
        bound_of("EXL2-7bit")
