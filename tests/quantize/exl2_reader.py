"""A second reader of EXL2 linears, from the format's description alone and in plain Python.

A column of words is one large integer, a code a shift and a mask of it; half precision is `struct`'s. Nothing
of `quantize` is used, and no array library computes anything.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction


def half(value: Fraction) -> Fraction:
    """Round to half precision, ties to even: no number here has more digits than a double holds."""
    exact = float(value)
    assert Fraction(exact) == value
    return Fraction(struct.unpack("<e", struct.pack("<e", exact))[0])


def half_of_bits(bits: int) -> Fraction:
    """Return the number that 16 bits stand for."""
    return Fraction(struct.unpack("<e", struct.pack("<H", bits))[0])


def string_of(words: Sequence[int]) -> int:
    """Return the little-endian string of 32-bit words as one integer."""
    return sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))


def read(
    q_weight: Sequence[Sequence[int]],
    q_invperm: Sequence[int],
    q_scale: Sequence[Sequence[int]],
    q_scale_max: Sequence[int],
    q_groups: Sequence[int],
    n_outputs: int,
) -> list[list[float]]:
    """Return the weights as rows of outputs, inputs in the model's order; q_scale_max as 16-bit patterns."""
    n_inputs = len(q_invperm)
    stored = [[0.0] * n_inputs for _ in range(n_outputs)]
    at = 0
    for g in range(len(q_groups) // 2):
        bits, first = q_groups[2 * g], q_groups[2 * g + 1]
        last = q_groups[2 * g + 3] if 2 * g + 3 < len(q_groups) else len(q_weight)
        size = (last - first) * 32 // bits
        maximum = half(half_of_bits(q_scale_max[g]) / 256)
        for n in range(n_outputs):
            scale = ((string_of(q_scale[g]) >> (4 * n)) & 15) + 1
            step = half(scale * scale * maximum)
            string = string_of([row[n] for row in q_weight[first:last]])
            for r in range(size):
                code = (string >> (bits * r)) & ((1 << bits) - 1)
                stored[n][at + r] = float(half((code - 2 ** (bits - 1)) * step))
        at += size
    assert at == n_inputs
    return [[row[place] for place in q_invperm] for row in stored]
