"""What tells one model from another: its figures, its tensors, and a sample of every tensor's values.

    config    the figures of LlamaConfig
    tensors   name -> [shape, dtype, sha256 of a sample of the values (its first 16 digits)]

A fine-tuned model differs from its base in nearly every weight, and a merged adapter in whole matrices; so
a few hundred values of each tensor are enough, and a model of 13 GB is known in seconds through its memory
map.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.inventory import found_by_spec

_RUNS, _RUN = 32, 8  # places that are looked at, and values at each
_DIGITS = 16
_LISTED = 12


def fingerprint(checkpoint: Checkpoint, *, values: bool = True) -> dict[str, Any]:
    """Return the model's fingerprint, made of what JSON has.

    Without `values` no weight is read, and the digests are None: two models of one shape look alike. Raises
    CheckpointError for unreadable data.
    """
    tensors = {}
    for name, spec in checkpoint.weights.specs().items():  # in the order that is cheapest to read
        found = found_by_spec(spec)
        digest = _sample(checkpoint.weights.load(name)) if values else None
        tensors[name] = [list(found.shape), found.dtype, digest]
    return {"config": asdict(checkpoint.config), "tensors": dict(sorted(tensors.items()))}


def differences(archived: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Return every reason why the second fingerprint is not that of the first model (none: it is)."""
    reasons = [
        f"{key} is {value}, in the archive {archived['config'].get(key)}"
        for key, value in model["config"].items()
        if archived["config"].get(key) != value
    ]
    found = list(_tensor_differences(archived["tensors"], model["tensors"]))
    more = [f"and {len(found) - _LISTED} more tensors"] if len(found) > _LISTED else []
    return reasons + found[:_LISTED] + more


def _tensor_differences(archived: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(archived.keys() | model.keys()):
        if name not in model or name not in archived:
            yield f"{name}: only {'the model' if name in model else 'the archive'} has it"
        elif archived[name][:2] != model[name][:2]:
            shape, dtype = model[name][:2]
            yield f"{name}: {dtype} {shape}, in the archive {archived[name][1]} {archived[name][0]}"
        elif model[name][2] is not None and archived[name] != model[name]:
            yield f"{name}: other values"


def _sample(tensor: torch.Tensor) -> str:
    """Return a hash of runs of values that are spread evenly over the tensor."""
    flat = tensor.reshape(-1)
    step = max(len(flat) // _RUNS, _RUN)
    runs = [flat[start : start + _RUN] for start in range(0, len(flat), step)]
    values = torch.cat([*runs, flat[-_RUN:]]).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()[:_DIGITS]
