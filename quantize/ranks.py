"""Several processes that calibrate one model together: torch.distributed, reduced to what calibration needs.

Rows are shared out, every rank pushes its own through the blocks, and after each block the sums are added
over all ranks. One process alone is one rank, for which all of this does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# Ranks meet once a block, which may take hours on processors; torchrun ends the others when one dies.
_PATIENCE = timedelta(hours=24)


class Ranks:
    """This process's number among `count` processes, and what they do together.

    Every method but `sum_` of an empty list is collective: all ranks must call it, in the same order.
    """

    def __init__(self) -> None:
        """Take the number and the count from the process group that is initialized, if one is."""
        together = distributed.is_available() and distributed.is_initialized()
        self.number = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which must be picklable, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, for the body: gloo on the CPU, NCCL on CUDA.

    Without torchrun's environment, or inside a group that is initialized already, nothing is started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks()
    finally:
        distributed.destroy_process_group()


def rank_device(device: torch.device) -> torch.device:
    """Return this rank's own GPU where torchrun started several on a machine and no number was given."""
    local = os.environ.get("LOCAL_RANK")
    own = device.type == "cuda" and device.index is None and local is not None
    return torch.device("cuda", int(local or 0)) if own else device


def share_out(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return the rows of each of `count` ranks, in rising order, with about the same number of tokens each.

    The longest row goes first, each to the rank that has the fewest tokens so far (the first of several).
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    return [sorted(share) for share in shares]
