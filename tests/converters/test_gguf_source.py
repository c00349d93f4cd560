"""A GGUF opened: as llama.cpp would see it, shards as one, and refused with all reasons."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from converters.gguf_file import head_bytes, padded
from converters.gguf_source import GgufFile, open_gguf
from converters.names import gguf_name, is_rotary, permute
from quantize.errors import CheckpointError, TokenizerError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig, block_tensor

CONFIG = LlamaConfig(64, 96, 2, 4, 2, 16, 40, 512, 1e-6, 1e5, 4.0)
FIELDS = {
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 1e5,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 4.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
    "tokenizer.ggml.merges": ["t 1", "t 2"],
}

Write = Callable[..., Path]


def _writer(fields: dict[str, object]) -> GGUFWriter:
    writer = GGUFWriter(path=None, arch="llama")
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    return writer


def _tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in config.tensor_shapes().items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a maker of GGUFs straight from gguf-py: no line of our writer is involved."""

    def make(
        changes: dict[str, object | None] | None = None,
        without: tuple[str, ...] = (),
        kind: GGMLQuantizationType = GGMLQuantizationType.F32,
        config: LlamaConfig = CONFIG,
    ) -> Path:
        fields = {k: v for k, v in (FIELDS | (changes or {})).items() if v is not None}
        entries, data = [], b""
        for name, tensor in _tensors(config).items():
            if name in without:
                continue
            rows = permute(tensor, 16) if is_rotary(name) else tensor
            stored = kind if rows.ndim > 1 else GGMLQuantizationType.F32
            payload = quantize(rows.numpy(), stored).tobytes()
            entries.append((gguf_name(name), tuple(tensor.shape), int(stored), len(payload)))
            data += payload + bytes(padded(len(payload)) - len(payload))
        path = tmp_path / "made.gguf"
        path.write_bytes(head_bytes(_writer(fields), entries) + data)
        return path

    return make


def _reasons(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    return caught.value.reasons


def test_config_and_rows_come_back(write: Write) -> None:
    file = open_gguf(write())
    assert file.config == CONFIG
    assert set(file.tensor_types.values()) == {"F32"}
    for name, tensor in _tensors(CONFIG).items():
        assert torch.equal(file.weights.load(name), tensor)
        assert file.weights.specs()[name].shape == tuple(tensor.shape)


# Q4_1 has no codec of ours yet: gguf's own decoder serves.
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_stored_types_are_decoded(write: Write, kind: str) -> None:
    ggml = GGMLQuantizationType[kind]
    file = open_gguf(write(kind=ggml))
    for name, tensor in _tensors(CONFIG).items():
        stored = ggml if tensor.ndim > 1 else GGMLQuantizationType.F32
        expected = torch.from_numpy(dequantize(quantize(tensor.numpy(), stored), stored)).reshape(
            tensor.shape
        )
        loaded = file.weights.load(name)
        assert loaded.dtype == file.weights.specs()[name].dtype
        assert torch.equal(loaded.float(), expected)
        assert file.tensor_types[name] == stored.name
        assert file.blocks(name).numpy().tobytes() == quantize(tensor.numpy(), stored).tobytes()


def test_absent_keys_get_the_runtimes_defaults(write: Write) -> None:
    absent = ("freq_base", "scaling.factor", "scaling.type")
    config = open_gguf(write({f"llama.rope.{key}": None for key in absent})).config
    assert (config.rope_theta, config.rope_factor) == (10000.0, 1.0)


def test_the_old_rope_key_is_read(write: Write) -> None:
    changes = {"llama.rope.scaling.factor": None, "llama.rope.scale_linear": 8.0}
    assert open_gguf(write(changes)).config.rope_factor == 8.0


def test_scaling_none_means_no_factor(write: Write) -> None:
    assert open_gguf(write({"llama.rope.scaling.type": "none"})).config.rope_factor == 1.0


def test_an_absent_output_is_a_tied_head(write: Write) -> None:
    file = open_gguf(write(without=(HEAD,)))
    assert file.config == replace(CONFIG, tied_head=True)
    assert HEAD not in file.weights.specs()


def test_explicit_head_size(write: Write) -> None:
    config = replace(CONFIG, n_heads=2)
    lengths = {f"llama.attention.{part}_length": 16 for part in ("key", "value")}
    file = open_gguf(write({"llama.attention.head_count": 2} | lengths, config=config))
    assert file.config == config


def test_vocabulary_defaults_are_llama_cpps(write: Write) -> None:
    vocabulary = open_gguf(write()).vocabulary
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (11, 11, None)
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.pre) == (False, False, "default")
    assert set(vocabulary.token_types) == {1}


def test_fim_tokens_are_found_by_key_by_old_key_and_by_text(write: Write) -> None:
    tokens = [f"t{i}" for i in range(39)] + ["<｜fim▁end｜>"]
    keys = {"tokenizer.ggml.fim_pre_token_id": 7, "tokenizer.ggml.prefix_token_id": 1}
    old = {"tokenizer.ggml.suffix_token_id": 8, "tokenizer.ggml.tokens": tokens}
    vocabulary = open_gguf(write(keys | old)).vocabulary
    assert (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle) == (7, 8, 39)


def test_another_tokenizer_is_refused(write: Write) -> None:
    file = open_gguf(write({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}))
    with pytest.raises(TokenizerError, match="'llama', expected 'gpt2'"):
        _ = file.vocabulary


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer.ggml.bos_token_id", 99999999),
        ("tokenizer.ggml.eos_token_id", 1.5),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.ggml.token_type", 1),
    ],
)
def test_fields_of_the_wrong_type_or_range_are_refused(write: Write, field: str, value: object) -> None:
    with pytest.raises(TokenizerError, match=field):
        _ = open_gguf(write({field: value})).vocabulary


def test_all_faults_of_the_tokenizer_are_listed(write: Write) -> None:
    config = replace(CONFIG, vocab_size=5)
    changes = {"tokens": list("abcde"), "merges": "a b", "pre": 3, "eos_token_id": 5, "token_type": [1.0] * 5}
    file = open_gguf(write({f"tokenizer.ggml.{key}": value for key, value in changes.items()}, config=config))
    with pytest.raises(TokenizerError) as caught:
        _ = file.vocabulary
    assert caught.value.reasons == (
        "tokenizer.ggml.merges is no array of strings",
        "tokenizer.ggml.token_type is no array of whole numbers",
        "tokenizer.ggml.pre is 3, expected a string",
        "tokenizer.ggml.bos_token_id is 11 by default, expected the number of one of 5 tokens",
        "tokenizer.ggml.eos_token_id is 5, expected the number of one of 5 tokens",
    )


@pytest.mark.parametrize(
    ("types", "fault"), [([1] * 39, "39 entries for 40 tokens"), ([1] * 39 + [9], r"unknown numbers \[9\]")]
)
def test_odd_token_types_are_refused(write: Write, types: list[int], fault: str) -> None:
    with pytest.raises(TokenizerError, match=fault):
        _ = open_gguf(write({"tokenizer.ggml.token_type": types})).vocabulary


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"general.architecture": "gemma"}, ["general.architecture is 'gemma', expected 'llama'"]),
        (
            {"llama.block_count": None, "llama.rope.scaling.type": "yarn", "llama.context_length": [1, 2]},
            [
                "llama.block_count is missing",
                "llama.context_length differs from layer to layer, which no Llama does",
                "llama.rope.scaling.type is 'yarn'; 'linear' and 'none' are supported",
            ],
        ),
        (
            {"llama.block_count": 2_000_000_000},
            ["llama.block_count is 2000000000, expected at most 1000"],
        ),
        (
            {"llama.attention.head_count": 0},
            ["llama.attention.head_count is 0, expected a positive whole number"],
        ),
        (
            {"llama.rope.freq_base": 100000, "llama.embedding_length": "64"},
            [
                "llama.embedding_length is '64', expected a positive whole number",
                "llama.rope.freq_base is 100000, expected a float32",
            ],
        ),
        (
            {"llama.rope.dimension_count": 8},
            ["llama.rope.dimension_count is 8, expected the 16 of a head"],
        ),
    ],
)
def test_metadata_faults_are_listed(write: Write, changes: dict[str, object], reasons: list[str]) -> None:
    assert list(_reasons(write(changes))) == reasons


def test_tensor_faults_are_listed(write: Write) -> None:
    path = write({"llama.attention.head_count_kv": None}, without=(block_tensor(1, "mlp.up_proj"), EMBEDDING))
    assert _reasons(path) == (
        "tensor token_embd.weight is missing",
        "tensor blk.1.ffn_up.weight is missing",
        "tensor blk.0.attn_k.weight is [32, 64], expected [64, 64]",
        "tensor blk.0.attn_v.weight is [32, 64], expected [64, 64]",
        "tensor blk.1.attn_k.weight is [32, 64], expected [64, 64]",
        "tensor blk.1.attn_v.weight is [32, 64], expected [64, 64]",
    )


def test_more_layers_than_tensors_are_one_reason(write: Write) -> None:
    path = write({"llama.block_count": 900})
    assert _reasons(path) == ("llama.block_count is 900, but there are 21 tensors in all",)


def test_a_tensor_too_many_is_a_fault(write: Write) -> None:
    assert (
        _reasons(write({"llama.block_count": 1}))[0] == "tensor blk.1.attn_norm.weight is not part of a Llama"
    )


@pytest.fixture
def shards(write: Write, tmp_path: Path) -> list[Path]:
    """The file cut in two, by hand."""
    tensors = list(_tensors(CONFIG).items())
    paths = []
    for number, part in enumerate((tensors[:5], tensors[5:])):
        split: dict[str, object] = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        entries, data = [], b""
        for name, tensor in part:
            payload = (permute(tensor, 16) if is_rotary(name) else tensor).numpy().tobytes()
            entries.append((gguf_name(name), tuple(tensor.shape), 0, len(payload)))
            data += payload + bytes(padded(len(payload)) - len(payload))
        paths.append(tmp_path / f"big-{number + 1:05d}-of-00002.gguf")
        paths[-1].write_bytes(head_bytes(_writer(split if number else FIELDS | split), entries) + data)
    return paths


def test_the_first_shard_opens_all(shards: list[Path]) -> None:
    file: GgufFile = open_gguf(shards[0])
    assert file.paths == tuple(shards)
    for name, tensor in _tensors(CONFIG).items():
        assert torch.equal(file.weights.load(name), tensor)


def test_a_later_shard_names_the_first(shards: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"shard 2 of 2\ngive the first: .*big-00001-of-00002.gguf"):
        open_gguf(shards[1])


def test_missing_shards_are_named(shards: list[Path]) -> None:
    shards[1].unlink()
    assert _reasons(shards[0]) == ("big-00002-of-00002.gguf is missing",)


def test_a_shard_number_that_is_none_is_refused(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"split\.count is '2', expected a whole number"):
        open_gguf(write({"split.count": "2"}))


def test_a_renamed_shard_is_refused(shards: list[Path]) -> None:
    renamed = shards[0].rename(shards[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="one of 2 shards, but not named"):
        open_gguf(renamed)


def test_a_shard_of_another_set_is_refused(shards: list[Path]) -> None:
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"big-00002-of-00002\.gguf: split\.no is 0, expected 1"):
        open_gguf(shards[0])
