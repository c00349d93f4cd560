"""GPTQ's packing: the codes of a linear, its zero-points and what they stand for.

A linear W (N, K) is cut along K into groups; `g_idx` names the group g of each column k, and

    W[n, k] = scales[g, n] * (code[n, k] - zero[n, g])

Four tensors say it, all transposed (columns of W first), for G groups and b bits, 2, 3, 4 or 8:

| tensor  | dtype | shape           | content                                                        |
|---------|-------|-----------------|----------------------------------------------------------------|
| qweight | int32 | (K * b / 32, N) | row n's codes along K: one string of K * b bits, cut into words |
| qzeros  | int32 | (G, N * b / 32) | group g's zero-points along N: a string of N * b bits          |
| scales  | f16   | (G, N)          | may be negative                                                |
| g_idx   | int32 | (K,)            | the group of each column                                       |

The string is little endian throughout: code i lies at its bits b * i and up, bit j of the string is bit
j % 32 of word j / 32. With 2, 4 and 8 bits a code lies within its word; with 3 bits, 32 codes fill 3 words
and two of them straddle (code 10 over words 0 and 1, code 21 over words 1 and 2).

The format has two versions. Version 1 ("gptq") stores zero - 1, version 2 ("gptq_v2") the zero itself. A zero
of 0 has no place in version 1, and readers that turn one version into the other by adding to whole words
carry it into the neighbour; so zeros are 1 at the least, in both versions. A stored 2^b - 1 in a foreign
file of version 1 is 2^b here, as AutoGPTQ's act-order kernel has it; its plain one wraps it to 0.
"""

from typing import Final, Literal

import torch

from quantize.codecs.bits import pack_neighbours, unpack_neighbours
from quantize.errors import UsageError

BITS: Final = (2, 3, 4, 8)
Version = Literal[1, 2]
VERSIONS: Final[dict[str, Version]] = {"gptq": 1, "gptq_v2": 2}
"""The version by the format's name in a quantization config."""

# Codes that fill whole words: 32 bits, or 96 where a code would straddle the end of 32.
CODES_IN_WORDS: Final = {2: 16, 3: 32, 4: 8, 8: 4}

# Of eight codes of three bits, in three bytes: (code, byte, by how far it is shifted to the left there).
_PLACES_3: Final = (
    *((0, 0, 0), (1, 0, 3), (2, 0, 6)),
    *((2, 1, -2), (3, 1, 1), (4, 1, 4), (5, 1, 7)),
    *((5, 2, -1), (6, 2, 2), (7, 2, 5)),
)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return qweight, int32 (K * bits / 32, N), of codes uint8 (N, K), each below 2^bits.

    Raises UsageError for other bits, a K that does not fill whole words, or a code of more bits.
    """
    return _words(codes, bits, "columns").T.contiguous()


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes, uint8 (N, K), of qweight int32 (K * bits / 32, N): `pack_codes` undone."""
    return _numbers(qweight.T, bits)


def pack_zeros(zeros: torch.Tensor, bits: int, version: Version) -> torch.Tensor:
    """Return qzeros, int32 (G, N * bits / 32), of zeros uint8 (N, G), 1 at the least.

    Raises UsageError for other bits, an N that does not fill whole words, or a zero outside
    1..2^bits - 1.
    """
    if zeros.numel() and int(zeros.min()) < 1:
        raise UsageError("a zero-point of 0", hint="readers disagree about it; keep zero-points at 1 or more")
    _check_fit(zeros, bits)
    return _words(zeros.T - (1 if version == 1 else 0), bits, "rows")


def unpack_zeros(qzeros: torch.Tensor, bits: int, version: Version) -> torch.Tensor:
    """Return the zeros (N, G) of qzeros int32 (G, N * bits / 32): `pack_zeros` undone.

    uint8; int16 if one is 256, which a foreign file of version 1 with 8 bits can say.
    """
    stored = _numbers(qzeros, bits).T.contiguous()
    if version == 2:
        return stored
    if bits == 8 and stored.numel() and int(stored.max()) == 255:
        return stored.to(torch.int16) + 1
    return stored + 1


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    version: Version,
) -> torch.Tensor:
    """Return W, f32 (N, K), of the four tensors that stand at the top of this module.

    Exact: of a scale in half precision and a difference of nine bits, f32 holds the product. Where `g_idx`
    is out of range the result is an IndexError.
    """
    group = g_idx.long()
    zeros = unpack_zeros(qzeros, bits, version).float()
    values = unpack_codes(qweight, bits).float()
    values -= zeros.index_select(1, group)
    values *= scales.float().T.index_select(1, group)
    return values


def _words(numbers: torch.Tensor, bits: int, along: str) -> torch.Tensor:
    """Return int32 (R, C * bits / 32): the bit string of each row of uint8 (R, C)."""
    _check_fit(numbers, bits)
    if numbers.shape[1] % CODES_IN_WORDS[bits]:
        raise UsageError(
            f"{numbers.shape[1]} {along} at {bits} bits do not fill whole words of 32 bits",
            hint=f"expected a multiple of {CODES_IN_WORDS[bits]}",
        )
    packed = _pack_3(numbers) if bits == 3 else pack_neighbours(numbers, bits) if bits < 8 else numbers
    # Flat first: a single row may have any stride and still be called contiguous.
    return packed.flatten().view(torch.int32).reshape(len(packed), -1)


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 (R, C) of the rows' bit strings, int32 (R, C * bits / 32)."""
    _check_bits(bits)
    packed = words.flatten().view(torch.uint8).reshape(len(words), -1)
    return _unpack_3(packed) if bits == 3 else unpack_neighbours(packed, bits) if bits < 8 else packed


def _pack_3(numbers: torch.Tensor) -> torch.Tensor:
    """Return bytes (R, C * 3 / 8) of numbers below 8, uint8 (R, C)."""
    packed = torch.zeros(len(numbers), numbers.shape[1] // 8, 3, dtype=torch.uint8, device=numbers.device)
    for number, byte, shift in _PLACES_3:
        part = numbers[:, number::8]
        packed[:, :, byte] |= part << shift if shift >= 0 else part >> -shift
    return packed.flatten(1)


def _unpack_3(packed: torch.Tensor) -> torch.Tensor:
    """Return numbers below 8, uint8 (R, C), of bytes (R, C * 3 / 8)."""
    threes = packed.reshape(len(packed), -1, 3)
    numbers = torch.zeros(len(packed), threes.shape[1], 8, dtype=torch.uint8, device=packed.device)
    for number, byte, shift in _PLACES_3:
        part = threes[:, :, byte]
        numbers[:, :, number] |= (part >> shift if shift >= 0 else part << -shift) & 7
    return numbers.flatten(1)


def _check_fit(numbers: torch.Tensor, bits: int) -> None:
    """Refuse what would spill into a neighbour."""
    _check_bits(bits)
    if numbers.numel() and int(numbers.max()) >= 2**bits:
        raise UsageError(f"{int(numbers.max())} does not fit {bits} bits: at most {2**bits - 1} is expected")


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"{bits} bits: GPTQ's readers know {', '.join(map(str, BITS))}")
