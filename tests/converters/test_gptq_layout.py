"""What `--to gptq:` can say, and where the tensors lie."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from converters.places import Place
from converters.plan import TensorPlan
from converters.targets.gptq_layout import members, shard, stripe
from converters.targets.gptq_spec import GptqSpec, parse_spec
from quantize.errors import PlanError, UsageError


@pytest.mark.parametrize(
    ("text", "spec", "directory"),
    [
        ("4bit-128g", GptqSpec(), "gptq-4bit-128g"),
        ("4BIT", GptqSpec(), "gptq-4bit-128g"),
        ("3bit-32g,asym", GptqSpec(3, 32, symmetric=False), "gptq-3bit-32g-asym"),
        ("8bit--1g, desc_act", GptqSpec(8, -1, desc_act=True), "gptq-8bit--1g-desc_act"),
        ("2bit-64g,v2,DESC_ACT", GptqSpec(2, 64, desc_act=True, version=2), "gptq-2bit-64g-desc_act-v2"),
    ],
)
def test_specs_are_read_and_spelt(text: str, spec: GptqSpec, directory: str) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(str(spec)) == spec
    assert spec.directory == directory


@pytest.mark.parametrize("text", ["", "4", "5bit-128g", "4bit-16g", "4bit-128", "4bit-128g,sym", "4bit,,"])
def test_other_specs_are_refused_with_what_is_known(text: str) -> None:
    with pytest.raises(UsageError, match="known: "):
        parse_spec(text)


def linear(name: str, n: int, k: int, spec: GptqSpec) -> TensorPlan:
    tensor = TensorPlan(f"{name}.weight", name, (n, k), str(spec), "", 0, 0, 0, 32, 1.0)
    return replace(tensor, n_bytes=sum(each.n_bytes for each in members(tensor, {tensor.name: spec})))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_stripes_cover_a_linear_exactly_once(bits: int, group_size: int) -> None:
    spec = GptqSpec(bits, group_size)
    tensor = replace(linear("a", 96, 64, spec), offset=100)
    covered: list[int] = []
    for first, count in ((0, 32), (32, 64)):
        for place in stripe(tensor, spec, first, count):
            covered += [at + i for at, _ in place.runs() for i in range(place.width)]
    assert sorted(covered) == list(range(100, 100 + tensor.n_bytes))


def test_a_stripe_is_words_of_every_row() -> None:
    tensor, spec = linear("a", 64, 64, GptqSpec(4, 32)), GptqSpec(4, 32)
    # qweight (8, 64) I32, qzeros (2, 8) I32, scales (2, 64) F16, g_idx (64,) I32
    assert stripe(tensor, spec, 32, 32) == (
        Place(128, 128, 8, 256),
        Place(2048 + 16, 16, 2, 32),
        Place(2048 + 64 + 64, 64, 2, 128),
    )
    assert stripe(tensor, spec, 0, 32)[-1] == Place(2048 + 64 + 256, 256)


def test_a_tensor_that_is_larger_than_a_file_is_refused() -> None:
    tensor, spec = linear("m", 32, 64, GptqSpec(4, 32)), GptqSpec(4, 32)
    with pytest.raises(PlanError, match="m: 2,440 bytes"):
        shard([tensor], {tensor.name: spec}, 1000, 0)


@pytest.mark.parametrize(("max_bytes", "count"), [(10**9, 1), (5000, 2), (2700, 3)])
def test_shards_are_files_that_safetensors_reads(tmp_path: Path, max_bytes: int, count: int) -> None:
    spec = GptqSpec(4, 32)
    plans = [linear(f"m.{i}", 32, 64, spec) for i in range(3)]
    plans.append(TensorPlan("norm.weight", "norm.weight", (6,), "F16", "", 12, 0, 0, 1, 1.0))
    specs = dict.fromkeys([plan.name for plan in plans[:3]], spec)
    files, placed = shard(plans, specs, max_bytes, first_file=2)
    shards = [file for file in files if file.name.endswith(".safetensors")]
    assert len(shards) == count and {tensor.file for tensor in placed} == set(range(2, 2 + count))
    seen: dict[str, str] = {}
    for file in shards:
        path = tmp_path / file.name
        path.write_bytes(file.head + bytes(file.n_bytes - len(file.head)))
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                seen[name] = file.name
                assert opened.get_tensor(name).dtype in (torch.int32, torch.float16)
    assert len(seen) == 13 and len(files) == (1 if count == 1 else count + 1)
    if count > 1:
        assert all(file.n_bytes <= max_bytes for file in shards)
        assert json.loads(files[-1].head)["weight_map"] == seen
    for tensor in placed:
        file = files[tensor.file - 2]
        assert tensor.offset >= len(file.head) and tensor.offset + tensor.n_bytes <= file.n_bytes
