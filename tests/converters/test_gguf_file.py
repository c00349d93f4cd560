"""The container: what we write is what gguf's reader reads, and every kind of damage has its own words."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from converters.gguf_file import head_bytes, padded, read_head, shard_name
from quantize.errors import CheckpointError

TENSORS = [("first.weight", (3, 64), 8, 3 * 68), ("second", (7,), 0, 28), ("third.weight", (2, 5), 30, 20)]


def _whole_file() -> bytes:
    writer = GGUFWriter(path=None, arch="llama")
    writer.add_uint32("count", 7)
    writer.add_string("text", "põ{ü}" * 3)
    writer.add_float32("ratio", 0.25)
    writer.add_bool("flag", True)
    writer.add_array("words", ["a", "bc", ""])
    writer.add_array("numbers", [3, -1, 2])
    data = b"".join(bytes([i]) * padded(n) for i, (*_, n) in enumerate(TENSORS, 1))
    return head_bytes(writer, TENSORS) + data


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A whole small file."""
    path = tmp_path / "whole.gguf"
    path.write_bytes(_whole_file())
    return path


def _reasons(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_head(path)
    assert str(path) in caught.value.message
    return "; ".join(caught.value.reasons)


def test_head_is_read_as_written(whole: Path) -> None:
    head = read_head(whole)
    assert head.metadata == {
        "general.architecture": "llama",
        "count": 7,
        "text": "põ{ü}" * 3,
        "ratio": 0.25,
        "flag": True,
        "words": ["a", "bc", ""],
        "numbers": [3, -1, 2],
    }
    assert [(t.name, t.shape, t.quant, t.n_bytes) for t in head.tensors] == [
        ("first.weight", (3, 64), "Q8_0", 204),
        ("second", (7,), "F32", 28),
        ("third.weight", (2, 5), "BF16", 20),
    ]
    assert [t.offset for t in head.tensors] == [0, 224, 256]
    assert head.data_start % 32 == 0


def test_ggufs_reader_agrees(whole: Path) -> None:
    head, theirs = read_head(whole), GGUFReader(whole)
    assert {t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in theirs.tensors} == {
        t.name: (head.data_start + t.offset, t.n_bytes, t.quant) for t in head.tensors
    }
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields == head.metadata
    np.testing.assert_array_equal(theirs.tensors[1].data.view(np.uint8), np.full(28, 2, np.uint8))


def test_every_truncation_is_refused(whole: Path, tmp_path: Path) -> None:
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    end = len(data) - padded(20) + 20  # the last tensor's padding may be absent
    for length in range(end):
        cut.write_bytes(data[:length])
        assert _reasons(cut)
    cut.write_bytes(data[:end])
    assert len(read_head(cut).tensors) == 3


def test_a_truncated_download_says_what_is_absent(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes()[:-60])
    assert _reasons(whole) == (
        "the data is 228 bytes long, its layout needs 276: 2 of 3 tensors are cut off "
        "or absent, from second on"
    )


def _patched(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def patch(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return patch


def _entry(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda data: b"GGML" + data[4:], "it opens with b'GGML'"),
    "no GGUF at all": (lambda data: b"<html>", "it opens with b'<htm'"),
    "version 1": (
        lambda data: data[:4] + struct.pack("<I", 1) + data[8:],
        "GGUF version 1; versions 2 and 3",
    ),
    "big endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "a big-endian file"),
    "absurd counts": (lambda data: data[:8] + b"\xff" * 16 + data[24:], "do not fit"),
    "key twice": (_patched(_entry("ratio"), _entry("count")), "key 'count' occurs twice"),
    "value type": (_patched(_entry("flag") + b"\x07", _entry("flag") + b"\x0d"), "unknown value type 13"),
    "array too long": (
        _patched(
            _entry("numbers") + struct.pack("<IIQ", 9, 5, 3),
            _entry("numbers") + struct.pack("<IIQ", 9, 5, 1 << 60),
        ),
        "the file ends at byte",
    ),
    "array of arrays": (
        _patched(_entry("numbers") + struct.pack("<II", 9, 5), _entry("numbers") + struct.pack("<II", 9, 9)),
        "an array of unknown value type 9",
    ),
    "not UTF-8": (_patched(_entry("words"), struct.pack("<Q", 5) + b"w\xffrds"), "not UTF-8"),
    "tensor type": (
        _patched(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 99, 0)),
        "tensor first.weight: unknown type 99",
    ),
    "half a block": (
        _patched(struct.pack("<QQ", 64, 3), struct.pack("<QQ", 60, 3)),
        "tensor first.weight: 60 columns, not whole blocks of 32 (Q8_0)",
    ),
    "dimensions": (_patched(_entry("second") + b"\x01", _entry("second") + b"\x05"), "5 dimensions"),
    "offset": (
        _patched(struct.pack("<IQ", 0, 224), struct.pack("<IQ", 0, 256)),
        "tensor second: offset 256, expected 224",
    ),
    "trailing bytes": (lambda data: data + bytes(64), "its layout ends at 288"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_has_a_reason(whole: Path, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    whole.write_bytes(damage(whole.read_bytes()))
    assert expected in _reasons(whole)


def test_an_odd_alignment_is_refused(whole: Path) -> None:
    writer = GGUFWriter(path=None, arch="llama")
    writer.add_uint32("general.alignment", 24)
    whole.write_bytes(head_bytes(writer, []))
    assert _reasons(whole) == "general.alignment is 24, not a power of two"


def test_a_duplicate_tensor_is_refused(whole: Path) -> None:
    data = _patched(_entry("third.weight"), _entry("first.weight"))(whole.read_bytes())
    whole.write_bytes(data)
    assert _reasons(whole) == "tensor first.weight occurs twice"


def test_absent_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_head(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    assert _reasons(tmp_path / "empty.gguf") == "the file is empty"


def test_shard_names() -> None:
    assert shard_name("m-F16", 0, 12) == "m-F16-00001-of-00012.gguf"
