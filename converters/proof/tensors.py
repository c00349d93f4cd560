"""Layer (a): every tensor of the written file against its source, block by block.

Float types must hold the source's bits, rounded to the type. Quantized types must have no block that is
unlike its tensor, a relative error within the type's bound, and a gain near one (`quantize.fidelity`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from converters.bounds import GAIN, MOST_SHIFT, bound_of
from converters.checkpoint import Checkpoint
from converters.proof.file import ModelFile
from converters.proof.record import Check, OnProgress, TensorFigures
from quantize.fidelity import BlockReport, check_blocks, check_exact, mean_shift

FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STAGE = "tensors against their source"
MOST_WORKERS = 4  # each holds one decoded tensor
_MOST_NAMED = 5


@dataclass(frozen=True)
class TensorProof:
    """The checks of layer (a) and every tensor's figures."""

    checks: tuple[Check, ...]
    tensors: tuple[TensorFigures, ...]


def prove_tensors(
    file: ModelFile, reference: Checkpoint, *, n_threads: int, on_progress: OnProgress
) -> TensorProof:
    """Compare all tensors; those that only one side has, or with other shapes, are a failed check."""
    expected = reference.config.tensor_shapes()
    found = {name: spec.shape for name, spec in file.weights.specs().items()}
    names = [
        name for name in reference.weights.specs() if name in expected and found.get(name) == expected[name]
    ]
    tensors: list[TensorFigures] = []
    with one_torch_thread_each(min(n_threads, MOST_WORKERS)) as pool:
        for figures in pool.map(lambda name: compare_tensor(file, reference, name), names):
            tensors.append(figures)
            on_progress(STAGE, len(tensors), len(names))
    return TensorProof((_same_list(found, expected), *_judge(tensors)), tuple(tensors))


def compare_tensor(file: ModelFile, reference: Checkpoint, name: str) -> TensorFigures:
    """Load one tensor from both sides and compare it as its quant type demands."""
    quant = file.tensor_types[name]
    source, stored = reference.weights.load(name), file.weights.load(name)
    if quant in FLOATS:
        return TensorFigures(name, quant, check_exact(source, stored, FLOATS[quant]))
    pair = file.by_scale(name, source), file.by_scale(name, stored)
    steps = file.steps(name)
    shift = None if steps is None else mean_shift(source, stored, steps)
    return TensorFigures(name, quant, check_blocks(*pair, file.block_size(name)), shift)


@contextmanager
def one_torch_thread_each(n_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool whose workers do not split their operations any further."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _same_list(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> Check:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not in the checkpoint" for name in found if name not in expected]
    faults += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return Check("tensors", "tensor list", not faults, detail=_some(faults) or f"{len(expected)} tensors")


def _judge(tensors: Sequence[TensorFigures]) -> Iterable[Check]:
    floats = [t for t in tensors if t.quant in FLOATS]
    quantized = [t for t in tensors if t.quant not in FLOATS]
    if floats:
        yield _all_of(floats, "bits of float tensors", _no_outlier, _outliers)
    if quantized:
        yield _all_of(quantized, "blocks within their tensor", _no_outlier, _outliers)
        yield _all_of(quantized, "gain", _gain_fits, lambda t: f"{t.name} {t.report.gain:.3f}")
        yield _worst_relative_error(quantized)
    if shifted := [t for t in quantized if t.shift is not None]:
        yield _all_of(shifted, "zero-points", _in_place, lambda t: f"{t.name} is {t.shift:.2f} steps off")


def _in_place(tensor: TensorFigures) -> bool:
    return tensor.shift is not None and abs(tensor.shift) <= MOST_SHIFT


def _no_outlier(tensor: TensorFigures) -> bool:
    return tensor.report.n_outliers == 0


def _gain_fits(tensor: TensorFigures) -> bool:
    return GAIN[0] <= tensor.report.gain <= GAIN[1]


def _all_of(
    tensors: Sequence[TensorFigures],
    name: str,
    fits: Callable[[TensorFigures], bool],
    describe: Callable[[TensorFigures], str],
) -> Check:
    faults = [describe(tensor) for tensor in tensors if not fits(tensor)]
    return Check("tensors", name, not faults, detail=_some(faults) or f"{len(tensors)} tensors")


def _outliers(tensor: TensorFigures) -> str:
    report: BlockReport = tensor.report
    worst = report.outliers[0]
    return (
        f"{tensor.name} ({tensor.quant}): {report.n_outliers} of {report.n_blocks} blocks, "
        f"row {worst.row} block {worst.block} is off by {worst.relative_error:.3g} of its size"
    )


def _worst_relative_error(tensors: Sequence[TensorFigures]) -> Check:
    def excess(tensor: TensorFigures) -> float:
        return tensor.report.relative_error / bound_of(tensor.quant).relative_error

    # A nan compares as false: it must count as the worst, and as a failure.
    ordered = sorted(tensors, key=lambda t: -excess(t) if excess(t) == excess(t) else float("-inf"))
    faults = [f"{t.name} ({t.quant}) {t.report.relative_error:.3g}" for t in ordered if not excess(t) <= 1]
    worst = ordered[0]
    return Check(
        "tensors",
        "relative error",
        not faults,
        worst.report.relative_error,
        bound_of(worst.quant).relative_error,
        _some(faults) or f"worst is {worst.name} ({worst.quant})",
    )


def _some(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
    return "; ".join(faults[:_MOST_NAMED]) + more
