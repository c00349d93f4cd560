"""Where the tensors of an EXL2 checkpoint lie in its safetensors files.

A linear becomes the five tensors of `quantize.codecs.exl2`, every other tensor is half precision:

    model.layers.0.mlp.up_proj.q_weight      I32 (rows of words, Np)
    model.layers.0.mlp.up_proj.q_invperm     I32 (K,)
    model.layers.0.mlp.up_proj.q_scale       I32 (G, Np / 8)
    model.layers.0.mlp.up_proj.q_scale_max   F16 (G,)
    model.layers.0.mlp.up_proj.q_groups      I16 (2 G,)
    model.norm.weight                        F16

In a file all words of 32 bits come first: an odd number of groups would leave those behind it at an odd
place. So a linear lies in two places. There is no index file, and the files have the names that
ExLlamaV2's own converter gives them; its loader takes every *.safetensors in the folder.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from converters.places import Place
from converters.plan import FilePlan, Plan, TensorPlan
from converters.safetensors_header import head_bytes
from quantize.codecs.exl2 import Group
from quantize.errors import PlanError

FLOAT = "F16"
_HEAD = 200  # of a file's head for each tensor, at the most
_SIZES = {"I32": 4, "F16": 2, "I16": 2}

Groups = Mapping[str, tuple[Group, ...]]
"""The groups of every quantized linear, by the checkpoint's names."""


@dataclass(frozen=True)
class Member:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its bytes."""
        return _SIZES[self.dtype] * math.prod(self.shape)


def part_shapes(groups: Sequence[Group], shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the five tensors of a linear (N, K), in the order of `Exl2Tensors`."""
    n, k = shape
    padded, count = n + -n % 32, len(groups)
    return {
        "q_weight": ("I32", (sum(group.words for group in groups), padded)),
        "q_invperm": ("I32", (k,)),
        "q_scale": ("I32", (count, padded // 8)),
        "q_scale_max": ("F16", (count,)),
        "q_groups": ("I16", (2 * count,)),
    }


def members(name: str, shape: tuple[int, ...], groups: Groups) -> list[Member]:
    """Return the tensors that a tensor of the checkpoint becomes, words of 32 bits first."""
    if name not in groups:
        return [Member(name, FLOAT, shape)]
    module = name.removesuffix(".weight")
    parts = part_shapes(groups[name], (shape[0], shape[1]))
    return [Member(f"{module}.{part}", *each) for part, each in parts.items()]


def n_bytes(name: str, shape: tuple[int, ...], groups: Groups) -> int:
    """Return the bytes that a tensor of the checkpoint takes."""
    return sum(member.n_bytes for member in members(name, shape, groups))


def shard(
    tensors: Sequence[TensorPlan], groups: Groups, max_bytes: int, first_file: int
) -> tuple[list[FilePlan], list[TensorPlan]]:
    """Return the safetensors files, numbered from `first_file`, and the tensors in their places.

    Raises PlanError, naming every tensor that is alone larger than `max_bytes`.
    """
    parts, sizes = list[list[TensorPlan]]([[]]), [_HEAD]
    for tensor in tensors:
        added = tensor.n_bytes + _HEAD * len(members(tensor.name, tensor.shape, groups))
        if parts[-1] and sizes[-1] + added > max_bytes:
            parts, sizes = [*parts, []], [*sizes, _HEAD]
        parts[-1].append(tensor)
        sizes[-1] += added
    if max(sizes) > max_bytes:
        sized = zip(parts, sizes, strict=True)
        reasons = [f"{part[0].written_name}: {size:,} bytes" for part, size in sized if size > max_bytes]
        raise PlanError(f"files of at most {max_bytes} bytes: tensors are never cut", reasons=reasons)
    files, placed = [], []
    for number, part in enumerate(parts):
        inside = _in_order(part, groups)
        head = head_bytes((each.name, each.dtype, each.shape, each.n_bytes) for each in inside)
        starts = _starts(inside, len(head))
        for tensor in part:
            first = members(tensor.name, tensor.shape, groups)[0]
            placed.append(replace(tensor, file=first_file + number, offset=starts[first.name]))
        end = len(head) + sum(each.n_bytes for each in inside)
        files.append(FilePlan(_file_name(number, len(parts)), head, end))
    return files, placed


def places(plan: Plan, groups: Groups) -> dict[str, tuple[Place, ...]]:
    """Return where the members of each tensor lie in its file, in the order of `members`."""
    found = {}
    for number, file in enumerate(plan.files):
        part = [tensor for tensor in plan.tensors if tensor.file == number]
        starts = _starts(_in_order(part, groups), len(file.head)) if part else {}
        for tensor in part:
            own = members(tensor.name, tensor.shape, groups)
            found[tensor.name] = tuple(Place(starts[each.name], each.n_bytes) for each in own)
    return found


def _in_order(tensors: Sequence[TensorPlan], groups: Groups) -> list[Member]:
    """Return the members of a file in the order of their bytes: words of 32 bits, then of 16."""
    inside = [member for tensor in tensors for member in members(tensor.name, tensor.shape, groups)]
    return sorted(inside, key=lambda member: -_SIZES[member.dtype])


def _starts(inside: Sequence[Member], first: int) -> dict[str, int]:
    starts, at = {}, first
    for member in inside:
        starts[member.name] = at
        at += member.n_bytes
    return starts


def _file_name(number: int, count: int) -> str:
    return "output.safetensors" if count == 1 else f"output-{number + 1:05d}-of-{count:05d}.safetensors"
