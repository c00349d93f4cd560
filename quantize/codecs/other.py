"""Types that files of other makers contain: they can be read, and are not written.

| type  | weights | bytes | layout                                  | weight               |
|-------|---------|-------|-----------------------------------------|----------------------|
| TQ1_0 | 256     | 54    | trits[48] @0, trits[4] @48, d: half @52 | d * (trit - 1)       |
| TQ2_0 | 256     | 66    | twos[64] @0, d: half @64                | d * (two - 1)        |
| MXFP4 | 32      | 17    | exponent @0, nibbles[16] @1             | 2^(e - 128) * value  |
| NVFP4 | 64      | 36    | unsigned e4m3[4] @0, nibbles[32] @4     | scale / 2 * value    |
| Q1_0  | 128     | 18    | d: half @0, bits[16] @2                 | d or, bit clear, -d  |
| Q2_0  | 64      | 18    | d: half @0, twos[16] @2                 | d * (two - 1)        |

A byte of TQ1_0 is five trits as a fraction: multiplied by 3 its integer part is the next trit. Nibbles lie as
in Q4_0, in NVFP4 so in every 16 weights, each of which has a scale. The sixteen values of a nibble are those
of a float of two exponent bits and one of mantissa, doubled. In Q1_0 and Q2_0 neighbours share a byte, the
first lowest.
"""

import torch

from quantize.codecs.base import Codec
from quantize.codecs.bits import half_values, unpack_bits, unpack_neighbours
from quantize.errors import PlanError

_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)


class _ReadOnly(Codec):
    """A type that is decoded only."""

    writable = False

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Raise PlanError."""
        raise PlanError(f"{self.name} can be read but not written", hint="choose another quant type")

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the values of the blocks."""
        return self._values(blocks.reshape(-1, self.block_bytes)).reshape(len(blocks), n_columns)

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _trits(data: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` trits of each byte (B, m) as float (B, count * m), the first of all bytes first."""
    shifted = torch.stack([data * 3**i for i in range(count)], dim=1)  # wraps: the fraction is what is kept
    return ((shifted.int() * 3) >> 8).float().flatten(1)


class TQ1_0(_ReadOnly):
    """Trits, five to a byte."""

    name, ggml_type, file_type = "TQ1_0", 34, 36
    block_size, block_bytes = 256, 54

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        parts = _trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)
        return half_values(blocks[:, 52:])[:, None] * (torch.cat(parts, dim=1) - 1)


class TQ2_0(_ReadOnly):
    """Trits, four to a byte."""

    name, ggml_type, file_type = "TQ2_0", 35, 37
    block_size, block_bytes = 256, 66

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        twos = unpack_bits(blocks[:, :64].reshape(-1, 2, 32), 2).flatten(1)
        return half_values(blocks[:, 64:])[:, None] * (twos.float() - 1)


class MXFP4(_ReadOnly):
    """Four-bit floats under a common power of two."""

    name, ggml_type, file_type = "MXFP4", 39, 38
    block_size, block_bytes = 32, 17

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        exponent = blocks[:, :1].int()
        # The bits of 2^(e - 128); below e = 2 that is a subnormal.
        bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
        table = _E2M1.to(blocks.device)
        return bits.view(torch.float32) * table[unpack_bits(blocks[:, 1:], 4).flatten(1).int()]


class NVFP4(_ReadOnly):
    """Four-bit floats under an eight-bit float for each 16."""

    name, ggml_type, file_type = "NVFP4", 40, 39
    block_size, block_bytes = 64, 36

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        scales = blocks[:, :4].int()
        exponent, mantissa = (scales >> 3) & 15, (scales & 7).float()
        # The bits of 2^(exponent - 7), for a GPU's `ldexp` goes by way of a power that it rounds.
        normal = (1 + mantissa / 8) * (exponent + 120 << 23).view(torch.float32)
        scale = torch.where(exponent == 0, mantissa * 2.0**-9, normal)
        # All bits set is no number; gguf-py reads it as zero, and so does ggml.
        scale = torch.where((scales == 0) | (scales == 0x7F), 0.0, scale) * 0.5
        table = _E2M1.to(blocks.device)
        codes = unpack_bits(blocks[:, 4:].reshape(-1, 4, 8), 4).reshape(-1, 4, 16)
        return scale[:, :, None] * table[codes.int()]


class Q1_0(_ReadOnly):
    """A sign and a scale."""

    name, ggml_type, file_type = "Q1_0", 41, 40
    block_size, block_bytes = 128, 18

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        d = half_values(blocks[:, :2])[:, None]
        return torch.where(unpack_neighbours(blocks[:, 2:], 1) == 1, d, -d)


class Q2_0(_ReadOnly):
    """Two bits from minus one to two."""

    name, ggml_type, file_type = "Q2_0", 42, 41
    block_size, block_bytes = 64, 18

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        twos = unpack_neighbours(blocks[:, 2:], 2)
        return half_values(blocks[:, :2])[:, None] * (twos.float() - 1)
