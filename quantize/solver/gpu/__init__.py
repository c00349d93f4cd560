"""The solver's inner loops on a GPU, written in Triton: the twins of the compiled loops of the CPU.

A program of a kernel holds all columns of a few rows in registers and walks over the columns as the loops of
the CPU do; nothing travels between programs. All is f32, and no product is rounded to TF32. Sums are ordered
otherwise than on the CPU, so that a near-tie may fall to the other side: codes are as good, not the same.

    columns      codes rounded with compensation, codes moved to their best: GPTQ, EXL2 and ggml's blocks
    type_search  the searches of ggml's types, of which compensation needs the scales
    beside       the search of scales beside those that there are
    refit        the refit of scales to their codes

Triton comes with torch's CUDA builds for Linux. The modules of this package need it and are imported only
where `takes` says that they can serve: on a CPU nothing of it is ever loaded. With TRITON_INTERPRET=1 in the
environment kernels run on tensors of the CPU, slowly: tests do that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock

import torch

_LAUNCHING = Lock()


@cache
def available() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def takes(device: torch.device) -> bool:
    """Return whether the kernels serve the tensors of a device."""
    return device.type == "cuda" and available()


@contextmanager
def launching(tensor: torch.Tensor) -> Iterator[None]:
    """Launch kernels on a tensor's device, one thread at a time: the first launch of each compiles it."""
    with _LAUNCHING, torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        yield
