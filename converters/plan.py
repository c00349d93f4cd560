"""What will be written, decided before anything is: the plan of one export.

A plan is complete: every tensor's type and the reason for it, where its bytes will lie, the first bytes
of every file, all sizes. `--dry-run` prints it, the room on the disk is compared with it, and the writer
follows it without a decision of its own. So the tensors may arrive in any order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from converters.disk import PARTIAL
from converters.exl2_measurement import Measurement
from converters.imatrix import Importances
from converters.places import Piece
from converters.runtime_memory import Runtime
from converters.stats.archive import Archive
from quantize.first_tokens import FirstTokens
from quantize.solver.linears import Effort


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
    encoded: cpu, cuda (all GPUs in turn) or cuda:1; the bytes are the same but where errors are compensated:
    there near-ties may fall to the other side. `fresh` makes every tensor anew, whatever earlier runs left in
    the folder.

    `archive` has the Hessians that errors are compensated with, in GGUF if `compensate`, and
    `first_tokens` what its rows begin with (`convert` sees to it); `effort` says how
    hard the solver tries; `module_bits` are (regular expression on a linear's name, bits and group size as
    8bit-32g), of GPTQ alone; `tensor_parallel` is the number of GPUs that a server will split a matrix over;
    `measurement` says what EXL2's layouts cost.

    `losses` are nats by the checkpoint's name of a matrix and by quant type (converters/type_losses.py): what
    a budget is shared out by, but to `excluded` types; `runtime` is what `fit=` leaves room for, EXL2's too;
    `assigned` has the types, by GGUF's names of the matrices, of a plan that was given back.
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
    fresh: bool = False
    archive: Archive | None = None
    compensate: bool = False
    first_tokens: FirstTokens | None = None
    effort: Effort = "default"
    module_bits: tuple[tuple[str, str], ...] = ()
    tensor_parallel: int = 1
    measurement: Measurement | None = None
    losses: Mapping[str, Mapping[str, float]] | None = None
    runtime: Runtime = field(default_factory=Runtime)
    excluded: tuple[str, ...] = ()
    assigned: Mapping[str, str] | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether another device than the CPU encodes."""
        return self.device.partition(":")[0] != "cpu"


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: what it becomes, why, and where its bytes go.

    `name` is the checkpoint's and `written_name` the format's; `shape` has rows first. `offset` counts
    from the start of file number `file`. Rows are handed to the writer in multiples of `row_step`. A
    finite weight of magnitude `overflow` or more does not fit the type. `suits_gpu`: a GPU that is asked for
    does its work in large slices; `compensated`: it is rounded with its input's Hessian. `falls_back` says
    that another type was meant for this tensor, which its rows do not divide into.
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
    suits_gpu: bool = True
    compensated: bool = False
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
    """One export: its files, its tensors in their order in the files, and what else a user should know.

    An export that is a folder has a `directory`, in which its files lie. `readers` are the programs that will
    load it or won't, each with the reason, where the format has several.
    """

    request: Request
    files: tuple[FilePlan, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    directory: str = ""
    readers: tuple[tuple[str, ...], ...] = ()

    def paths(self, folder: Path) -> tuple[Path, ...]:
        """The files' places below the folder of all exports."""
        return tuple(folder / self.directory / file.name for file in self.files)

    def place(self, folder: Path) -> Path:
        """What the export is opened by: its first file, or its own folder."""
        return folder / self.directory if self.directory else folder / self.files[0].name

    def partials(self, folder: Path) -> tuple[Path, ...]:
        """The files' places while they are being written."""
        inside = folder / (self.directory + PARTIAL) if self.directory else folder
        return tuple(inside / (file.name + PARTIAL) for file in self.files)

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
    """A finished export in `folder`: the plan it follows, the pieces of each tensor, and the time.

    `pieces` are by the checkpoint's names; their hashes, if asked for, are of the bytes on their way to the
    disk. `n_reused` counts the bytes that an earlier run had made, and `n_tensors_reused` the tensors made by
    it as a whole; `notes` say what went otherwise than planned.
    """

    plan: Plan
    folder: Path
    pieces: Mapping[str, Sequence[Piece]]
    seconds: float
    n_reused: int = 0
    n_tensors_reused: int = 0
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return self.plan.paths(self.folder)

    @property
    def place(self) -> Path:
        """What the export is opened by: its first file, or its own folder."""
        return self.plan.place(self.folder)
