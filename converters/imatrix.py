"""An imatrix: how much each column of each matrix matters, as llama.cpp's `llama-imatrix` measured it.

For a matrix W and the inputs x that a text sends through it, an error e in column j of W adds e * x[j] to the
output: so the mean of x[j]^2 over the text says how much the column matters. That is one number a column,
and the searches of the quant types weigh their errors with it. A constant factor changes nothing.

There are two file formats. The newer is GGUF with two F32 tensors an entry, and three keys without which
llama-quantize takes it for no imatrix:

    <weight>.in_sum2   (n_matrices, columns)   sum of x[j]^2 over all tokens
    <weight>.counts    (n_matrices, 1)         number of tokens; 0: never used, and every column counts alike
    imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size

The older one (`.dat`) has no magic; little endian:

    i32 n_entries, then for each   i32 length, name, i32 n_calls, i32 n_values, f32 mean * n_calls [n_values]
    at the end, or absent          i32 n_chunks, i32 length, name of the data set

Names are those of GGUF's weights. The matrices of our models are one each: n_matrices, of a mixture's
experts, is 1.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.gguf_file import GgufHead, TensorEntry, read_head
from converters.names import gguf_name, hf_name
from quantize.errors import CheckpointError, ImatrixError
from quantize.llama import LlamaConfig

SUMS, COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_MAX_ENTRIES = 1 << 20
_MOST_NAMED = 10


@dataclass(frozen=True)
class Importances:
    """Importances float32 (columns,) by the checkpoint's tensor names, and where they come from.

    `dataset` is empty and `n_chunks` 0 where the file does not say.
    """

    rows: Mapping[str, torch.Tensor]
    file: str
    dataset: str
    n_chunks: int

    def __str__(self) -> str:
        text = f" of {self.dataset}" if self.dataset else ""
        chunks = f", {self.n_chunks} chunks{text}" if self.n_chunks else text
        return f"{self.file} ({len(self.rows)} entries{chunks})"


@dataclass(frozen=True)
class _Read:
    """What a file says, by the file's own names."""

    rows: dict[str, np.ndarray]
    dataset: str
    n_chunks: int


def read_importances(path: Path, config: LlamaConfig) -> Importances:
    """Read an imatrix of either format and check it against the model that it shall serve.

    Raises ImatrixError for a file that is none, and with all reasons for entries that the model has no
    matrix for, that have another width, or that hold numbers which are negative or not finite.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        read = _read_gguf(path) if is_gguf else _read_legacy(path.read_bytes(), path)
    except OSError as error:
        raise ImatrixError(f"{path}: cannot be read: {error.strerror}") from error
    if faults := _faults(read.rows, config):
        more = [f"and {len(faults) - _MOST_NAMED} more"] if len(faults) > _MOST_NAMED else []
        raise ImatrixError(
            f"{path}: no imatrix of this model",
            reasons=faults[:_MOST_NAMED] + more,
            hint="make one from this very model with llama-imatrix",
        )
    rows = {hf_name(name): torch.from_numpy(values) for name, values in read.rows.items()}
    return Importances(rows, path.name, read.dataset, read.n_chunks)


def _faults(rows: Mapping[str, np.ndarray], config: LlamaConfig) -> list[str]:
    """Compare entries with the model's matrices; the embedding may stand in for a tied head."""
    shapes = {gguf_name(name): shape for name, shape in config.tensor_shapes().items() if len(shape) > 1}
    faults = []
    for name, values in rows.items():
        if name not in shapes:
            faults.append(f"{name}: the model has no such matrix")
        elif values.shape != shapes[name][1:]:
            faults.append(f"{name}: {len(values)} columns, the model's has {shapes[name][1]}")
        elif not np.isfinite(values).all():
            faults.append(f"{name}: {np.count_nonzero(~np.isfinite(values))} numbers that are not finite")
        elif (values < 0).any():
            faults.append(
                f"{name}: {np.count_nonzero(values < 0)} negative numbers, where squares are expected"
            )
    return faults


def _read_gguf(path: Path) -> _Read:
    try:
        head = read_head(path)
    except CheckpointError as error:
        raise ImatrixError(error.message, reasons=error.reasons, hint=error.hint) from error
    sums = {t.name.removesuffix(SUMS): t for t in head.tensors if t.name.endswith(SUMS)}
    counts = {t.name.removesuffix(COUNTS): t for t in head.tensors if t.name.endswith(COUNTS)}
    if reasons := _gguf_faults(head, sums, counts):
        hint = "give a file that llama-imatrix wrote"
        raise ImatrixError(f"{path}: no imatrix", reasons=reasons[:_MOST_NAMED], hint=hint)
    rows = {name: _means(_floats(head, sums[name]), _floats(head, counts[name])) for name in sums}
    datasets = head.metadata["imatrix.datasets"]
    return _Read(rows, str(datasets[0]) if datasets else "", head.metadata["imatrix.chunk_count"])


def _gguf_faults(
    head: GgufHead, sums: Mapping[str, TensorEntry], counts: Mapping[str, TensorEntry]
) -> list[str]:
    expected = dict(zip(_KEYS, (list, int, int), strict=True))
    reasons = [
        f"key {key} is {'missing' if key not in head.metadata else 'of another kind'}"
        for key, kind in expected.items()
        if not isinstance(head.metadata.get(key), kind)
    ]
    reasons += [f"{name}: {SUMS} or {COUNTS} is missing" for name in sorted(sums.keys() ^ counts.keys())]
    reasons += [f"{t.name}: {t.quant}, expected F32" for t in head.tensors if t.quant != "F32"]
    for name in sums.keys() & counts.keys():
        if counts[name].n_bytes != 4:
            reasons.append(f"{name}: {counts[name].n_bytes // 4} matrices, expected one")
    return reasons if reasons or sums else ["it has no entries"]


def _floats(head: GgufHead, entry: TensorEntry) -> np.ndarray:
    return np.fromfile(head.path, "<f4", entry.n_bytes // 4, offset=head.data_start + entry.offset)


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums / count in float32, ones where nothing was counted, nan for a count that is no number."""
    count = np.rint(counts[0])
    if not np.isfinite(count):
        return np.full_like(sums, np.nan)
    return sums / count if count > 0 else np.ones_like(sums)


class _Cursor:
    """A reader of the older format that never passes the file's end."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def number(self, what: str, least: int, most: int) -> int:
        """Return the next i32, which must lie within the bounds."""
        (value,) = struct.unpack("<i", self.take(4, what))
        if not least <= value <= most:
            raise self.fault(f"{what} is {value}")
        return int(value)

    def text(self, what: str) -> str:
        """Return the next string, which its length precedes."""
        raw = self.take(self.number(f"the length of {what}", 0, len(self.data)), what)
        try:
            return raw.decode("utf-8").rstrip("\0")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is no text") from None

    def take(self, n_bytes: int, what: str) -> bytes:
        """Return the next bytes."""
        if self.at + n_bytes > len(self.data):
            raise self.fault(f"the file ends in {what}")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def fault(self, reason: str) -> ImatrixError:
        """Return the error that names the file and the place."""
        hint = "give a file that llama-imatrix wrote, GGUF or .dat"
        return ImatrixError(f"{self.path}: no imatrix", reasons=[f"byte {self.at}: {reason}"], hint=hint)


def _read_legacy(data: bytes, path: Path) -> _Read:
    cursor = _Cursor(data, path)
    rows = {}
    for number in range(cursor.number("the number of entries", 1, _MAX_ENTRIES)):
        name = cursor.text(f"the name of entry {number + 1}")
        n_calls = cursor.number(f"{name}: the number of calls", 0, 2**31 - 1)
        n_values = cursor.number(f"{name}: the number of values", 1, len(data))
        values = np.frombuffer(cursor.take(4 * n_values, name), "<f4")
        if name in rows:
            raise cursor.fault(f"{name} occurs twice")
        rows[name] = values / np.float32(n_calls) if n_calls else values.copy()
    if cursor.at == len(data):
        return _Read(rows, "", 0)
    n_chunks = cursor.number("the number of chunks", 0, 2**31 - 1)
    return _Read(rows, cursor.text("the data set"), n_chunks)
