"""Inspection shows every GGUF that can be read, with the reasons why no conversion would take it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from converters.checkpoint import open_checkpoint
from converters.gguf_file import head_bytes, read_head
from converters.inspect import inspect_path
from converters.plan import ConvertOptions, Request
from converters.targets import TARGETS
from quantize.errors import CheckpointError

Write = Callable[..., Path]


@pytest.fixture
def write(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Write:
    """Return a maker of a small Llama's GGUF with zeros for data, and with more tensors where asked."""

    def make(architecture: str = "llama", tokenizer: str = "gpt2", extra: tuple[str, ...] = ()) -> Path:
        plan = TARGETS["gguf"].plan(
            open_checkpoint(make_checkpoint()), Request("gguf", "F16"), ConvertOptions(tmp_path)
        )
        path = tmp_path / "made.gguf"
        path.write_bytes(plan.files[0].head + bytes(plan.files[0].n_bytes - len(plan.files[0].head)))
        found = inspect_path(path)
        entries = [(row.name, row.shape, int(row.quant == "F16"), row.n_bytes) for row in found.tensors]
        entries += [(name, (8,), 0, 32) for name in extra]
        writer = _writer(path, architecture, tokenizer)
        data = sum(-(-entry[3] // 32) * 32 for entry in entries)
        path.write_bytes(head_bytes(writer, entries) + bytes(data))
        return path

    return make


def _writer(path: Path, architecture: str, tokenizer: str) -> GGUFWriter:
    writer = GGUFWriter(path=None, arch=architecture)
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    changes = {"tokenizer.ggml.model": tokenizer}
    for key, value in (read_head(path).metadata | changes).items():
        if key != "general.architecture":
            add[type(value)](key, value)
    return writer


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model is 'llama', expected 'gpt2' (BPE)"),
        ({"extra": ("rope_freqs.weight",)}, "tensor rope_freqs.weight is not part of a Llama"),
    ],
)
def test_what_is_not_supported_is_shown_by_its_head(
    write: Write, changes: dict[str, Any], finding: str
) -> None:
    found = inspect_path(write(**changes))
    assert f"not supported by dscq: {finding}" in found.findings
    assert found.facts["llama.block_count"] == "2"
    assert found.facts["tokenizer.ggml.tokens"] == "2304 entries"
    assert found.facts["general.architecture"] == changes.get("architecture", "llama")
    rows = {row.name: row for row in found.tensors}
    assert (rows["token_embd.weight"].quant, rows["token_embd.weight"].n_bytes) == ("F16", 2304 * 64 * 2)
    assert len(rows) == 21 + len(changes.get("extra", ()))
    assert json.loads(json.dumps(found.document()))["facts"] == found.facts


def test_a_later_shard_names_the_first(tmp_path: Path) -> None:
    writer = GGUFWriter(path=None, arch="llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    path = tmp_path / "m-00002-of-00002.gguf"
    path.write_bytes(head_bytes(writer, [("output.weight", (8,), 0, 32)]) + bytes(32))
    found = inspect_path(path)
    assert found.findings == (
        "not supported by dscq: shard 2 of 2",
        f"not supported by dscq: give the first: {tmp_path / 'm-00001-of-00002.gguf'}",
    )
    assert [(row.name, row.n_bytes) for row in found.tensors] == [("output.weight", 32)]


def test_a_supported_file_is_described_in_the_models_words(write: Write) -> None:
    found = inspect_path(write())
    assert found.findings == ()
    assert found.facts["RoPE"] == "theta 100000, linear scaling factor 4"
    assert found.tensors[0].name == "token_embd.weight"


def test_a_truncated_file_is_an_error(write: Write) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        inspect_path(path)
