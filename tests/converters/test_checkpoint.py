"""Opening a checkpoint: every kind of folder, every refusal, all reasons at once."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
from quantize.errors import CheckpointError, DscqError, TokenizerError, UsageError
from quantize.llama import EMBEDDING, HEAD

MakeCheckpoint = Callable[..., Path]


def refusal(source: Path | str, **options: Any) -> DscqError:
    with pytest.raises(DscqError) as caught:
        open_checkpoint(source, **options)
    return caught.value


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit that removes one tensor."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return edit


def all_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.weights.load(name) for name in checkpoint.weights.specs()}


def assert_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def split(folder: Path, n_shards: int, *, index: bool = True) -> dict[str, torch.Tensor]:
    """Turn model.safetensors into several shards; return all tensors."""
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::n_shards]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return tensors


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folder_opens(make_checkpoint: MakeCheckpoint, dtype: torch.dtype) -> None:
    folder = make_checkpoint("my-model", dtype)
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.weights.specs()) == list(checkpoint.config.tensor_shapes())
    assert_same(all_weights(checkpoint), load_file(folder / "model.safetensors"))
    assert (checkpoint.provenance.name, checkpoint.provenance.source) == ("my-model", "my-model")
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("def f():", add_bos=False)) == "def f():"
    assert checkpoint.notes == ()


@pytest.mark.parametrize("index", [True, False])
def test_many_shards_with_and_without_an_index(make_checkpoint: MakeCheckpoint, index: bool) -> None:
    folder = make_checkpoint()
    tensors = split(folder, 3, index=index)
    assert_same(all_weights(open_checkpoint(folder)), tensors)


@pytest.mark.parametrize("sharded", [True, False])
def test_bin_folders(make_checkpoint: MakeCheckpoint, sharded: bool) -> None:
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
        parts = [dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, folder / name)
        weight_map = {n: shard for shard, part in zip(names, parts, strict=True) for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"never opened")
    assert_same(all_weights(open_checkpoint(folder)), tensors)


def test_safetensors_win_over_bin(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"an old copy")
    assert_same(all_weights(open_checkpoint(folder)), load_file(folder / "model.safetensors"))


def test_a_tied_head(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tie_word_embeddings=True))
    assert checkpoint.config.tied_head
    assert HEAD not in checkpoint.weights.specs()


def test_a_stored_copy_of_a_tied_head_is_passed_over(make_checkpoint: MakeCheckpoint) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    checkpoint = open_checkpoint(make_checkpoint(tie_word_embeddings=True, edit=store_head))
    assert HEAD not in checkpoint.weights.specs()


def test_a_stored_head_that_differs_from_the_tied_embedding_is_refused(
    make_checkpoint: MakeCheckpoint,
) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][3, 3] += 1

    error = refusal(make_checkpoint(tie_word_embeddings=True, edit=store_head))
    assert "tie_word_embeddings, but lm_head.weight differs" in error.message


def test_an_untied_model_without_a_head_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    error = refusal(make_checkpoint(edit=without(HEAD)))
    assert error.reasons == ("1 tensor missing: lm_head.weight",)


def test_old_buffers_are_passed_over(make_checkpoint: MakeCheckpoint) -> None:
    def add_buffer(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    checkpoint = open_checkpoint(make_checkpoint(edit=add_buffer))
    assert list(checkpoint.weights.specs()) == list(checkpoint.config.tensor_shapes())


def test_all_reasons_come_at_once(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    split(folder, 3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    change_config(folder, attention_bias=True, hidden_act="gelu")
    error = refusal(folder)
    text = str(error)
    assert isinstance(error, CheckpointError)
    for words in ("attention_bias: found True", "hidden_act: found 'gelu'", "truncated: 10 of"):
        assert words in text


def test_the_tokenizer_is_checked_together_with_the_tensors(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(edit=without("model.norm.weight"))
    (folder / "tokenizer.json").unlink()
    text = str(refusal(folder))
    assert "1 tensor missing: model.norm.weight" in text
    assert "tokenizer.json" in text


def test_a_tokenizer_error_alone_stays_one(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    assert isinstance(refusal(folder), TokenizerError)


def test_an_index_that_names_missing_shards(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    split(folder, 3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    reasons = refusal(folder).reasons
    assert [reason.split(":")[0] for reason in reasons] == [
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../other/model.safetensors"}}]
)
def test_an_index_that_says_nothing_usable(make_checkpoint: MakeCheckpoint, index: dict[str, Any]) -> None:
    folder = make_checkpoint()
    split(folder, 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "model.safetensors.index.json" in refusal(folder).message


def test_two_sets_of_weights_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    shutil.copy(folder / "model.safetensors", folder / "keep")
    split(folder, 2)
    (folder / "keep").rename(folder / "model.safetensors")
    assert "two sets of weights" in refusal(folder).message


def test_quantized_checkpoints_are_refused_in_clear_words(make_checkpoint: MakeCheckpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    folder = make_checkpoint(edit=quantize)
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert "quantized already (method: fp8)" in str(refusal(folder))
    change_config(folder, quantization_config=None)
    assert f"1 tensor stored as F8_E4M3 (supported: BF16, F16, F32): {name}" in str(refusal(folder))


def test_a_trainers_checkpoint_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    folder = run / "checkpoint-500"
    make_checkpoint("x").rename(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"never opened")
    (folder / "optimizer.safetensors").write_bytes(b"never opened")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(run / file)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.provenance.name == "my-run-checkpoint-500"
    assert checkpoint.notes == (f"tokenizer taken from {run.resolve()}",)


def test_the_folder_of_a_run_names_its_checkpoints(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    for step in (9, 100, 20):
        (folder / f"checkpoint-{step}").mkdir()
    error = refusal(folder)
    assert [Path(reason).name for reason in error.reasons] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    assert error.hint.endswith(str(folder / "checkpoint-100"))


@pytest.mark.parametrize(
    ("script", "destination"),
    [
        ("parser.add_argument('output_file')", "pytorch_model.bin"),
        ("add_argument('output_dir')", "."),
        (None, "."),
    ],
)
def test_zero_partitions_are_refused_with_the_command(
    make_checkpoint: MakeCheckpoint, script: str | None, destination: str
) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    states = folder / "global_step500"
    states.mkdir()
    (states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    (folder / "latest").write_text("global_step500", "utf-8")
    if script is not None:
        (folder / "zero_to_fp32.py").write_text(script, "utf-8")
    command = f"cd {folder} && python zero_to_fp32.py . {destination} -t global_step500"
    assert command in refusal(folder).hint
    assert command in refusal(states).hint


def test_partitions_beside_empty_weights_are_named_too(make_checkpoint: MakeCheckpoint) -> None:
    """ZeRO 3 without gathering saves a model.safetensors of empty tensors."""

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = torch.zeros(0, dtype=torch.bfloat16)

    folder = make_checkpoint(edit=empty)
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    error = refusal(folder)
    assert "misshaped" in str(error)
    assert "zero_to_fp32.py" in error.hint


def test_fsdp_shards_are_refused_with_the_command(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    parts = folder / "pytorch_model_fsdp_0"
    parts.mkdir()
    (parts / "__0_0.distcp").write_bytes(b"")
    assert f"accelerate merge-weights {parts} {folder}" in refusal(folder).hint


def test_an_adapter_given_as_the_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', "utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    error = refusal(tmp_path)
    assert "a LoRA adapter, not a model" in error.message
    assert f"org/base --lora {tmp_path}" in error.hint


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "m-F16.gguf").write_bytes(b"GGUF")
    assert "Give the file itself" in refusal(tmp_path).hint


def test_a_folder_of_something_else_says_what_it_found(tmp_path: Path) -> None:
    for name in ("notes.txt", "model.h5"):
        (tmp_path / name).write_text("", "utf-8")
    assert "found model.h5, notes.txt" in refusal(tmp_path).message


@pytest.mark.parametrize("weights", ["model.safetensors", "other.safetensors"])
def test_a_missing_config_is_named(make_checkpoint: MakeCheckpoint, weights: str) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / weights)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder).message


@pytest.mark.parametrize("source", ["./nowhere/model", "nowhere", "a/b/c", "/no/such/folder", "no.gguf", ""])
def test_sources_that_are_nothing(source: str) -> None:
    error = refusal(source)
    assert "not found" in error.message
    assert len(error.reasons) == 3


def test_a_file_that_is_no_gguf(make_checkpoint: MakeCheckpoint) -> None:
    file = make_checkpoint() / "model.safetensors"
    assert "give the folder" in str(refusal(file)).lower()


@pytest.mark.parametrize("option", [{"revision": "main"}, {"low_disk": True}])
def test_options_of_the_hub_do_not_fit_a_folder(
    make_checkpoint: MakeCheckpoint, option: dict[str, Any]
) -> None:
    error = refusal(make_checkpoint(), **option)
    assert isinstance(error, UsageError)
    assert "is for hub ids" in error.message


def test_licence_and_travelling_files(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "LICENSE-MODEL").write_text("terms", "utf-8")
    (folder / "NOTICE.txt").write_text("notice", "utf-8")
    card = "---\nlanguage: en\nlicense: other\nlicense_name: deepseek\n---\n# Model\nlicense: none\n"
    (folder / "README.md").write_text(card, "utf-8")
    provenance = open_checkpoint(folder).provenance
    assert provenance.licence == "deepseek"
    assert [file.name for file in provenance.travelling] == ["LICENSE-MODEL", "NOTICE.txt", "README.md"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# no matter", None),
    ],
)
def test_the_licence_of_a_model_card(make_checkpoint: MakeCheckpoint, card: str, licence: str | None) -> None:
    folder = make_checkpoint()
    (folder / "README.md").write_text(card, "utf-8")
    assert open_checkpoint(folder).provenance.licence == licence


def test_a_name_of_the_users_own(make_checkpoint: MakeCheckpoint) -> None:
    provenance = open_checkpoint(make_checkpoint("tiny"), name="My Coder").provenance
    assert (provenance.name, provenance.source) == ("My Coder", "tiny")


def test_eos_for_completion(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    own = open_checkpoint(folder).tokenizer.vocabulary
    completion = open_checkpoint(folder, eos="completion").tokenizer.vocabulary
    assert completion.eos_id == completion.tokens.index("<｜end▁of▁sentence｜>")
    assert own.bos_id == completion.bos_id


def test_the_embedded_model_opens(demo_folder: Path) -> None:
    checkpoint = open_checkpoint(demo_folder)
    assert checkpoint.config.rope_factor == 4.0
    assert checkpoint.weights.load(EMBEDDING).shape == (
        checkpoint.config.vocab_size,
        checkpoint.config.hidden_size,
    )


def gguf_of(folder: Path, quant: str, **options: Any) -> Path:
    """Convert a checkpoint folder and return the (first) file."""
    out = ConvertOptions(folder.parent / f"out-{quant}", **options)
    (written,) = convert(open_checkpoint(folder), [Request("gguf", quant)], out)
    return written.paths[0]


@pytest.mark.parametrize(
    ("quant", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_float_gguf_is_a_source_too(
    make_checkpoint: MakeCheckpoint, quant: str, dtype: torch.dtype, tied: bool
) -> None:
    folder = make_checkpoint("my-model", dtype, tie_word_embeddings=tied)
    path = gguf_of(folder, quant)
    original, opened = open_checkpoint(folder), open_checkpoint(path)
    assert opened.config == original.config
    assert list(opened.weights.specs()) == list(original.weights.specs())
    for name in original.weights.specs():
        assert torch.equal(opened.weights.load(name).float(), original.weights.load(name).float())
    assert opened.tokenizer.vocabulary == original.tokenizer.vocabulary
    assert opened.tokenizer.encode("def f(x):\n    return x") == original.tokenizer.encode(
        "def f(x):\n    return x"
    )
    assert opened.provenance.name == "my-model"
    assert opened.provenance.source == path.name


def test_a_split_gguf_is_a_source_by_its_first_file(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    path = gguf_of(folder, "BF16", split_max_bytes=400_000)
    assert "-of-" in path.name
    original, opened = open_checkpoint(folder), open_checkpoint(path)
    assert all(
        torch.equal(opened.weights.load(name).float(), original.weights.load(name).float())
        for name in original.weights.specs()
    )


def test_a_quantized_gguf_is_no_source(make_checkpoint: MakeCheckpoint) -> None:
    (reason,) = refusal(gguf_of(make_checkpoint(), "Q8_0")).reasons
    assert "stored as Q8_0 (supported: BF16, F16, F32)" in reason


def test_eos_for_completion_of_a_gguf_source(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    of_folder = open_checkpoint(folder, eos="completion").tokenizer.vocabulary
    of_gguf = open_checkpoint(gguf_of(folder, "F16"), eos="completion").tokenizer.vocabulary
    assert of_gguf == of_folder


def test_a_truncated_gguf_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    path = gguf_of(make_checkpoint(), "F16")
    path.write_bytes(path.read_bytes()[:-1000])
    assert isinstance(refusal(path), CheckpointError)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_file_that_cannot_be_read_is_named(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make_checkpoint()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    unhindered = Path.open

    def guarded(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return unhindered(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    error = refusal(folder)
    assert f"{name}: cannot be read: Permission denied" in str(error)


def test_a_folder_that_cannot_be_read(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = make_checkpoint()
    monkeypatch.setattr(Path, "iterdir", refused)
    assert f"{folder}: cannot be read: Permission denied" in str(refusal(folder))


def test_a_source_with_a_name_too_long() -> None:
    assert "cannot be read: File name too long" in refusal("x" * 300).message


def test_an_empty_source_is_called_empty() -> None:
    assert refusal("").message == "the source is empty; not found"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(make_checkpoint: MakeCheckpoint, name: str) -> None:
    error = refusal(make_checkpoint(), name=name)
    assert isinstance(error, UsageError)
    assert "--name is empty" in error.message
