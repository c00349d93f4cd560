"""A GPU that is not there: tensors of the CPU that say `cuda:0` and refuse to meet those that do not.

Where no GPU is, this finds what one would complain about: tensors of two devices in one operation, an
index on the wrong device, numpy on a GPU's tensor. It computes on the CPU, so that results can be compared.

    with pretended_gpu():
        W.to("cuda:0") @ H                  RuntimeError, H being on the CPU

Operations are caught where Python calls torch (`__torch_function__`), in the thread that entered and in
those started meanwhile; custom autograd functions are not caught.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
PROPERTIES = {torch.Tensor.device: DEVICE, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
MIXED = ("copy_", "__getitem__", "__setitem__", "to")
"""What may take tensors of both devices; what it may not do with them is judged one by one."""
DIFFERENT = "Expected all tensors to be on the same device"


class There(torch.Tensor):
    """A tensor on the pretended GPU."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Do it there."""
        return _run(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let `cuda:0` be used; the torch that asks whether there is one is told so."""
    plain_run = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _Mode():
            plain_run(thread)

    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(threading.Thread, "run", run)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        yield


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__" and isinstance(args[0], There):
            asked = getattr(func, "__self__", None)
            if asked in PROPERTIES:
                return PROPERTIES[asked]
        _check(name, args, kwargs)
        goes = _destination(name, args, kwargs).type == "cuda"
        plain_args, plain_kwargs = tree_map(_here, (list(args), dict(kwargs)))
        result = func(*plain_args, **plain_kwargs)
        return tree_map(_there if goes else _here, result)


def _there(value: Any) -> Any:
    return value.as_subclass(There) if isinstance(value, torch.Tensor) else value


def _here(value: Any) -> Any:
    """Return a tensor as it is, and the CPU in place of the GPU."""
    if isinstance(value, There):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _check(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise what a GPU's torch raises."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = any(isinstance(each, There) for each in tensors)
    mixed = there and any(not isinstance(each, There) and each.ndim for each in tensors)
    if there and name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if mixed and name not in MIXED:
        raise RuntimeError(f"{DIFFERENT}: {name}")
    if mixed and name == "__getitem__" and not isinstance(args[0], There):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    if (
        mixed
        and name == "__setitem__"
        and any(isinstance(each, torch.Tensor) for each in tree_leaves(args[1]))
    ):
        raise RuntimeError(f"{DIFFERENT}: index_put_")


def _destination(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Return where a result belongs."""
    asked = kwargs.get("device", args[1] if name == "to" and len(args) > 1 else None)
    if name == "cpu":
        return CPU
    if isinstance(asked, (str, torch.device)):
        return torch.device(asked)
    deciding = args[:1] if name in ("copy_", "to") else tree_leaves((list(args), dict(kwargs)))
    if isinstance(asked, torch.Tensor):
        deciding = [asked]
    return DEVICE if any(isinstance(each, There) for each in deciding) else CPU
