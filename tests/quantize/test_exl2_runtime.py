"""The EXL2 codec against ExLlamaV2 itself, bit for bit: its packing, its loader, its dequantization."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantize.codecs.exl2 import WIDTHS, Exl2Linear, Group, decode, encode
from tests.quantize.exl2_runtime import VARIABLE, Runtime
from tests.quantize.test_codecs_exl2 import SHAPES, linear


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    package = os.environ.get(VARIABLE)
    if not package:
        pytest.skip(f"{VARIABLE} names no package of ExLlamaV2 (scripts/exllamav2_sources fetches it)")
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile ExLlamaV2's kernels with")
    return Runtime(Path(package), tmp_path_factory.mktemp("exl2_runtime"))


def same(runtime: Runtime, made: Exl2Linear) -> None:
    tensors, n = encode(made), len(made.codes)
    theirs = runtime.weights(tensors)
    assert torch.equal(theirs[:n].contiguous().view(torch.int16), decode(tensors, n).half().view(torch.int16))
    assert torch.equal(theirs, decode(tensors).half())


# More than the 128 inputs of a block: groups end inside of blocks and on their edges, the last is short.
LONG = [
    [(8, 32), (6, 96), (5, 128), (4, 128), (3, 64), (2, 64), (2, 32)],
    [(6, 32), (6, 32), (5, 32), (4, 32), (4, 128), (4, 96), (3, 32), (2, 16), (2, 16), (2, 16), (2, 16)],
    [(4, 128), (4, 128), (3, 128), (3, 128), (3, 32)],
]


@pytest.mark.parametrize("groups", SHAPES + LONG, ids=str)
def test_packing_and_weights_are_the_runtimes(runtime: Runtime, groups: list[tuple[int, int]]) -> None:
    made = linear(groups, 160)
    tensors = encode(made)
    assert torch.equal(tensors.q_weight, runtime.pack_codes(made))
    assert torch.equal(tensors.q_scale, runtime.pack_scales(made))
    same(runtime, made)
    same(runtime, linear(groups, 41, seed=1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_with_every_scale_under_many_maxima(runtime: Runtime, bits: int) -> None:
    """Maxima of every exponent, from 2^-24 to as large as the width allows: 16 scales, all codes."""
    top = 2**bits
    exponents = [float(e) for e in range(-24, 16 - bits)]
    maxima = torch.tensor([2.0**e * f for e, f in itertools.product(exponents, (1.0, 1.37, 1.999))]).half()
    size = max(top, 32)
    codes = (torch.arange(size) % top).to(torch.uint8).repeat(len(maxima)).expand(16, -1).contiguous()
    scales = torch.arange(1, 17, dtype=torch.uint8)[:, None].expand(16, len(maxima)).contiguous()
    groups = tuple(Group(bits, size) for _ in maxima)
    same(runtime, Exl2Linear(codes, groups, scales, maxima, torch.randperm(codes.shape[1])))


def test_the_judge_sees_what_is_wrong(runtime: Runtime) -> None:
    made = linear([(5, 64), (3, 64)], 32)
    right, tensors = made.weights().half(), encode(made)
    damaged = (
        replace(tensors, q_invperm=torch.argsort(tensors.q_invperm).int()),
        replace(tensors, q_scale=tensors.q_scale + 1),
        replace(tensors, q_weight=tensors.q_weight ^ 8),
    )
    assert torch.equal(runtime.weights(tensors), right)
    assert not any(torch.equal(runtime.weights(wrong), right) for wrong in damaged)
