"""What will be written, decided before anything is: the plan of one export.

A plan is complete: every tensor's type and the reason for it, where its bytes will lie, the first bytes
of every file, all sizes. `--dry-run` prints it, the room on the disk is compared with it, and the writer
follows it without a decision of its own. So the tensors may arrive in any order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from converters.imatrix import Importances


@dataclass(frozen=True)
class Request:
    """One `--to FORMAT:QUANT`, checked against the known names and in their spelling."""

    format: str
    quant: str

    def __str__(self) -> str:
        return f"{self.format}:{self.quant}"


@dataclass(frozen=True)
class ConvertOptions:
    """How to write: everything about an export that is not its format.

    `split_max_bytes` bounds each file; `hash_tensors` takes every tensor's sha256 on the way, which the
    proof compares with what it reads back from the disk.

    The rest decides types, as the options of llama-quantize: `tensor_types` are (regular expression on the
    format's tensor name, quant type), of which the first that matches counts; `pure` leaves the mix of a
    recipe out; `importances` come from an imatrix. `device` is where the types that gain from a GPU are
    encoded: cpu, cuda (all GPUs in turn) or cuda:1; the bytes are the same.
    """

    folder: Path
    force: bool = False
    split_max_bytes: int | None = None
    n_threads: int = 2
    hash_tensors: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    importances: Importances | None = None
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether another device than the CPU encodes."""
        return self.device.partition(":")[0] != "cpu"


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: what it becomes, why, and where its bytes go.

    `name` is the checkpoint's and `written_name` the format's; `shape` has rows first. `offset` counts
    from the start of file number `file`. Rows are handed to the writer in multiples of `row_step`. A
    finite weight of magnitude `overflow` or more does not fit the type. `falls_back` says that another type
    was meant for this tensor, which its rows do not divide into.
    """

    name: str
    written_name: str
    shape: tuple[int, ...]
    quant: str
    reason: str
    n_bytes: int
    file: int
    offset: int
    row_step: int
    overflow: float
    falls_back: bool = False

    @property
    def n_rows(self) -> int:
        """Number of rows; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of the scales included."""
        return 8 * self.n_bytes / math.prod(self.shape)


@dataclass(frozen=True)
class FilePlan:
    """One file: its name, its first bytes and its size."""

    name: str
    head: bytes
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """One export: its files, its tensors in their order in the files, and what else a user should know."""

    request: Request
    files: tuple[FilePlan, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def fallbacks(self) -> tuple[TensorPlan, ...]:
        """The tensors that do not get the type meant for them, since their rows do not fit its blocks."""
        return tuple(tensor for tensor in self.tensors if tensor.falls_back)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for each weight of the model, vectors included."""
        return 8 * sum(t.n_bytes for t in self.tensors) / sum(math.prod(t.shape) for t in self.tensors)

    @cached_property
    def by_name(self) -> Mapping[str, TensorPlan]:
        """The tensors by the checkpoint's names."""
        return {tensor.name: tensor for tensor in self.tensors}


@dataclass(frozen=True)
class Written:
    """A finished export: the plan it follows, its files, each tensor's sha256 if asked for, and the time.

    `tensor_hashes` are taken of the bytes on their way to the disk, by the checkpoint's names; `n_reused`
    counts the bytes that an interrupted run had made.
    """

    plan: Plan
    paths: tuple[Path, ...]
    tensor_hashes: Mapping[str, str]
    seconds: float
    n_reused: int = 0
