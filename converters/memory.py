"""How much memory a run takes, from the plan alone.

What counts is what the process allocates; the page cache, through which checkpoint and files stream, gives
way to others. Writing hardly depends on the model: a slice for each worker. Proving takes what it has in its
hands at once, in f32: decoded matrices, then a decoder block, then the output matrices of both sides; these
stay while the runtime holds the file, whose blocks it may have rearranged into memory of its own.

Measured, with two workers: 260 to 360 MB for writing the 6.7B in any type (scripts/bench/convert_memory), and
for the proof of two of its layers in Q4_K_M 1.85 GB for the tensors, 2.4 GB for the forwards, 2.2 GB in
llama.cpp; from the rules below 1.9, 2.5 and 1.8 GB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converters.checkpoint import Checkpoint
from converters.plan import ConvertOptions, Plan
from converters.proof.tensors import MOST_WORKERS as PROOF_WORKERS
from converters.stream import GPU_SLICE_ELEMENTS, MAX_WORKERS, SLICE_ELEMENTS
from quantize.llama import EMBEDDING, LlamaConfig

_PROCESS = 350_000_000  # the libraries and the compiled searches
_WORKER = 20_000_000
# For each weight of a GPU's slice: rows in GGUF's order (2 bytes), and up to three results of 8.5 bits, which
# wait for their hash.
_GPU_SLICE_BYTES = 6
_SOLVED = 40  # bytes for each weight of a slice: W, what it should be, codes, gradients
_COMPARED = 6  # bytes for each weight of a matrix that is decoded and compared
_F32 = 4


@dataclass(frozen=True)
class Needs:
    """Bytes of memory at the peak: for writing, and for the proof after it."""

    writing: int
    proof: int


def memory_needs(checkpoint: Checkpoint, plans: Sequence[Plan], options: ConvertOptions) -> Needs:
    """Return about how much memory the run takes."""
    config = checkpoint.config
    # An adapter's update of a tensor is made whole, and so is the sum; so is what is folded, from f32.
    changed = checkpoint.provenance.adapter is not None or checkpoint.fold is not None
    merged = 2 * _F32 * _largest_matrix(config) if changed else 0
    worker = _WORKER + (_GPU_SLICE_BYTES * GPU_SLICE_ELEMENTS if options.on_gpu else 0)
    writing = min(options.n_threads, MAX_WORKERS) * worker + _solving(config, plans, options)
    heads = 2 * _F32 * config.vocab_size * config.hidden_size
    block = _F32 * sum(_matrix_sizes(config)[1:])
    in_hand = (
        min(options.n_threads, PROOF_WORKERS) * _COMPARED * _largest_matrix(config),
        max(block, heads) + 2 * _F32 * _largest_matrix(config),
        heads + max(plan.n_bytes for plan in plans),
    )
    return Needs(_PROCESS + merged + writing, _PROCESS + merged + max(in_hand))


def _solving(config: LlamaConfig, plans: Sequence[Plan], options: ConvertOptions) -> int:
    """Return what the Hessians of two inputs take, and each worker's rows in the solver's hands."""
    if not any(tensor.compensated for plan in plans for tensor in plan.tensors):
        return 0
    widths = sorted({shape[1] for shape in config.block_shapes().values() if len(shape) > 1})
    # Of each input H as it is and factored; while one is factored, two more of its size.
    squares = 4 * widths[-1] ** 2 + 2 * widths[-2 if len(widths) > 1 else -1] ** 2
    # A matrix that comes whole is one slice.
    whole = [t.row_step * t.shape[-1] for plan in plans for t in plan.tensors if t.compensated]
    workers = min(options.n_threads, MAX_WORKERS) * _SOLVED * max(SLICE_ELEMENTS, *whole)
    return _F32 * squares + workers


def _largest_matrix(config: LlamaConfig) -> int:
    return max(_matrix_sizes(config))


def _matrix_sizes(config: LlamaConfig) -> list[int]:
    """Return the numbers of weights of the embedding and of one block's tensors."""
    shapes = (config.tensor_shapes()[EMBEDDING], *config.block_shapes().values())
    return [math.prod(shape) for shape in shapes]
