"""The GGUF container: read a file's head strictly, and serialise one.

    magic "GGUF" | version | n_tensors | n_kv
    metadata      key, type, value                                        x n_kv
    tensor table  name, dimensions (columns first), type, offset          x n_tensors
    zeros up to the alignment
    data          tensors in the table's order, each padded to the alignment

The reader accepts exactly what llama.cpp's accepts of version 2 and 3, and says what is wrong with the
rest; it never allocates by a number that the file states before it has compared it with the file's length.
"""

import io
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from quantize.codecs import CODECS
from quantize.errors import CheckpointError

DEFAULT_ALIGNMENT = 32
MAX_NAME = 63  # bytes: llama.cpp's GGML_MAX_NAME with its terminating zero
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredType:
    """A type of the tensor table: how many weights a block has, and how many bytes."""

    name: str
    block_size: int
    block_bytes: int


# The gguf package knows types for computing and integers, our own codecs also the newest ones.
STORED_TYPES = {int(kind): StoredType(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} | {
    kind.ggml_type: StoredType(name, kind.block_size, kind.block_bytes) for name, kind in CODECS.items()
}
BLOCK_SIZES = {kind.name: kind.block_size for kind in STORED_TYPES.values()}


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table; `shape` has rows first, `offset` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    quant: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHead:
    """What a file says before its data; `data_start` and the tensors' bytes lie within the file."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int


def padded(n_bytes: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """Return `n_bytes` rounded up to the alignment."""
    return -(-n_bytes // alignment) * alignment


def shard_name(prefix: str, number: int, count: int) -> str:
    """Return the name of shard `number` (from 0) as llama.cpp derives it from the first."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def read_head(path: Path) -> GgufHead:
    """Read and check a GGUF's metadata and tensor table, and that its data is all there.

    Raises CheckpointError for a file that is absent, truncated, corrupt or no GGUF.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _Corrupt("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).head(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except _Corrupt as error:
        hint = "the download or copy may be incomplete: fetch or convert the file again"
        raise CheckpointError(f"{path}: not a whole GGUF file", reasons=error.reasons, hint=hint) from error


class _Corrupt(Exception):
    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons
        super().__init__(*reasons)


class _Reader:
    """A cursor over the mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def head(self, path: Path) -> GgufHead:
        version, n_tensors, n_fields = self._preamble()
        metadata = self._metadata(n_fields)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Corrupt(f"general.alignment is {alignment!r}, not a power of two")
        tensors = self._tensors(n_tensors)
        data_start = padded(self.at, alignment)
        if faults := _layout_faults(tensors, alignment, len(self.data) - data_start):
            raise _Corrupt(*faults)
        return GgufHead(path, version, metadata, tensors, alignment, data_start)

    def _preamble(self) -> tuple[int, int, int]:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise _Corrupt(f"it opens with {magic!r}, not with b'GGUF'")
        self.at = 4
        version = self._number("I")
        if version not in (2, 3):
            swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise _Corrupt(f"GGUF version {version}{swapped}; versions 2 and 3 are known")
        # A table row takes at least 24 bytes and a field 13: more than would fit cannot be meant.
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if n_tensors * 24 + n_fields * 13 > len(self.data):
            raise _Corrupt(
                f"{n_tensors} tensors and {n_fields} metadata fields do not fit {len(self.data)} bytes"
            )
        return version, n_tensors, n_fields

    def _metadata(self, n_fields: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self._string("a metadata key")
            if not key or key in metadata:
                raise _Corrupt(f"metadata key {key!r} occurs twice" if key else "an empty metadata key")
            metadata[key] = self._value(self._number("I"), key)
        return metadata

    def _tensors(self, n_tensors: int) -> tuple[TensorEntry, ...]:
        tensors = tuple(self._tensor() for _ in range(n_tensors))
        count = Counter(tensor.name for tensor in tensors)
        if twice := sorted(name for name in count if count[name] > 1):
            raise _Corrupt(*(f"tensor {name} occurs twice" for name in twice))
        return tensors

    def _tensor(self) -> TensorEntry:
        name = self._string("a tensor name")
        n_dimensions = self._number("I")
        if len(name.encode()) > MAX_NAME or not 1 <= n_dimensions <= 4:
            raise _Corrupt(
                f"tensor {name[:80]!r}: {n_dimensions} dimensions and {len(name.encode())} bytes of name"
                f"; at most 4 and {MAX_NAME} are allowed"
            )
        dimensions = [self._number("Q") for _ in range(n_dimensions)]
        number, offset = self._number("I"), self._number("Q")
        if number not in STORED_TYPES:
            raise _Corrupt(f"tensor {name}: unknown type {number}")
        kind = STORED_TYPES[number]
        if dimensions[0] % kind.block_size:
            raise _Corrupt(
                f"tensor {name}: {dimensions[0]} columns, not whole blocks of {kind.block_size} ({kind.name})"
            )
        n_bytes = math.prod(dimensions) // kind.block_size * kind.block_bytes
        return TensorEntry(name, tuple(reversed(dimensions)), kind.name, offset, n_bytes)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise _Corrupt(f"metadata {key}: unknown value type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self, key: str) -> list[Any]:
        kind, n_items = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._need(8 * n_items, key)
            return [self._string(key) for _ in range(n_items)]
        if kind not in _SCALARS:
            raise _Corrupt(f"metadata {key}: an array of unknown value type {kind}")
        width = struct.calcsize(f"<{_SCALARS[kind]}")
        self._need(width * n_items, key)
        values = struct.unpack_from(f"<{n_items}{_SCALARS[kind]}", self.data, self.at)
        self.at += width * n_items
        return list(values)

    def _string(self, what: str) -> str:
        n_bytes = self._number("Q")
        self._need(n_bytes, what)
        start, self.at = self.at, self.at + n_bytes
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _Corrupt(f"{what}: not UTF-8 at byte {start}") from None

    def _number(self, kind: str) -> Any:
        width = struct.calcsize(f"<{kind}")
        self._need(width, "a number")
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += width
        return value

    def _need(self, n_bytes: int, what: str) -> None:
        if self.at + n_bytes > len(self.data):
            raise _Corrupt(
                f"the file ends at byte {len(self.data)}, in the midst of its head (byte {self.at}: {what})"
            )


def _layout_faults(tensors: tuple[TensorEntry, ...], alignment: int, n_bytes: int) -> list[str]:
    """Compare the table's offsets with the only layout allowed, and its end with the data that is there."""
    faults, expected, end = [], 0, 0
    for tensor in tensors:
        if tensor.offset != expected:
            faults.append(f"tensor {tensor.name}: offset {tensor.offset}, expected {expected}")
        end = expected + tensor.n_bytes
        expected = padded(end, alignment)
    if n_bytes < end:
        absent = [t.name for t in tensors if t.offset + t.n_bytes > n_bytes]
        faults.append(
            f"the data is {max(n_bytes, 0)} bytes long, its layout needs {end}: {len(absent)} of "
            f"{len(tensors)} tensors are cut off or absent, from {absent[0]} on"
        )
    if n_bytes > expected:
        faults.append(f"the data is {n_bytes} bytes long, its layout ends at {expected}")
    return faults


def head_bytes(writer: GGUFWriter, tensors: Iterable[tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """Return a file's head, padded to the alignment.

    `writer` holds the metadata, made with `path=None`; `tensors` are (name, shape with rows first, GGML
    type, bytes) in the order in which their data will follow.
    """
    for name, shape, ggml_type, n_bytes in tensors:
        writer.add_tensor_info(name, shape, None, n_bytes, raw_dtype=GGMLQuantizationType(ggml_type))
    stream = io.BytesIO()
    # With a stream of its own the writer skips opening files by name; the rest of its machine is as usual.
    writer.fout, writer.state = [stream], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = stream.getvalue()
    return head + bytes(padded(len(head)) - len(head))
