"""Where the tensors of an EXL2 folder lie: every byte once, everything at a place of its own size."""

from itertools import pairwise
from pathlib import Path

import pytest

from converters.checkpoint import open_checkpoint
from converters.plan import ConvertOptions, Plan, Request
from converters.safetensors_header import read_header
from converters.targets.exl2 import Exl2Target
from converters.targets.exl2_layout import members, places
from converters.targets.exl2_types import parse_layout
from quantize.codecs.exl2 import Group
from quantize.errors import PlanError

SIZE = Request("exl2", "3.5,h8")


def planned(folder: Path, max_bytes: int | None = None) -> Plan:
    options = ConvertOptions(folder, split_max_bytes=max_bytes)
    return Exl2Target().plan(open_checkpoint(folder), SIZE, options)


def groups_of(plan: Plan) -> dict[str, tuple[Group, ...]]:
    quantized = [tensor for tensor in plan.tensors if tensor.quant != "F16"]
    return {t.name: parse_layout(t.quant).groups(t.shape[1]) for t in quantized}


@pytest.mark.parametrize("max_bytes", [None, 2_000_000])
def test_the_members_of_a_file_fill_it(demo_folder: Path, tmp_path: Path, max_bytes: int | None) -> None:
    plan = planned(demo_folder, max_bytes)
    groups, where = groups_of(plan), places(plan, groups_of(plan))
    shards = {tensor.file for tensor in plan.tensors}
    names = [plan.files[number].name for number in sorted(shards)]
    expected = ["output.safetensors"]
    if max_bytes is not None:
        expected = [f"output-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        assert len(shards) > 1
    assert names == expected
    for number in shards:
        file = plan.files[number]
        inside = [tensor for tensor in plan.tensors if tensor.file == number]
        runs = sorted((place.offset, place.n_bytes) for t in inside for place in where[t.name])
        assert runs[0][0] == len(file.head) and sum(runs[-1]) == file.n_bytes
        assert all(start + size == after for (start, size), (after, _) in pairwise(runs))
        (tmp_path / file.name).write_bytes(file.head.ljust(file.n_bytes, b"\0"))
        entries = {entry.name: entry for entry in read_header(tmp_path / file.name)}
        assert sum(len(where[t.name]) for t in inside) == len(entries)
        for tensor in inside:
            own = members(tensor.name, tensor.shape, groups)
            assert sum(member.n_bytes for member in own) == tensor.n_bytes
            for member, place in zip(own, where[tensor.name], strict=True):
                entry = entries[member.name]
                assert (entry.start, entry.n_bytes) == (place.offset, place.n_bytes)
                assert (entry.dtype, entry.shape) == (member.dtype, member.shape)
                assert place.offset % (4 if member.dtype == "I32" else 2) == 0


def test_a_linear_that_does_not_fit_a_file_is_named(demo_folder: Path) -> None:
    with pytest.raises(PlanError, match="tensors are never cut") as caught:
        planned(demo_folder, 300_000)
    assert any("lm_head" in reason for reason in caught.value.reasons)
    assert not any("layers.0.self_attn" in reason for reason in caught.value.reasons)
