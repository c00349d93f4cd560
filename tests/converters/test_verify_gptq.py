"""The proof of a GPTQ folder: good ones pass, and what is wrong with a bad one is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.bounds import bound_of
from converters.checkpoint import open_checkpoint
from converters.gptq_source import open_gptq
from converters.proof.record import Proof, ProofOptions
from converters.runtimes import gptq_readers
from converters.runtimes.gptq_readers import VARIABLE, ReaderAnswer, find_readers
from converters.verify import verify
from quantize.errors import RuntimeFailedError, RuntimeMissingError, UsageError
from quantize.reference import ReferenceModel
from quantize.weights import Weights

MakeFolder = Callable[..., Path]
Run = Callable[..., Any]
READERS = os.environ.get(VARIABLE)
UP = "model.layers.1.mlp.up_proj"


def prove(folder: Path, source: Path, **options: Any) -> Proof:
    return verify(folder, open_checkpoint(source), ProofOptions(n_tokens=128, n_threads=1, **options))


def failed(proof: Proof) -> set[str]:
    return {f"{check.layer}: {check.name}" for check in proof.failures}


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def _no_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine has must not decide what the tests see."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The checkpoint of `make_gptq()`."""
    return tmp_path / "gptq-source"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "desc_act"), [(32, False), (32, True), (0, False)])
def test_a_good_folder_passes_without_readers(
    make_gptq: MakeFolder, source: Path, bits: int, size: int, desc_act: bool
) -> None:
    proof = prove(make_gptq(bits, size, desc_act=desc_act), source)
    assert proof.failures == ()
    assert proof.runtime.status == "unproven in the runtime"
    assert proof.runtime.hint == "scripts/gptq_readers DIR, then --readers DIR"
    assert proof.quant_types == {"F16": 2, f"GPTQ-{bits}bit-{'32g' if size else 'channel'}": 14}
    required = prove(make_gptq(bits, size, desc_act=desc_act, name="again"), source, require_runtime=True)
    assert failed(required) == {"runtime: installed"}


@pytest.mark.parametrize("desc_act", [False, True])
def test_one_flipped_scale_is_found(make_gptq: MakeFolder, source: Path, desc_act: bool) -> None:
    """With desc_act the columns of a scale are scattered, and stand together only for the comparison."""
    folder = make_gptq(8, 32, desc_act=desc_act)
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.scales"][1, 7].neg_())
    proof = prove(folder, source)
    [check] = [check for check in proof.failures if check.name == "blocks within their tensor"]
    assert f"{UP}.weight (GPTQ-8bit-32g): 1 of 192 blocks, row 7 block 1" in check.detail


def test_a_float_that_is_not_the_sources_is_found(make_gptq: MakeFolder, source: Path) -> None:
    folder = make_gptq()
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"][3:4].mul_(1.01))
    assert "tensors: bits of float tensors" in failed(prove(folder, source))


def test_a_version_2_read_as_version_1_is_found(make_gptq: MakeFolder, source: Path) -> None:
    """Every zero-point is one off, which leaves no block alone."""
    folder = make_gptq(4, 32, version="gptq_v2")
    for name in ("config.json", "quantize_config.json"):
        text = (folder / name).read_text("utf-8").replace("gptq_v2", "gptq")
        (folder / name).write_text(text, "utf-8")
    assert failed(prove(folder, source)) == {"tensors: zero-points"}


def test_a_folder_without_the_rope_factor_exits_3(make_gptq: MakeFolder, source: Path, run: Run) -> None:
    folder = make_gptq()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    done = run("verify", folder, "--reference", source, "--probe-tokens", 64, "--threads", 1)
    assert done.code == 3
    assert "metadata: rope_factor: the file says 1.0, the checkpoint 4.0" in done.err
    assert (folder.parent / "gptq.verify.report.json").is_file()
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == []


def test_a_folder_that_does_not_open_exits_3(make_gptq: MakeFolder, source: Path, run: Run) -> None:
    folder = make_gptq()
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.scales"))
    done = run("verify", folder, "--reference", source, "--probe-tokens", 64, "--threads", 1)
    assert (done.code, f"{UP}.scales is missing" in done.err) == (3, True)
    done = run("verify", source, "--reference", source, "--probe-tokens", 64, "--threads", 1)
    assert done.code == 3
    assert "config.json has no quantization_config" in done.err


def test_a_report_never_takes_the_place_of_a_models_file(
    make_gptq: MakeFolder, source: Path, run: Run
) -> None:
    folder = make_gptq()
    for place in (folder / "config.json", folder / "new.safetensors"):
        done = run("verify", folder, "--reference", source, "--report", place)
        assert (done.code, "must not take a model's name" in done.err) == (2, True)


def test_the_terminal_says_what_to_install(make_gptq: MakeFolder, source: Path, run: Run) -> None:
    folder = make_gptq()
    done = run("verify", folder, "--reference", source, "--probe-tokens", 64, "--threads", 1)
    assert done.code == 0
    assert "unproven in the runtime: scripts/gptq_readers DIR, then --readers DIR" in done.out


def test_readers_are_looked_for_before_any_work(tmp_path: Path, make_gptq: MakeFolder, run: Run) -> None:
    with pytest.raises(RuntimeMissingError):
        find_readers(None)
    with pytest.raises(UsageError, match="holds no reader, neither autogptq nor gptqmodel"):
        find_readers(tmp_path)
    folder = make_gptq()
    done = run("verify", folder, "--reference", tmp_path / "gptq-source", "--readers", tmp_path)
    assert (done.code, "scripts/gptq_readers" in done.err) == (2, True)


def with_fake_reader(folder: Path, script: str) -> Path:
    """An environment whose Python is a shell script."""
    python = folder / "readers" / "autogptq" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    python.chmod(0o755)
    installed = python.parents[1] / "lib" / "python3.11" / "site-packages" / "auto_gptq-0.7.1.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    return folder / "readers"


def test_a_reader_that_dies_fails_the_proof_with_its_last_words(
    make_gptq: MakeFolder, source: Path, tmp_path: Path
) -> None:
    folder = make_gptq()
    readers = with_fake_reader(tmp_path, 'echo "ValueError: no such layer" >&2; exit 1')
    proof = prove(folder, source, readers=readers)
    [check] = proof.failures
    assert check.name == "AutoGPTQ runs the folder"
    assert check.detail == "AutoGPTQ ended with status 1: ValueError: no such layer"
    assert proof.runtime.status == "failed"
    [reader] = find_readers(with_fake_reader(tmp_path, "exit 0"))
    with pytest.raises(RuntimeFailedError, match="ended early"):
        gptq_readers.read_with(reader, folder, [[1]], [], tmp_path, 1)


def test_a_reader_with_other_logits_or_ids_fails_the_proof(
    make_gptq: MakeFolder, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, readers = make_gptq(), with_fake_reader(tmp_path, "exit 1")
    tokenizer = open_checkpoint(source).tokenizer
    shift = 0.0

    def answer(_reader: object, path: Path, rows: Any, texts: Any, *_: object) -> ReaderAnswer:
        file = open_gptq(path)
        weights: Weights = file.weights
        model = ReferenceModel(file.config, weights, "cpu")
        hidden = model.hidden([torch.tensor(row) for row in rows])
        logits = torch.cat([model.logits(h) for h in hidden]).numpy()
        logits[:, 5] += shift
        ids = [tokenizer.encode(text)[1 if shift else 0 :] for text in texts]
        eos = tokenizer.vocabulary.eos_id if not shift else 3
        made = tuple(tuple(each) for each in ids)
        return ReaderAnswer("1", "torch.float32", made, tokenizer.vocabulary.bos_id, eos, np.asarray(logits))

    monkeypatch.setattr("converters.proof.readers.read_with", answer)
    proof = prove(folder, source, readers=readers)
    assert proof.failures == ()
    assert (proof.runtime.status, proof.runtime.version) == ("proven", "AutoGPTQ (1, float32)")
    shift = 4.0
    assert failed(prove(folder, source, readers=readers)) == {
        "runtime: token ids in AutoGPTQ",
        "runtime: bos and eos in AutoGPTQ",
        "runtime: mean KL file -> AutoGPTQ",
    }


def test_a_reader_that_cannot_judge_a_folder_is_left_out(
    make_gptq: MakeFolder, source: Path, tmp_path: Path
) -> None:
    proof = prove(make_gptq(version="gptq_v2"), source, readers=with_fake_reader(tmp_path, "exit 1"))
    assert proof.failures == ()
    assert proof.runtime.status == "unproven in the runtime"
    assert proof.runtime.hint == "AutoGPTQ left out: it knows no gptq_v2"


def test_every_bit_count_has_bounds() -> None:
    for bits in (2, 3, 4, 8):
        assert bound_of(f"GPTQ-{bits}bit-128g") == bound_of(f"GPTQ-{bits}bit-channel")
    with pytest.raises(UsageError, match="no bounds"):
        bound_of("GPTQ-5bit-128g")


@pytest.mark.skipif(READERS is None, reason=f"{VARIABLE}: scripts/gptq_readers DIR")
def test_the_real_readers_prove_a_folder(make_gptq: MakeFolder, demo_folder: Path) -> None:
    folder = make_gptq(4, 64, source=demo_folder)
    with_plain_tokenizer(folder)
    proof = prove(folder, demo_folder, readers=Path(READERS or ""))
    assert proof.failures == ()
    assert proof.runtime.status == "proven"
    by_pair = {figure.pair: figure.divergence.mean for figure in proof.figures}
    assert by_pair["file -> AutoGPTQ"] < 1e-9
    assert 0 < by_pair["file -> GPTQModel"] < 1e-3


def with_plain_tokenizer(folder: Path) -> None:
    """Make the tokenizer one that both versions of transformers load as it is, BOS in tokenizer.json."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings), "utf-8")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    bos_id = json.loads((folder / "config.json").read_text("utf-8"))["bos_token_id"]
    bos = next(token["content"] for token in content["added_tokens"] if token["id"] == bos_id)
    front, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [front, text],
        "pair": [front, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": known,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
