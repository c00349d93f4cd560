"""The head of a safetensors file: everything there is to know about its tensors, in a few kilobytes.

    offset     bytes   content
    ---------  ------  ----------------------------------------------------------------------------
    0          8       n, u64 little endian: length of the header
    8          n       JSON: {"tensor name": {"dtype": "BF16", "shape": [rows, columns],
                       "data_offsets": [begin, end]}, "__metadata__": {...}}
    8 + n      rest    data; offsets count from here, the tensors follow each other without a gap

So a checkpoint is checked completely before a single weight is read: a file that is shorter than its
header says was cut off in a download, and by how much is known.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.errors import CheckpointError

PREFIX_BYTES = 8
# The format's own limit on a header; a larger number is a file of another kind.
MAX_HEADER_BYTES = 100_000_000

# Every dtype of the format with its size in bits. Those without a torch dtype here are no source weights.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64}
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
TORCH_DTYPES |= {"I32": torch.int32, "I16": torch.int16}  # packed words and tables of a quantized folder


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: what the header says, and where in the file its bytes are.

    `dtype` is the format's word (`BF16`), because a header may name dtypes that are not supported.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # first byte, from the beginning of the file
    n_bytes: int


def head_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the head of a file of tensors, each (name, dtype, shape, bytes), that follow each other.

    The header is padded, so that the data begins at a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, n_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def read_header(file: Path) -> list[Entry]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises CheckpointError for a file that is truncated, too long, or whose header is damaged.
    """
    try:
        n_file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            n_header_bytes = header_length(stream.read(PREFIX_BYTES), file.name, n_file_bytes)
            return parse_header(stream.read(n_header_bytes), file.name, n_file_bytes)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None


def header_length(prefix: bytes, file: str, n_file_bytes: int) -> int:
    """Return the length of the header from the file's first eight bytes; raises CheckpointError."""
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{file}: truncated: {n_file_bytes} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} is no safetensors file: it begins with {prefix!r}")
    if length + PREFIX_BYTES > n_file_bytes:
        missing = length + PREFIX_BYTES - n_file_bytes
        raise CheckpointError(f"{file}: truncated inside its header, at least {missing} bytes are missing")
    return length


def parse_header(header: bytes, file: str, n_file_bytes: int) -> list[Entry]:
    """Return the tensors that a header lists, sorted by position; raises CheckpointError."""
    try:
        table = json.loads(header)
        data_start = PREFIX_BYTES + len(header)
        entries = [
            _entry(name, fields, data_start) for name, fields in table.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged header: {type(error).__name__}: {error}") from None
    entries.sort(key=lambda entry: (entry.start, entry.n_bytes))
    reasons = list(_layout_reasons(entries, data_start, n_file_bytes))
    if reasons:
        raise CheckpointError(f"{file}: {'; '.join(reasons)}")
    return entries


def _entry(name: str, fields: dict[str, Any], data_start: int) -> Entry:
    shape = tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {shape}, data_offsets {begin}, {end}")
    n_bytes = math.prod(shape) * _BITS[fields["dtype"]] // 8
    if end - begin != n_bytes:
        raise ValueError(f"{name}: {end - begin} bytes for {fields['dtype']} {list(shape)}")
    return Entry(name, shape, fields["dtype"], data_start + begin, n_bytes)


def _layout_reasons(entries: list[Entry], data_start: int, n_file_bytes: int) -> Iterator[str]:
    starts = [data_start, *(entry.start + entry.n_bytes for entry in entries)]
    gaps = [e.name for e, expected in zip(entries, starts, strict=False) if e.start != expected]
    if gaps:
        yield f"damaged header: tensors overlap or leave a gap at {gaps[0]}"
    n_missing = starts[-1] - n_file_bytes
    if n_missing > 0:
        yield f"truncated: {n_missing} of {starts[-1]} bytes are missing"
    elif n_missing < 0:
        yield f"{-n_missing} bytes more than its header accounts for"
