"""Importances from both file formats, and everything that makes a file unfit for a model."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from converters.imatrix import Importances, read_importances
from quantize.errors import ImatrixError
from quantize.llama import HEAD, LlamaConfig, block_tensor

CONFIG = LlamaConfig(8, 12, 2, 2, 1, 4, 20, 64, 1e-6, 1e4)
DOWN, HEAD_GGUF = "blk.0.ffn_down.weight", "output.weight"
Values = Mapping[str, np.ndarray]
DEFAULT: Values = {
    DOWN: np.arange(12, dtype=np.float32),
    HEAD_GGUF: np.linspace(0.5, 4, 8, dtype=np.float32),
}


def write_gguf(
    path: Path,
    means: Values = DEFAULT,
    *,
    counts: Mapping[str, float] | None = None,
    keys: tuple[str, ...] = ("datasets", "chunk_count", "chunk_size"),
    edit: Callable[[GGUFWriter], None] = lambda _: None,
) -> Path:
    """Write what llama-imatrix would: sums over 640 tokens, or over as many as `counts` says."""
    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    values = {"datasets": ["calibration.txt", "more.txt"], "chunk_count": 5, "chunk_size": 128}
    for key in keys:
        if key == "datasets":
            writer.add_array("imatrix.datasets", values[key])
        else:
            writer.add_uint32(f"imatrix.{key}", values[key])
    for name, mean in means.items():
        count = np.float32((counts or {}).get(name, 640))
        writer.add_tensor(f"{name}.in_sum2", (mean * count).astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_bytes(means: Values = DEFAULT, n_calls: int = 5, *, tail: bool = True) -> bytes:
    data = struct.pack("<i", len(means))
    for name, mean in means.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(mean))
        data += (mean * np.float32(n_calls or 1)).astype("<f4").tobytes()
    return data + (struct.pack("<ii", 5, 15) + b"calibration.txt" if tail else b"")


def write_legacy(path: Path, data: bytes | None = None) -> Path:
    path.write_bytes(legacy_bytes() if data is None else data)
    return path


def check(found: Importances, **expected: object) -> None:
    assert set(found.rows) == {block_tensor(0, "mlp.down_proj"), HEAD}
    assert torch.equal(found.rows[block_tensor(0, "mlp.down_proj")], torch.arange(12, dtype=torch.float32))
    assert torch.equal(found.rows[HEAD], torch.linspace(0.5, 4, 8))
    assert all(row.dtype == torch.float32 for row in found.rows.values())
    assert {name: getattr(found, name) for name in expected} == expected


def reasons(path: Path) -> list[str]:
    with pytest.raises(ImatrixError) as caught:
        read_importances(path, CONFIG)
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.hint
    return list(caught.value.reasons)


def test_the_gguf_format(tmp_path: Path) -> None:
    found = read_importances(write_gguf(tmp_path / "imatrix.gguf"), CONFIG)
    check(found, file="imatrix.gguf", dataset="calibration.txt", n_chunks=5)
    assert str(found) == "imatrix.gguf (2 entries, 5 chunks of calibration.txt)"


def test_the_older_format_whatever_the_name(tmp_path: Path) -> None:
    found = read_importances(write_legacy(tmp_path / "imatrix.gguf"), CONFIG)
    check(found, file="imatrix.gguf", dataset="calibration.txt", n_chunks=5)


def test_the_older_format_may_end_early_and_need_not_count(tmp_path: Path) -> None:
    found = read_importances(write_legacy(tmp_path / "a.dat", legacy_bytes(n_calls=0, tail=False)), CONFIG)
    check(found, dataset="", n_chunks=0)
    assert str(found) == "a.dat (2 entries)"


def test_a_matrix_that_was_never_used_counts_alike(tmp_path: Path) -> None:
    found = read_importances(write_gguf(tmp_path / "a.gguf", counts={DOWN: 0}), CONFIG)
    assert torch.equal(found.rows[block_tensor(0, "mlp.down_proj")], torch.ones(12))


@pytest.mark.parametrize("old", [False, True])
def test_the_entries_must_be_the_models(tmp_path: Path, old: bool) -> None:
    bad = np.ones(8, np.float32)
    bad[3], bad[4] = np.nan, np.inf
    means = {
        "blk.2.attn_q.weight": np.ones(8, np.float32),
        "blk.0.attn_norm.weight": np.ones(8, np.float32),
        "blk.0.ffn_up.weight": np.ones(12, np.float32),
        "blk.1.ffn_up.weight": bad,
        "blk.1.attn_q.weight": -np.ones(8, np.float32),
        DOWN: np.ones(12, np.float32),
    }
    path = tmp_path / "imatrix"
    write_legacy(path, legacy_bytes(means)) if old else write_gguf(path, means)
    assert reasons(path) == [
        "blk.2.attn_q.weight: the model has no such matrix",
        "blk.0.attn_norm.weight: the model has no such matrix",
        "blk.0.ffn_up.weight: 12 columns, the model's has 8",
        "blk.1.ffn_up.weight: 2 numbers that are not finite",
        "blk.1.attn_q.weight: 8 negative numbers, where squares are expected",
    ]


def test_another_models_imatrix_is_refused_in_ten_lines(tmp_path: Path) -> None:
    means = {f"blk.{i}.attn_q.weight": np.ones(8, np.float32) for i in range(20)}
    found = reasons(write_gguf(tmp_path / "a.gguf", means))
    assert len(found) == 11
    assert found[-1] == "and 8 more"


@pytest.mark.parametrize("count", [np.nan, np.inf])
def test_a_count_that_is_no_number(tmp_path: Path, count: float) -> None:
    with np.errstate(invalid="ignore"):
        path = write_gguf(tmp_path / "a.gguf", counts={DOWN: count})
    assert reasons(path) == [f"{DOWN}: 12 numbers that are not finite"]


@pytest.mark.parametrize("key", ["datasets", "chunk_count", "chunk_size"])
def test_a_gguf_without_the_keys_is_no_imatrix(tmp_path: Path, key: str) -> None:
    keys = tuple({"datasets", "chunk_count", "chunk_size"} - {key})
    assert reasons(write_gguf(tmp_path / "a.gguf", keys=keys)) == [f"key imatrix.{key} is missing"]


def test_a_gguf_with_other_tensors_is_no_imatrix(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((1, 8), np.float32))
        writer.add_tensor("blk.1.ffn_up.weight.in_sum2", np.ones((2, 8), np.float16))
        writer.add_tensor("blk.1.ffn_up.weight.counts", np.ones((2, 1), np.float32))

    assert reasons(write_gguf(tmp_path / "a.gguf", edit=edit)) == [
        "blk.0.ffn_up.weight: .in_sum2 or .counts is missing",
        "blk.1.ffn_up.weight.in_sum2: F16, expected F32",
        "blk.1.ffn_up.weight: 2 matrices, expected one",
    ]


def test_an_empty_gguf_imatrix(tmp_path: Path) -> None:
    assert reasons(write_gguf(tmp_path / "a.gguf", {})) == ["it has no entries"]


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-60])
    assert "the data is" in reasons(path)[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "byte 0: the file ends in the number of entries"),
        (b"\0\0\0\0", "byte 4: the number of entries is 0"),
        (b"PK\x03\x04" * 9, "byte 4: the number of entries is 67324752"),
        (struct.pack("<ii", 1, 900), "byte 8: the length of the name of entry 1 is 900"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe", "byte 10: the name of entry 1 is no text"),
        (
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", -1, 1),
            "byte 13: a: the number of calls is -1",
        ),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0), "byte 17: a: the number of values is 0"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 9) + b"1234", "byte 17: the file ends in a"),
    ],
)
def test_what_is_no_imatrix_says_where(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reasons(write_legacy(tmp_path / "a.dat", data)) == [reason]


def test_an_entry_that_occurs_twice(tmp_path: Path) -> None:
    twice = struct.pack("<i", 2) + 2 * legacy_bytes({DOWN: np.ones(12, np.float32)}, tail=False)[4:]
    assert reasons(write_legacy(tmp_path / "a.dat", twice))[0].endswith(f"{DOWN} occurs twice")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match=r"absent\.dat: cannot be read: No such file"):
        read_importances(tmp_path / "absent.dat", CONFIG)
