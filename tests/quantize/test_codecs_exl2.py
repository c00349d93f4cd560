"""The EXL2 codec: against a second reader, over every width, and against what does not fit the format."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from quantize.codecs.exl2 import (
    WIDTHS,
    Exl2Linear,
    Exl2Tensors,
    Group,
    decode,
    encode,
    group_faults,
    shape_faults,
    step_sizes,
    unpack,
)
from quantize.errors import CheckpointError, PlanError
from tests.quantize import exl2_reader


def linear(groups: Sequence[tuple[int, int]], n: int, seed: int = 0) -> Exl2Linear:
    """Any codes, scales and maxima, from subnormal to large, inputs shuffled."""
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(0, 2**bits, (n, size), generator=generator) for bits, size in groups]
    size = sum(size for _, size in groups)
    scales = torch.randint(1, 17, (n, len(groups)), generator=generator)
    spread = 10.0 ** (torch.rand(len(groups), generator=generator) * 5 - 4)
    return Exl2Linear(
        torch.cat(codes, 1).to(torch.uint8),
        tuple(Group(bits, size) for bits, size in groups),
        scales.to(torch.uint8),
        spread.half(),
        torch.randperm(size, generator=generator),
    )


def read(tensors: Exl2Tensors, n: int) -> torch.Tensor:
    """The second reader's weights."""
    maxima = [bits & 0xFFFF for bits in tensors.q_scale_max.view(torch.int16).tolist()]
    parts = (tensors.q_weight.tolist(), tensors.q_invperm.tolist(), tensors.q_scale.tolist())
    return torch.tensor(exl2_reader.read(*parts, maxima, tensors.q_groups.tolist(), n))


SHAPES = [
    *([(bits, size)] for bits in WIDTHS for size in (32, 64, 96, 128)),
    *([(high, 32), (low, 64)] for high, low in itertools.combinations(WIDTHS, 2)),
    [(8, 32), (6, 32), (5, 64), (4, 32), (3, 96), (2, 16), (2, 48)],
    [(5, 128), (5, 32), (3, 64), (3, 32)],
]


@pytest.mark.parametrize("groups", SHAPES, ids=str)
def test_the_second_reader_agrees(groups: list[tuple[int, int]]) -> None:
    for n in (1, 31, 32, 41):
        made = linear(groups, n, seed=n)
        tensors = encode(made)
        weights = decode(tensors, n)
        assert torch.equal(weights, read(tensors, n))
        assert torch.equal(weights, made.weights())
        back = unpack(tensors, n)
        assert back.groups == made.groups
        for one, other in zip(vars(back).values(), vars(made).values(), strict=True):
            assert one == other if isinstance(one, tuple) else torch.equal(one, other)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place(bits: int) -> None:
    """Output i has the code i at its place r and none elsewhere, or all codes but there."""
    top = 2**bits - 1
    for place in (0, 1, 5, 6, 10, 21, 31):
        codes = torch.zeros(2 * top + 2, 32, dtype=torch.uint8)
        codes[top + 1 :] = top
        codes[: top + 1, place] = codes[top + 1 :, place] = torch.arange(top + 1)
        n = len(codes)
        made = replace(linear([(bits, 32)], n), codes=codes, perm=torch.arange(32))
        tensors = encode(made)
        string = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(tensors.q_weight[:, top - 1]))
        assert string == (top - 1) << (bits * place)
        assert torch.equal(unpack(tensors, n).codes, codes)


def test_every_scale_under_every_finite_maximum() -> None:
    """All 16 scales and all finite halves that are not negative, against exact arithmetic."""
    maxima = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    scales = torch.arange(1, 17, dtype=torch.uint8)[:, None].expand(16, len(maxima))
    steps = step_sizes(scales, maxima)
    for i in (*range(0, len(maxima), 97), 0x3FF, 0x400, 0x7BFF):
        share = exl2_reader.half(Fraction(float(maxima[i])) / 256)
        exact = [float(exl2_reader.half(share * scale * scale)) for scale in range(1, 17)]
        assert steps[:, i].tolist() == exact


def test_the_tensors_are_those_of_the_file() -> None:
    made = linear([(6, 32), (3, 64), (2, 16), (2, 16)], 41)
    tensors = encode(made)
    assert tensors.q_weight.shape == (6 + 6 + 1 + 1, 64)
    assert tensors.q_groups.tolist() == [6, 0, 3, 6, 2, 12, 2, 13]
    assert tensors.q_scale.shape == (4, 8)
    assert torch.equal(tensors.q_scale_max, made.scale_max)
    for i in range(128):
        assert int(tensors.q_invperm[made.perm[i]]) == i
    types = [tensor.dtype for tensor in vars(tensors).values()]
    assert types == [torch.int32, torch.int32, torch.int32, torch.float16, torch.int16]
    everything = decode(tensors)
    assert everything.shape == (64, 128)
    assert not bool(everything[41:].any())
    assert torch.equal(everything[:41], made.weights())


def test_perm_says_which_input_a_stored_column_is() -> None:
    """One input alone has weights; they must come out at its place."""
    codes = torch.full((4, 64), 8, dtype=torch.uint8)
    codes[:, 5] = torch.tensor([1, 9, 12, 15])
    perm = torch.arange(64).roll(11)
    made = Exl2Linear(
        codes, (Group(4, 64),), torch.full((4, 1), 16, dtype=torch.uint8), torch.tensor([0.5]).half(), perm
    )
    weights = decode(encode(made), 4)
    assert weights[:, perm[5]].tolist() == [-3.5, 0.5, 2.0, 3.5]
    assert int((weights != 0).sum()) == 4
    assert int(perm[5]) == 58


def test_what_cannot_be_held_is_named_at_once() -> None:
    assert shape_faults(1, 32) == []
    assert len(shape_faults(0, 65568)) == 2
    assert len(shape_faults(8, 48)) == 1
    faults = group_faults([Group(4, 48), Group(7, 32), Group(2, 16), Group(3, 32)], 256)
    assert [fault.split(":")[0] for fault in faults] == [
        "group 0 of 4 bits has 48 inputs",
        "group 1 has 7 bits",
        "group 1 has 7 bits, the one before 4",
        "group 3 has 3 bits, the one before 2",
        "the groups hold 128 inputs, the matrix 256",
    ]
    made = linear([(3, 32), (2, 32)], 3)
    with pytest.raises(PlanError, match="cannot be written as EXL2") as caught:
        encode(
            replace(
                made,
                codes=made.codes + 4,
                scales=made.scales * 0,
                scale_max=made.scale_max / 0,
                perm=made.perm * 0,
            )
        )
    assert len(caught.value.reasons) == 5
    with pytest.raises(PlanError, match="lowest code"):
        encode(replace(made, scale_max=torch.tensor([1.0, 40000.0]).half()))
    with pytest.raises(PlanError, match="multiple of 32"):
        encode(replace(made, codes=made.codes[:, :48]))


def test_damaged_tensors_are_refused() -> None:
    tensors = encode(linear([(3, 32), (2, 32)], 3))
    damaged = {
        "q_weight": replace(tensors, q_weight=tensors.q_weight[:, :16]),
        "q_scale": replace(tensors, q_scale=tensors.q_scale[:1]),
        "q_groups": replace(tensors, q_groups=tensors.q_groups.flip(0)),
        "hold": replace(tensors, q_weight=tensors.q_weight[:-1]),
        "permutation": replace(tensors, q_invperm=tensors.q_invperm * 0),
        "q_scale_max": replace(tensors, q_scale_max=tensors.q_scale_max.float()),
    }
    for word, wrong in damaged.items():
        with pytest.raises(CheckpointError, match=word):
            decode(wrong, 3)
    with pytest.raises(CheckpointError, match="q_weight"):
        decode(tensors, 33)
