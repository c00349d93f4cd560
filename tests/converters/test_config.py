"""config.json -> LlamaConfig: the family's real files, every spelling of rope, every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from converters.config import read_config, read_json
from quantize.errors import CheckpointError

LINEAR = {"type": "linear", "factor": 4.0}


def config(**changes: Any) -> dict[str, Any]:
    """A small valid config; a change to None removes the key."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6,
    } | changes
    return {key: value for key, value in content.items() if value is not None}


def refusal(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_config(config(**changes))
    return caught.value.reasons


FAMILY = {
    "1.3b-base": (2048, 5504, 24, 16, 16),
    "1.3b-instruct": (2048, 5504, 24, 16, 16),
    "5.7bmqa-base": (4096, 11008, 32, 32, 1),
    "6.7b-base": (4096, 11008, 32, 32, 32),
    "6.7b-instruct": (4096, 11008, 32, 32, 32),
    "33b-base": (7168, 19200, 62, 56, 8),
    "33b-instruct": (7168, 19200, 62, 56, 8),
}


@pytest.mark.parametrize("member", FAMILY)
def test_the_whole_family_reads(member: str, shared: Path) -> None:
    read = read_config(read_json(shared / "deepseek-coder" / f"config.{member}.json"))
    sizes = (read.hidden_size, read.intermediate_size, read.n_layers, read.n_heads, read.n_kv_heads)
    assert sizes == FAMILY[member]
    assert (read.head_dim, read.vocab_size, read.context_length) == (128, 32256, 16384)
    assert (read.rope_theta, read.rope_factor, read.rms_norm_eps) == (100000.0, 4.0, 1e-6)
    assert not read.tied_head


def test_every_config_of_the_family_is_tested(shared: Path) -> None:
    files = (shared / "deepseek-coder").glob("config.*.json")
    assert {file.name.removeprefix("config.").removesuffix(".json") for file in files} == set(FAMILY)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 100000, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}},
        {"rope_parameters": {"type": "linear", "rope_type": "linear", "factor": 4.0, "rope_theta": 100000}},
        {"rope_theta": 100000, "rope_scaling": None, "rope_parameters": LINEAR},
        {"rope_theta": 1e5, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 100000}},
        {"rope_theta": 1e5, "rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 100000}},
    ],
)
def test_every_spelling_of_rope_reads_the_same(spelling: dict[str, Any]) -> None:
    read = read_config(config(**spelling))
    assert (read.rope_theta, read.rope_factor) == (100000.0, 4.0)


@pytest.mark.parametrize(
    ("spelling", "places"),
    [
        (
            {"rope_scaling": {**LINEAR, "rope_type": "default"}},
            ["rope_scaling.type", "rope_scaling.rope_type"],
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            ["rope_parameters.rope_type"],
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            ["rope_scaling.factor = 4.0", "rope_parameters.factor = 2.0"],
        ),
        (
            {"rope_theta": 10000, "rope_parameters": {**LINEAR, "rope_theta": 100000}},
            ["rope_theta = 10000", "rope_parameters.rope_theta = 100000"],
        ),
    ],
)
def test_spellings_that_disagree_are_refused_by_name(spelling: dict[str, Any], places: list[str]) -> None:
    (reason,) = refusal(**spelling)
    assert "disagree" in reason
    assert all(place in reason for place in places)


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type: found 'dynamic'; supported",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "found 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, "without a factor"),
        ({"rope_scaling": {"factor": 4.0}}, "expected 'linear'"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "expected 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "expected a positive number"),
        ({"rope_theta": 0}, "rope_theta: found 0"),
        ({"rope_theta": float("nan")}, "rope_theta: found nan"),
        ({"rope_scaling": [4.0]}, "expected an object or null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
        (
            {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
    ],
)
def test_ropes_that_are_not_supported(spelling: dict[str, Any], words: str) -> None:
    assert any(words in reason for reason in refusal(**spelling))


def test_what_may_be_missing() -> None:
    read = read_config(config(num_key_value_heads=None, architectures=None))
    assert (read.n_kv_heads, read.head_dim) == (4, 16)
    assert (read.rope_theta, read.rope_factor, read.tied_head) == (10000.0, 1.0, False)


def test_head_dim_is_its_own_number() -> None:
    read = read_config(config(head_dim=32))
    assert read.head_dim == 32
    assert read.block_shapes()["self_attn.q_proj"] == (128, 64)


def test_tied_head_and_context_length() -> None:
    read = read_config(
        config(tie_word_embeddings=True, max_position_embeddings=4096, model_max_length=10**30)
    )
    assert read.tied_head
    assert read.context_length == 4096


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "found ['MistralForCausalLM']; supported: ['Llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "qwen2"}, "model_type is 'qwen2'; supported"),
        ({"model_type": "mixtral"}, "model_type: found 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (method: gptq)"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "code of its own (modeling_x.X)"),
        ({"hidden_size": "64"}, "hidden_size: found '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
        ({"vocab_size": True}, "vocab_size: found True"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: found -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: found 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads (3)"),
        ({"hidden_size": 66}, "hidden_size (66) is not a multiple"),
        ({"head_dim": 15}, "head_dim is odd"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    (reason,) = refusal(**change)
    assert words in reason


def test_all_reasons_come_at_once() -> None:
    reasons = refusal(
        vocab_size=None,
        rms_norm_eps=None,
        hidden_act="relu",
        attention_bias=True,
        rope_scaling={"type": "yarn"},
    )
    starts = [
        "hidden_act",
        "attention_bias",
        "vocab_size: missing",
        "rms_norm_eps: missing",
        "rope_scaling.type",
    ]
    assert [reason[: len(start)] for reason, start in zip(reasons, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("content", "words"), [("{", "cannot be read"), ("[1]", "expected an object"), (None, "no such file")]
)
def test_files_that_are_no_json_object(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=words):
        read_json(path)


def test_json_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "é｜"}, ensure_ascii=False), "utf-8")
    assert read_json(path) == {"a": "é｜"}


def test_a_layer_count_that_no_llama_has() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers: found 2000000000; expected at most 1000"):
        read_config(config(num_hidden_layers=2_000_000_000))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "head_dim"])
def test_a_size_that_no_tensor_has(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key}: found 2147483648; expected at most 2147483647"):
        read_config(config(**{key: 2**31}))
