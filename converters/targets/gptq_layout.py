"""Where the tensors of a GPTQ checkpoint lie in its safetensors files.

The four tensors of a quantized linear lie next to each other, so that a linear is one region of one file:

    model.layers.0.mlp.up_proj.qweight   I32 (K * bits / 32, N)
    model.layers.0.mlp.up_proj.qzeros    I32 (G, N * bits / 32)
    model.layers.0.mlp.up_proj.scales    F16 (G, N)
    model.layers.0.mlp.up_proj.g_idx     I32 (K,)

A slice of the model's rows n..m is a stripe of the first three: words n..m of every row of `qweight`, and so
on. `g_idx` goes with the slice that begins at row 0.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from converters.places import Place
from converters.plan import FilePlan, TensorPlan
from converters.safetensors_header import head_bytes
from converters.targets.gptq_spec import GptqSpec
from quantize.errors import PlanError

FLOAT = "F16"
_HEAD = 200  # of a file's head for each tensor, at the most
ROW_STEP = 32
"""Rows whose zero-points fill whole words, whatever the bits."""


@dataclass(frozen=True)
class Member:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        """What the head of the file says of it."""
        return self.name, self.dtype, self.shape, self.n_bytes


def members(tensor: TensorPlan, specs: Mapping[str, GptqSpec]) -> list[Member]:
    """Return the tensors that a tensor of the checkpoint becomes, in the order of their bytes."""
    spec = specs.get(tensor.name)
    if spec is None:
        return [Member(tensor.name, FLOAT, tensor.shape, 2 * math.prod(tensor.shape))]
    n_rows, n_columns = tensor.shape
    groups, module = spec.n_groups(n_columns), tensor.name.removesuffix(".weight")
    shapes = {
        "qweight": ("I32", (n_columns * spec.bits // 32, n_rows)),
        "qzeros": ("I32", (groups, n_rows * spec.bits // 32)),
        "scales": ("F16", (groups, n_rows)),
        "g_idx": ("I32", (n_columns,)),
    }
    sizes = {"I32": 4, "F16": 2}
    return [
        Member(f"{module}.{name}", dtype, shape, sizes[dtype] * math.prod(shape))
        for name, (dtype, shape) in shapes.items()
    ]


def stripe(tensor: TensorPlan, spec: GptqSpec, first_row: int, n_rows: int) -> tuple[Place, ...]:
    """Return the places of a slice's qweight, qzeros and scales, and with row 0 of g_idx."""
    places, at = [], tensor.offset
    *matrices, g_idx = members(tensor, {tensor.name: spec})
    for member in matrices:
        height = member.shape[0]
        row_bytes = member.n_bytes // height
        begin, end = (row_bytes * row // tensor.shape[0] for row in (first_row, first_row + n_rows))
        places.append(Place(at + begin, end - begin, height, row_bytes if height > 1 else 0))
        at += member.n_bytes
    return (*places, Place(at, g_idx.n_bytes)) if first_row == 0 else tuple(places)


def shard(
    tensors: Sequence[TensorPlan], specs: Mapping[str, GptqSpec], max_bytes: int, first_file: int
) -> tuple[list[FilePlan], list[TensorPlan]]:
    """Return the safetensors files, and their index if they are several, and the tensors in their places.

    The files are numbered from `first_file`. Raises PlanError, naming every tensor that is alone larger than
    `max_bytes`.
    """
    parts, sizes = list[list[TensorPlan]]([[]]), [_HEAD]
    for tensor in tensors:
        added = tensor.n_bytes + _HEAD * len(members(tensor, specs))
        if parts[-1] and sizes[-1] + added > max_bytes:
            parts, sizes = [*parts, []], [*sizes, _HEAD]
        parts[-1].append(tensor)
        sizes[-1] += added
    if max(sizes) > max_bytes:
        too_large = [
            f"{part[0].written_name}: {size:,} bytes" for part, size in zip(parts, sizes, strict=True)
        ]
        reasons = [line for line, size in zip(too_large, sizes, strict=True) if size > max_bytes]
        raise PlanError(f"files of at most {max_bytes} bytes: tensors are never cut", reasons=reasons)
    files, placed, owners = [], [], dict[str, str]()
    for number, part in enumerate(parts):
        inside = [member for tensor in part for member in members(tensor, specs)]
        head, name = head_bytes(member.entry for member in inside), _file_name(number, len(parts))
        owners |= {member.name: name for member in inside}
        end = len(head)
        for tensor in part:
            placed.append(replace(tensor, file=first_file + number, offset=end))
            end += tensor.n_bytes
        files.append(FilePlan(name, head, end))
    return files + ([_index(owners, placed)] if len(parts) > 1 else []), placed


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(owners: Mapping[str, str], placed: Sequence[TensorPlan]) -> FilePlan:
    total = sum(tensor.n_bytes for tensor in placed)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
    text = (json.dumps(index, indent=2) + "\n").encode()
    return FilePlan("model.safetensors.index.json", text, len(text))
