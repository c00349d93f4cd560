"""Encoding where it is fastest: on one device, or slice after slice on several in turn.

A search has two forms with the same bits: compiled for the CPU, and in torch operations for a GPU. Which one
encodes is decided here for each type. Those that have no second form (IQ1 to IQ3), and those that only copy,
are encoded on the CPU whatever the device: for them a GPU would be a detour. Rows are independent, so the
bytes do not depend on how many devices there are or on which of them took which slice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from threading import BoundedSemaphore

import torch

from quantize.codecs.base import Codec
from quantize.errors import DscqError, UsageError
from quantize.reference import usable_device

SLICES_PER_DEVICE = 2
"""On each GPU: while one slice is worked on, the next one travels. More would only take memory."""


def encoding_gpus(name: str) -> tuple[torch.device, ...]:
    """Return the GPUs that the name of a device means: none for `cpu`, all there are for `cuda`.

    Raises UsageError for a device that is not there or on which types are not searched.
    """
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: quant types are encoded on cpu and cuda devices")
    if device.type == "cpu":
        return ()
    numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
    return tuple(torch.device("cuda", number) for number in numbers)


class Encoder:
    """Encodes rows that lie on the CPU, on `gpus` where the type gains from it; from any thread."""

    def __init__(self, gpus: tuple[torch.device, ...] = ()) -> None:
        """Take the GPUs that `encoding_gpus` returned; without any, all is encoded on the CPU."""
        places = [(gpu, BoundedSemaphore(SLICES_PER_DEVICE)) for gpu in gpus]
        # `next` of a cycle is one step of the interpreter: threads need no lock.
        self._places = cycle(places) if gpus else None

    def encode(self, kind: Codec, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the blocks, uint8 (N, row_bytes), on the CPU; see `Codec.encode`.

        Raises DscqError, beside what that raises, where a device has too little memory or fails.
        """
        with self.place(kind, gains=kind.gains_from_gpu) as device:
            if device.type == "cpu":
                return kind.encode(rows, importance)
            return kind.encode(rows.to(device), importance).cpu()

    @contextmanager
    def place(self, kind: Codec, *, gains: bool) -> Iterator[torch.device]:
        """Say where to encode rows, and keep room there meanwhile: on the next GPU, once it has any, or on
        the CPU where there is none or the type gains nothing from it.

        Raises DscqError in place of what torch does where the device has too little memory or fails.
        """
        if self._places is None or not gains:
            yield torch.device("cpu")
            return
        device, room = next(self._places)
        with room, failures_explained(device, f"encode {kind.name}"):
            yield device


@contextmanager
def failures_explained(
    device: torch.device | str, purpose: str, hint: str = "free memory of the GPU, or use --device cpu"
) -> Iterator[None]:
    """Raise DscqError in place of what torch does where a GPU has too little memory (`hint`), or fails."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DscqError(f"{device}: too little memory to {purpose}", hint=hint) from error
    except torch.AcceleratorError as error:
        cause = str(error).splitlines()[0]
        raise DscqError(f"device {device} failed: {cause}", hint="use --device cpu") from error
