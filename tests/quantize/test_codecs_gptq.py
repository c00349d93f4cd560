"""GPTQ's packing against a statement of it in whole Python integers."""

import pytest
import torch

from quantize.codecs.gptq import (
    BITS,
    CODES_IN_WORDS,
    Version,
    dequantize,
    pack_codes,
    pack_zeros,
    unpack_codes,
    unpack_zeros,
)
from quantize.errors import UsageError
from quantize.solver.linears import Settings, quantize_linears

WORDS = (1, 2, 5)
"""How many times the shortest string that fills whole words."""


def words(numbers: list[int], bits: int) -> list[int]:
    """One string of bits as an integer of any length, cut into signed words."""
    string = sum(number << (bits * i) for i, number in enumerate(numbers))
    unsigned = [(string >> (32 * i)) % 2**32 for i in range(len(numbers) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def random_numbers(rows: int, columns: int, low: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns + bits)
    return torch.randint(low, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("times", WORDS)
def test_codes_are_one_string_of_bits_along_the_columns(bits: int, rows: int, times: int) -> None:
    codes = random_numbers(rows, CODES_IN_WORDS[bits] * times, 0, bits)
    codes[0] = 2**bits - 1
    packed = pack_codes(codes, bits)
    assert (packed.dtype, packed.is_contiguous()) == (torch.int32, True)
    assert packed.T.tolist() == [words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_zeros_are_a_string_along_the_rows(bits: int, version: Version, groups: int) -> None:
    zeros = random_numbers(CODES_IN_WORDS[bits] * 3, groups, 1, bits)
    zeros[0] = 2**bits - 1
    packed = pack_zeros(zeros, bits, version)
    stored = zeros.T.int() - (1 if version == 1 else 0)
    assert packed.tolist() == [words(row, bits) for row in stored.tolist()]
    assert torch.equal(unpack_zeros(packed, bits, version), zeros)


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zeros_are_the_words_that_every_gptq_file_holds(bits: int, word: int) -> None:
    zeros = torch.full((32, 1), 2 ** (bits - 1), dtype=torch.uint8)
    assert set(pack_zeros(zeros, bits, 1).flatten().tolist()) == {word}


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_stored_zero_of_version_1_is_one_more(bits: int) -> None:
    """A foreign file's: no uint8 holds the 256 of 8 bits."""
    words_of_ones = torch.full((2, bits), -1, dtype=torch.int32)
    zeros = unpack_zeros(words_of_ones, bits, 1)
    assert zeros.dtype == (torch.int16 if bits == 8 else torch.uint8)
    assert zeros.shape == (32, 2)
    assert set(zeros.flatten().tolist()) == {2**bits}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_what_the_solver_found_comes_back_bit_for_bit(bits: int, symmetric: bool, desc_act: bool) -> None:
    """Its weights, negative scales included, through all four tensors of both versions."""
    generator = torch.Generator().manual_seed(bits)
    X = torch.randn(200, 96, generator=generator) * torch.rand(96, generator=generator)
    settings = Settings(bits, 32, symmetric, desc_act, effort="fast", signed_scales=symmetric)
    W = {"w": torch.randn(64, 96, generator=generator)}
    found = quantize_linears(W, X.T @ X / 200, settings)["w"]
    assert bool((found.scales < 0).any()) == symmetric
    versions: tuple[Version, ...] = (1, 2)
    for version in versions:
        packed = pack_codes(found.codes, bits), pack_zeros(found.zeros, bits, version)
        values = dequantize(*packed, found.scales.T.contiguous(), found.g_idx, bits, version)
        assert torch.equal(values, found.weights())


@pytest.mark.parametrize("bits", BITS)
def test_dequantized_values_are_exact(bits: int) -> None:
    """Against whole numbers and doubles, one weight at a time; groups in no order."""
    n, k, groups = 32, 64, 5
    generator = torch.Generator().manual_seed(0)
    codes, zeros = random_numbers(n, k, 0, bits), random_numbers(n, groups, 1, bits)
    scales = torch.randn(groups, n, generator=generator).half()
    g_idx = torch.randint(0, groups, (k,), generator=generator, dtype=torch.int32)
    found = dequantize(pack_codes(codes, bits), pack_zeros(zeros, bits, 1), scales, g_idx, bits, 1)
    for row in range(n):
        for column in range(k):
            g = int(g_idx[column])
            exact = float(scales[g, row]) * (int(codes[row, column]) - int(zeros[row, g]))
            assert float(found[row, column]) == exact


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"5 bits: GPTQ's readers know 2, 3, 4, 8"):
        pack_codes(torch.zeros(4, 32, dtype=torch.uint8), 5)
    with pytest.raises(UsageError, match="36 columns at 3 bits do not fill whole words"):
        pack_codes(torch.zeros(4, 36, dtype=torch.uint8), 3)
    with pytest.raises(UsageError, match="12 rows at 4 bits do not fill whole words"):
        pack_zeros(torch.ones(12, 2, dtype=torch.uint8), 4, 1)
    with pytest.raises(UsageError, match="8 does not fit 3 bits: at most 7 is expected"):
        pack_codes(torch.full((1, 32), 8, dtype=torch.uint8), 3)
    with pytest.raises(UsageError, match="16 does not fit 4 bits"):
        pack_zeros(torch.full((8, 1), 16, dtype=torch.uint8), 4, 1)
    versions: tuple[Version, ...] = (1, 2)
    for version in versions:
        with pytest.raises(UsageError, match="a zero-point of 0"):
            pack_zeros(torch.zeros(32, 1, dtype=torch.uint8), 4, version)
