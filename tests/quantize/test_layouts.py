"""EXL2's layouts: the groups they become, the bits they take, and ExLlamaV2's own count of both."""

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from quantize.codecs.exl2 import Group, encode, group_faults
from quantize.layouts import ATTENTION, DOWN, GATE_UP, HEAD, Layout, layout
from tests.quantize.exl2_runtime import VARIABLE
from tests.quantize.test_codecs_exl2 import linear

ALL = {*ATTENTION, *GATE_UP, *DOWN, *HEAD.values()}
SHAPES = [(2048, 2048), (5504, 2048), (2048, 5504), (11008, 4096), (4096, 11008), (1024, 7168), (7168, 19200)]


def test_shares_become_whole_groups() -> None:
    made = layout((5, 64, 0.1), (4, 64, 0.9))
    assert made.name == "5b64:0.1 4b64:0.9"
    assert made.groups(1024) == (Group(5, 64),) * 2 + (Group(4, 64),) * 14
    assert made.groups(672) == (Group(5, 64),) * 2 + (Group(4, 64),) * 8 + (Group(4, 32),)
    assert made.groups(64) == (Group(5, 64),)


@pytest.mark.parametrize("n_inputs", [32, 64, 160, 576, 768, 1536, 2048, 4096, 5504, 7168, 11008, 19200])
def test_every_layout_divides_every_number_of_inputs(n_inputs: int) -> None:
    for made in ALL:
        assert group_faults(made.groups(n_inputs), n_inputs) == []


def test_total_bits_are_those_of_the_tensors() -> None:
    for made in (ATTENTION[2], DOWN[0], GATE_UP[3]):
        groups = made.groups(448)
        for n in (8, 41, 64):
            tensors = vars(encode(linear([(group.bits, group.size) for group in groups], n))).values()
            assert made.total_bits(n, 448) == sum(tensor.numel() * tensor.itemsize * 8 for tensor in tensors)


def test_a_family_has_each_layout_once() -> None:
    for family in (ATTENTION, GATE_UP, DOWN):
        assert len(set(family)) == len(family)
        assert len({made.name for made in family}) == len(family)


@pytest.fixture(scope="module")
def qparams() -> dict[str, Any]:
    package = os.environ.get(VARIABLE)
    if not package:
        pytest.skip(f"{VARIABLE} names no package of ExLlamaV2 (scripts/exllamav2_sources fetches it)")
    return runpy.run_path(str(Path(package) / "conversion" / "qparams.py"))


def ours(theirs: Any) -> Layout:
    shares = zip(theirs.bits, theirs.bits_prop, strict=True)
    return layout(*((bits, theirs.group_size[bits], share) for bits, share in shares))


def test_the_families_are_exllamav2s(qparams: dict[str, Any]) -> None:
    attention = {ours(each).name for option in qparams["qparams_attn"] for each in option}
    mlp = [{ours(option[i]).name for option in qparams["qparams_mlp"]} for i in range(3)]
    assert attention == {made.name for made in ATTENTION}
    assert mlp[0] | mlp[1] == {made.name for made in GATE_UP}
    assert mlp[2] == {made.name for made in DOWN}
    assert {bits: ours(each).name for bits, each in qparams["qparams_headoptions"].items()} == {
        bits: made.name for bits, made in HEAD.items()
    }


def test_bits_are_counted_as_exllamav2_counts_them(qparams: dict[str, Any]) -> None:
    options = [
        each for name in ("qparams_attn", "qparams_mlp") for option in qparams[name] for each in option
    ]
    for theirs in (*options, *qparams["qparams_headoptions"].values()):
        for n_outputs, n_inputs in SHAPES:
            assert ours(theirs).total_bits(n_outputs, n_inputs) == theirs.total_bits((n_inputs, n_outputs))
