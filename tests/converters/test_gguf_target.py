"""The GGUF target: which type each tensor gets, every metadata field, and where files are cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.gguf_file import GgufHead, read_head
from converters.imatrix import Importances
from converters.plan import ConvertOptions, Plan, Request
from converters.targets import TARGETS
from converters.targets.gguf_fields import eos_rule
from converters.vocabulary import Vocabulary
from quantize.errors import PlanError

GGUF = TARGETS["gguf"]
PLAIN = ["F32", "F16", "BF16", "Q8_0"]


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A small grouped-query model that came from the hub."""
    opened = open_checkpoint(make_checkpoint("deepseek-coder-6.7b-instruct"))
    provenance = replace(opened.provenance, source="deepseek-ai/it", revision="abc123", licence="deepseek")
    return replace(opened, provenance=provenance)


def _plan(checkpoint: Checkpoint, quant: str, **options: Any) -> Plan:
    return GGUF.plan(checkpoint, Request("gguf", quant), ConvertOptions(Path("out"), **options))


def _head(plan: Plan, folder: Path, number: int = 0) -> GgufHead:
    """Write one planned file with zeros for data and read its head."""
    file = plan.files[number]
    path = folder / file.name
    path.write_bytes(file.head + bytes(file.n_bytes - len(file.head)))
    return read_head(path)


@pytest.mark.parametrize("quant", PLAIN)
def test_vectors_are_f32_and_matrices_as_asked(checkpoint: Checkpoint, quant: str) -> None:
    plan = _plan(checkpoint, quant)
    assert [tensor.name for tensor in plan.tensors] == list(checkpoint.config.tensor_shapes())
    for tensor in plan.tensors:
        assert tensor.quant == ("F32" if len(tensor.shape) == 1 else quant)
        assert tensor.reason == ("vectors are always F32" if len(tensor.shape) == 1 else "as asked")
    assert plan.fallbacks == ()


def test_rows_that_are_no_whole_blocks_fall_back_with_a_reason(make_checkpoint: Callable[..., Path]) -> None:
    plan = _plan(open_checkpoint(make_checkpoint(intermediate_size=80)), "Q8_0")
    assert [(t.written_name, t.quant) for t in plan.fallbacks] == [
        ("blk.0.ffn_down.weight", "F16"),
        ("blk.1.ffn_down.weight", "F16"),
    ]
    assert plan.fallbacks[0].reason == (
        "as asked; Q8_0 falls back to F16: 80 columns are not a multiple of 32"
    )
    assert plan.by_name["model.layers.0.mlp.up_proj.weight"].quant == "Q8_0"


@pytest.mark.parametrize("quant", GGUF.quants)
def test_the_layout_is_what_the_head_says(checkpoint: Checkpoint, tmp_path: Path, quant: str) -> None:
    plan = _plan(checkpoint, quant)
    assert [file.name for file in plan.files] == [f"deepseek-coder-6.7b-instruct-{quant}.gguf"]
    head = _head(plan, tmp_path)
    assert [(t.name, t.shape, t.quant, t.n_bytes) for t in head.tensors] == [
        (t.written_name, t.shape, t.quant, t.n_bytes) for t in plan.tensors
    ]
    assert [head.data_start + t.offset for t in head.tensors] == [t.offset for t in plan.tensors]


def test_every_field(checkpoint: Checkpoint, tmp_path: Path) -> None:
    vocabulary: Vocabulary = checkpoint.tokenizer.vocabulary
    metadata = dict(_head(_plan(checkpoint, "Q8_0"), tmp_path).metadata)
    assert metadata.pop("tokenizer.ggml.tokens") == list(vocabulary.tokens)
    assert metadata.pop("tokenizer.ggml.token_type") == [int(kind) for kind in vocabulary.token_types]
    assert metadata.pop("tokenizer.ggml.merges") == list(vocabulary.merges)
    assert metadata.pop("tokenizer.chat_template", None) == vocabulary.chat_template
    assert metadata.pop("dscq.version")
    assert metadata.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert metadata.pop("tokenizer.ggml.eot_token_id", None) == vocabulary.eot_id
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "deepseek-coder-6.7b-instruct",
        "general.basename": "deepseek-coder",
        "general.finetune": "instruct",
        "general.size_label": f"{checkpoint.config.n_parameters / 1e3:.0f}K",
        "general.license": "deepseek",
        "general.source.repo_url": "https://huggingface.co/deepseek-ai/it",
        "general.quantization_version": 2,
        "general.file_type": 7,
        "dscq.recipe": "Q8_0",
        "dscq.eos": "model",
        "dscq.source": "deepseek-ai/it",
        "dscq.revision": "abc123",
        "llama.block_count": 2,
        "llama.context_length": 16384,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": vocabulary_size(checkpoint),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-coder",
        "tokenizer.ggml.bos_token_id": vocabulary.bos_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.padding_token_id": vocabulary.pad_id,
        "tokenizer.ggml.fim_pre_token_id": vocabulary.fim_prefix,
        "tokenizer.ggml.fim_suf_token_id": vocabulary.fim_suffix,
        "tokenizer.ggml.fim_mid_token_id": vocabulary.fim_middle,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


@pytest.mark.parametrize(
    ("eos", "rule"),
    [("<｜end▁of▁sentence｜>", "completion"), ("<|EOT|>", "model"), ("<｜fim▁hole｜>", "model")],
)
def test_the_eos_rule_is_told_from_the_vocabulary(checkpoint: Checkpoint, eos: str, rule: str) -> None:
    vocabulary = checkpoint.tokenizer.vocabulary
    assert eos_rule(replace(vocabulary, eos_id=vocabulary.tokens.index(eos))) == rule


def vocabulary_size(checkpoint: Checkpoint) -> int:
    return len(checkpoint.tokenizer.vocabulary.tokens)


def test_value_types_are_those_that_llama_cpp_reads(checkpoint: Checkpoint, tmp_path: Path) -> None:
    head = _head(_plan(checkpoint, "F16"), tmp_path)
    for key, field in GGUFReader(head.path).fields.items():
        if isinstance(head.metadata.get(key), bool):
            assert field.types == [GGUFValueType.BOOL]
        elif isinstance(head.metadata.get(key), int):
            assert field.types == [GGUFValueType.UINT32]
        elif isinstance(head.metadata.get(key), float):
            assert field.types == [GGUFValueType.FLOAT32]


def test_no_rope_factor_and_another_head_size(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(make_checkpoint(rope_scaling=None, head_dim=32))
    metadata = _head(_plan(opened, "F16"), tmp_path).metadata
    assert not [key for key in metadata if "scaling" in key]
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert [metadata[f"llama.{key}"] for key in lengths] == [32, 32, 32]


def test_a_tied_head_has_no_output(make_checkpoint: Callable[..., Path]) -> None:
    plan = _plan(open_checkpoint(make_checkpoint(tie_word_embeddings=True)), "F16")
    assert "output.weight" not in [tensor.written_name for tensor in plan.tensors]


def test_a_local_source_has_no_url_and_no_path(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plan = _plan(open_checkpoint(make_checkpoint()), "F16")
    metadata = _head(plan, tmp_path).metadata
    assert "general.source.repo_url" not in metadata
    assert str(tmp_path).encode() not in plan.files[0].head


def test_check_lists_every_reason(checkpoint: Checkpoint) -> None:
    odd = replace(
        checkpoint,
        config=replace(checkpoint.config, head_dim=15, vocab_size=7),
        provenance=replace(checkpoint.provenance, name="a/b"),
    )
    options = ConvertOptions(Path("out"), tensor_types=(("ffn_dwn", "Q6_K"),))
    assert GGUF.check(odd, Request("gguf", "IQ4_NL"), options) == [
        "the model's name 'a/b' cannot be a file name; give another with --name",
        "heads of 15 rows: rotary embedding needs an even number",
        f"{vocabulary_size(checkpoint)} tokens for the embedding's 7 rows; GGUF needs one each",
        (
            "--tensor-type ffn_dwn=Q6_K: no matrix is left that it matches; names are like "
            "blk.0.ffn_down.weight, and the first pattern that matches counts"
        ),
    ]
    assert GGUF.check(checkpoint, Request("gguf", "F16"), ConvertOptions(Path("out"))) == []


def test_a_recipe_is_its_number_and_its_overrides(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = {"tensor_types": (("ffn_down", "Q5_0"),), "output_tensor_type": "Q8_0", "pure": True}
    head = _head(_plan(checkpoint, "Q4_K_M", **options), tmp_path)
    assert head.metadata["general.file_type"] == 15
    assert head.metadata["dscq.recipe"] == "Q4_K_M"
    assert head.metadata["dscq.overrides"] == "pure, output: Q8_0, ffn_down=Q5_0"
    assert not [key for key in head.metadata if key.startswith("quantize.")]


def test_the_importances_in_use_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = {"model.layers.0.mlp.down_proj.weight": torch.ones(96)}
    importances = Importances(rows, "mine.dat", "calibration.txt", 7)
    head = _head(_plan(checkpoint, "IQ4_NL", importances=importances), tmp_path)
    written = {key: value for key, value in head.metadata.items() if key.startswith("quantize.")}
    assert written == {
        "quantize.imatrix.file": "mine.dat",
        "quantize.imatrix.dataset": "calibration.txt",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 7,
    }
    unused = _head(_plan(checkpoint, "Q8_0", importances=importances), tmp_path)
    assert not [key for key in unused.metadata if key.startswith("quantize.")]


def test_shards_hold_whole_tensors_and_stay_below_the_size(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = _plan(checkpoint, "F16")
    limit = len(whole.files[0].head) + max(tensor.n_bytes for tensor in whole.tensors) + 20_000
    plan = _plan(checkpoint, "F16", split_max_bytes=limit)
    count = len(plan.files)
    assert count > 1
    assert [t.name for t in plan.tensors] == [t.name for t in whole.tensors]
    for number, file in enumerate(plan.files):
        assert file.name == f"deepseek-coder-6.7b-instruct-F16-{number + 1:05d}-of-{count:05d}.gguf"
        assert file.n_bytes <= limit
        head = _head(plan, tmp_path, number)
        split = {key: value for key, value in head.metadata.items() if key.startswith("split.")}
        assert split == {"split.no": number, "split.count": count, "split.tensors.count": len(whole.tensors)}
        assert ("tokenizer.ggml.tokens" in head.metadata) == (number == 0)
        placed = [(t.written_name, t.offset) for t in plan.tensors if t.file == number]
        assert placed == [(t.name, head.data_start + t.offset) for t in head.tensors]


def test_what_fits_is_not_split(checkpoint: Checkpoint) -> None:
    whole = _plan(checkpoint, "F16")
    assert _plan(checkpoint, "F16", split_max_bytes=10 * whole.n_bytes) == whole


def test_a_tensor_larger_than_the_split_size_is_refused(checkpoint: Checkpoint) -> None:
    limit = max(tensor.n_bytes for tensor in _plan(checkpoint, "F16").tensors) - 1
    with pytest.raises(PlanError, match=f"files of at most {limit} bytes: tensors are never cut") as caught:
        _plan(checkpoint, "F16", split_max_bytes=limit)
    assert [reason.split()[0] for reason in caught.value.reasons] == ["token_embd.weight", "output.weight"]


def test_planning_twice_gives_the_same(checkpoint: Checkpoint) -> None:
    assert _plan(checkpoint, "Q8_0") == _plan(checkpoint, "Q8_0")
