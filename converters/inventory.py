"""What the config demands against what the shards hold: missing, extra and misshaped tensors, dtypes."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from quantize.weights import TensorSpec, Weights

SOURCE_DTYPES = ("BF16", "F16", "F32")
_LISTED = 12  # names per reason; whole absent layers would fill the screen and say no more

# Buffers that old versions of transformers saved: constants that every implementation computes itself.
_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.bias$|\.attn\.bias$|\.masked_bias$")


@dataclass(frozen=True)
class Found:
    """One tensor as its file describes it; `dtype` in the words of safetensors (`BF16`)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Inventory:
    """Everything that the files hold, and the way to open a choice of it as Weights, in that order."""

    found: Mapping[str, Found]
    open: Callable[[Sequence[str]], Weights]


def found_by_spec(spec: TensorSpec) -> Found:
    """Return what a spec says in the words of safetensors."""
    words = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    return Found(spec.shape, words.get(spec.dtype) or str(spec.dtype).removeprefix("torch."))


def tensor_reasons(config: LlamaConfig, found: Mapping[str, Found]) -> list[str]:
    """Return every reason why these tensors are not those of the model (empty: they are).

    Harmless extras are passed over: buffers of old versions of transformers, and the head of a model with
    a tied head (whether it equals the embedding is for the caller to see, who has the data).
    """
    wanted = config.tensor_shapes()
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not harmless(config, name)]
    reasons = [_listing("missing", missing), _listing("extra, not part of a Llama", extra)]
    reasons += [_listing("misshaped", _misshaped(config, found))]
    reasons += _dtype_reasons({name: found[name] for name in wanted if name in found})
    return [reason for reason in reasons if reason]


def harmless(config: LlamaConfig, name: str) -> bool:
    """Return whether an extra tensor may be passed over."""
    return bool(_HARMLESS.search(name)) or (config.tied_head and name == HEAD)


def _misshaped(config: LlamaConfig, found: Mapping[str, Found]) -> Iterator[str]:
    wanted = config.tensor_shapes()
    wanted.setdefault(HEAD, wanted[EMBEDDING])
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name]:
            yield f"{name} {list(tensor.shape)} (expected {list(wanted[name])})"


def _dtype_reasons(found: Mapping[str, Found]) -> Iterator[str]:
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in found.items():
        if tensor.dtype not in SOURCE_DTYPES:
            by_dtype.setdefault(tensor.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        yield _listing(f"stored as {dtype} (supported: {', '.join(SOURCE_DTYPES)})", names)


def _listing(what: str, names: Iterable[str]) -> str:
    """Return `3 tensors missing: a, b, c`, cut after a dozen names, or "" for none."""
    all_names = list(names)
    if not all_names:
        return ""
    rest = len(all_names) - _LISTED
    tail = f" and {rest} more" if rest > 0 else ""
    count = f"{len(all_names)} tensor{'s' if len(all_names) > 1 else ''}"
    return f"{count} {what}: {', '.join(all_names[:_LISTED])}{tail}"
