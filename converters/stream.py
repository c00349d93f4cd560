"""One read of the weights, any number of exports.

Every tensor is loaded once, cut into slices of rows, and each slice goes through all writers while it is
warm: looked at for numbers that are not finite, encoded, written at its offset. Slices are small enough
for the processor's cache, or for a GPU large enough to keep it busy; so memory does not depend on the model.
Rows are encoded independently of each other, so the bytes do not depend on the number of threads, on the
devices or on who was first.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from converters.places import Piece
from converters.plan import ConvertOptions, Plan
from converters.targets.base import Writer
from quantize.errors import CheckpointError, PlanError
from quantize.llama import HEAD
from quantize.weights import Weights

SLICE_ELEMENTS = 1 << 20
# A GPU's search is many short operations on all blocks at once: small slices would leave it waiting for them
# to be started. The search of one holds 0.23 (Q8_0) to 0.83 GB (Q2_K), measured with tensors of a CPU.
GPU_SLICE_ELEMENTS = 1 << 24
# More would only wait for the disk, and each holds up to 20 MB in flight.
MAX_WORKERS = 16


@dataclass(frozen=True)
class TensorDone:
    """Progress: a tensor has been written to every export."""

    name: str
    n_source_bytes: int
    n_done: int
    n_total: int


OnEvent = Callable[[TensorDone], None]


@dataclass(frozen=True)
class Export:
    """A plan, and the writer that carries it out."""

    plan: Plan
    writer: Writer


@dataclass(frozen=True)
class _Slice:
    name: str
    first_row: int
    rows: torch.Tensor
    is_last: bool


@dataclass(frozen=True)
class _Outcome:
    """What a worker found in a slice, and what it wrote to each export: nothing when it only looked.

    The rows that were written are not kept: outcomes may have to wait for one before them.
    """

    part: _Slice
    peak: float
    written: tuple[Piece, ...] = ()


def stream(
    weights: Weights, exports: Sequence[Export], options: ConvertOptions, on_event: OnEvent
) -> list[dict[str, list[Piece]]]:
    """Write every planned tensor to every export; return each export's pieces by tensor name.

    Raises CheckpointError naming every tensor with numbers that are not finite (nothing is written after
    the first is found, but all are looked at), PlanError naming every tensor that does not fit its
    type, OutputError.
    """
    run = _Stream(weights, exports, options, on_event)
    n_workers = min(options.n_threads, MAX_WORKERS)
    with one_thread_per_worker(), ThreadPoolExecutor(n_workers) as pool:
        pending: deque[Future[_Outcome]] = deque()
        for part in run.slices():
            pending.append(pool.submit(run.work, part))
            # Bounds what is in flight; one slice that takes long must not keep the others from going on.
            in_flight = [future for future in pending if not future.done()]
            if len(in_flight) > 2 * n_workers:
                wait(in_flight, return_when=FIRST_COMPLETED)
            while pending and pending[0].done():  # results come out in the order of the slices
                run.settle(pending.popleft().result())
        while pending:
            run.settle(pending.popleft().result())
    run.raise_faults()
    return run.pieces


class _Stream:
    def __init__(
        self, weights: Weights, exports: Sequence[Export], options: ConvertOptions, on_event: OnEvent
    ) -> None:
        self.weights, self.exports, self.on_event = weights, exports, on_event
        planned = set().union(*(export.plan.by_name for export in exports))
        specs = {name: spec for name, spec in weights.specs().items() if name in planned}
        self.specs = {name: specs[name] for name in sorted(specs, key=self._comes_later)}
        self.n_done, self.n_total = 0, sum(spec.n_bytes for spec in self.specs.values())
        self.pieces: list[dict[str, list[Piece]]] = [{name: [] for name in self.specs} for _ in exports]
        self.on_gpu = options.on_gpu
        self.not_finite: dict[str, Counter[str]] = {}
        self.too_large: dict[tuple[str, str], float] = {}

    def _comes_later(self, name: str) -> bool:
        """Say whether others come first. None does before an output matrix that one worker must take whole:
        it is by far the longest work, and at the end the other workers would wait for it."""
        plans = [export.plan.by_name[name] for export in self.exports]
        return name != HEAD or all(plan.row_step < plan.shape[0] for plan in plans)

    def slices(self) -> Iterator[_Slice]:
        """Load tensor after tensor and cut each into slices of whole steps of rows."""
        for name in self.specs:
            tensor = self.weights.load(name)
            rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
            step = math.lcm(*(export.plan.by_name[name].row_step for export in self.exports))
            n_rows = max(self._slice_elements(name) // rows.shape[1] // step, 1) * step
            for start in range(0, len(rows), n_rows):
                yield _Slice(name, start, rows[start : start + n_rows], start + n_rows >= len(rows))

    def _slice_elements(self, name: str) -> int:
        """Return the size of slices: large ones only where no search of the CPU would have to hold them."""
        large = self.on_gpu and all(export.plan.by_name[name].suits_gpu for export in self.exports)
        return GPU_SLICE_ELEMENTS if large else SLICE_ELEMENTS

    def work(self, part: _Slice) -> _Outcome:
        """Look at a slice and, while all is well, write it; runs in a worker."""
        low, high = (float(bound) for bound in torch.aminmax(part.rows))  # NaN if there is one
        peak = max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf
        fits = all(peak < export.plan.by_name[part.name].overflow for export in self.exports)
        if not fits or self.not_finite or self.too_large or not math.isfinite(peak):
            return _Outcome(part, peak)
        written = [export.writer.put(part.name, part.first_row, part.rows) for export in self.exports]
        return _Outcome(replace(part, rows=part.rows[:0]), peak, tuple(written))

    def settle(self, outcome: _Outcome) -> None:
        """Take note of a slice's outcome, in the order of the slices."""
        part = outcome.part
        if not math.isfinite(outcome.peak):
            counts = self.not_finite.setdefault(part.name, Counter())
            counts.update(NaN=int(part.rows.isnan().sum()), infinite=int(part.rows.isinf().sum()))
            return
        for export in self.exports:
            tensor = export.plan.by_name[part.name]
            if outcome.peak >= tensor.overflow:
                key = (part.name, tensor.quant)
                self.too_large[key] = max(outcome.peak, self.too_large.get(key, 0.0))
        for pieces, piece in zip(self.pieces, outcome.written, strict=False):
            pieces[part.name].append(piece)
        if part.is_last:
            n_bytes = self.specs[part.name].n_bytes
            self.n_done += n_bytes
            self.on_event(TensorDone(part.name, n_bytes, self.n_done, self.n_total))

    def raise_faults(self) -> None:
        """Raise one error that names every tensor which cannot be exported."""
        reasons = [
            f"{name}: {counts['NaN']} NaN and {counts['infinite']} infinite of {self.specs[name].n_elements}"
            for name, counts in self.not_finite.items()
        ]
        if self.not_finite or self.too_large:
            for export in self.exports:
                export.writer.discard()
        unfit = [f"{name}: {peak:.6g} does not fit {quant}" for (name, quant), peak in self.too_large.items()]
        if reasons:
            hint = "the checkpoint is damaged: fetch it again, or look at how it was trained or merged"
            raise CheckpointError("weights that are not finite numbers", reasons=reasons + unfit, hint=hint)
        if unfit:
            raise PlanError("weights too large for the type", reasons=unfit, hint="choose BF16 or F32")


@contextmanager
def one_thread_per_worker() -> Iterator[None]:
    """Keep torch from starting threads of its own inside each worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
