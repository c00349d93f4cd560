"""An imatrix, written: the sums of squares that a calibration measured, in either of llama.cpp's formats.

The layouts are those that `converters.imatrix` describes and reads, in the order in which llama-imatrix
writes them, so that the same sums give the same bytes. The older format cannot say how many tokens were
counted. It says how many chunks, rounded up, and stores the mean times that number: whoever reads it
divides by it again.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from converters.disk import write_whole
from converters.gguf_file import MAX_NAME, head_bytes, padded
from converters.imatrix import COUNTS, SUMS
from quantize.errors import ImatrixError, UsageError

# By the names of GGUF's weights: Σx² of each column, float32 (K,), and the number of tokens summed over.
Sums = Mapping[str, tuple[torch.Tensor, int]]


def write_imatrix(path: Path, entries: Sums, dataset: str, chunk_size: int, n_chunks: int) -> None:
    """Write sums of squares as an imatrix: GGUF for a name that ends in `.gguf`, the older format for `.dat`.

    `entries` are float32 (K,) and a number of tokens, by the names of GGUF's weights; `dataset` names the
    text, which was read in `n_chunks` chunks of `chunk_size` tokens. The file appears whole and takes the
    place of what has its name. Raises UsageError for any other suffix, ImatrixError with all reasons for
    entries that no reader would take, OutputError.
    """
    check_imatrix_name(path)
    if faults := _faults(entries, chunk_size, n_chunks):
        raise ImatrixError(f"{path}: these sums make no imatrix", reasons=faults)
    rows = {name: (_array(sums), n_tokens) for name, (sums, n_tokens) in sorted(entries.items())}
    encode = _gguf_bytes if path.suffix.lower() == ".gguf" else _legacy_bytes
    write_whole(path, encode(rows, dataset, chunk_size, n_chunks))


def check_imatrix_name(path: Path) -> None:
    """Raise UsageError unless the name says which format is meant: for before the work starts."""
    if path.suffix.lower() not in (".gguf", ".dat"):
        raise UsageError(
            f"{path}: an imatrix is written as .gguf or, for older programs, as .dat",
            hint="give the file one of these two endings",
        )


_Rows = Mapping[str, tuple[npt.NDArray[np.float32], int]]


def _array(sums: torch.Tensor) -> npt.NDArray[np.float32]:
    return sums.detach().cpu().numpy().astype("<f4", copy=False)


def _faults(entries: Sums, chunk_size: int, n_chunks: int) -> list[str]:
    faults = [] if entries else ["there are no entries"]
    if chunk_size < 1 or n_chunks < 1:
        faults.append(f"{n_chunks} chunks of {chunk_size} tokens, expected at least one of each")
    return faults + [fault for name, entry in entries.items() if (fault := _entry_fault(name, *entry))]


def _entry_fault(name: str, sums: torch.Tensor, n_tokens: int) -> str:
    if len((name + SUMS).encode()) > MAX_NAME:
        return f"{name}: too long a name; {MAX_NAME} bytes are allowed, {SUMS} included"
    if sums.dtype != torch.float32 or sums.ndim != 1 or not len(sums):
        return f"{name}: {tuple(sums.shape)} sums of {sums.dtype}, expected float32 (columns,)"
    if not bool(((sums >= 0) & sums.isfinite()).all()):
        return f"{name}: sums that are negative or not finite, where squares are expected"
    # llama.cpp would read a count of zero as ones, which were never measured.
    return "" if n_tokens >= 1 else f"{name}: measured on {n_tokens} tokens"


def _gguf_bytes(rows: _Rows, dataset: str, chunk_size: int, n_chunks: int) -> bytes:
    writer = GGUFWriter(path=None, arch="")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", n_chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    tensors = [part for name, row in rows.items() for part in _tensors(name, *row)]
    f32 = GGMLQuantizationType.F32
    head = head_bytes(writer, ((name, data.shape, f32, data.nbytes) for name, data in tensors))
    return head + b"".join(_padded(data.tobytes()) for _, data in tensors)


def _tensors(
    name: str, sums: npt.NDArray[np.float32], n_tokens: int
) -> list[tuple[str, npt.NDArray[np.float32]]]:
    return [(name + SUMS, sums), (name + COUNTS, np.full(1, n_tokens, "<f4"))]


def _padded(data: bytes) -> bytes:
    return data + bytes(padded(len(data)) - len(data))


def _legacy_bytes(rows: _Rows, dataset: str, chunk_size: int, n_chunks: int) -> bytes:
    parts = [struct.pack("<i", len(rows))]
    for name, (sums, n_tokens) in rows.items():
        n_calls = -(-n_tokens // chunk_size)
        parts += [_text(name), struct.pack("<ii", n_calls, len(sums))]
        parts.append((sums / np.float32(n_tokens) * np.float32(n_calls)).tobytes())
    return b"".join([*parts, struct.pack("<i", n_chunks), _text(dataset)])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data
