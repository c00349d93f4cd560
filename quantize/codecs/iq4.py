"""IQ4_NL and IQ4_XS: four bits that choose among 16 fixed values, closer together near zero.

| type   | weights | bytes | layout                                                         |
|--------|---------|-------|----------------------------------------------------------------|
| IQ4_NL | 32      | 18    | d: half @0, nibbles[16] @2                                     |
| IQ4_XS | 256     | 136   | d: half @0, scales: twos[2] @2, nibbles[4] @4; nibbles[128] @8 |

A weight is d * value, times the sub-block's scale in IQ4_XS.
IQ4_XS has eight sub-blocks of 32 weights, each with a scale of -32..31 stored 32 above its value. In each 32
weights the low nibble of byte j is weight j and the high one weight j + 16.
"""

import torch

from quantize.codecs import search, tensor_blocks
from quantize.codecs.bits import (
    half_bytes,
    half_values,
    pack_bits,
    pack_neighbours,
    unpack_bits,
    unpack_neighbours,
)
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.native import iq4 as native


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    return pack_bits(codes.reshape(len(codes), -1, 2, 16), 4).flatten(1)


def _unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    return unpack_bits(data.reshape(len(data), -1, 16), 4).flatten(1)


def _values(codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(native.VALUES).to(codes.device)[codes.int()]


class IQ4_NL(FieldCodec):
    """Four bits of unequal steps and one scale."""

    name, ggml_type, file_type = "IQ4_NL", 20, 25
    block_size, block_bytes = 32, 18
    overflow = 65504.0 * 16

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search finds."""
        n = rows.numel() // 32
        d, codes = search.floats(n), search.codes(n, 32)
        search.run(native.nl_blocks, rows, 32, importance, d, codes)
        return Fields(d, codes)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        return tensor_blocks.iq4_nl_blocks(rows, importance)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, then the nibbles."""
        return torch.cat([half_bytes(fields.d), _pack_nibbles(fields.codes)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d and the codes."""
        return Fields(half_values(blocks[:, :2]), _unpack_nibbles(blocks[:, 2:]))

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * value."""
        return fields.d[:, None] * _values(fields.codes)


class IQ4_XS(FieldCodec):
    """Four bits of unequal steps; a scale of six bits for each 32."""

    name, ggml_type, file_type = "IQ4_XS", 23, 30
    block_size, block_bytes = 256, 136
    overflow = 65504.0 * 64

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search finds."""
        n = rows.numel() // 256
        d, scales, codes = search.floats(n), search.codes(n, 8, torch.int8), search.codes(n, 256)
        search.run(native.xs_blocks, rows, 256, importance, d, scales, codes)
        return Fields(d, codes, scales)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        return tensor_blocks.iq4_xs_blocks(rows, importance)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the four parts of the layout."""
        scales = (fields.scales + 32).view(torch.uint8)
        upper, lower = pack_neighbours(scales >> 4, 2), pack_neighbours(scales & 15, 4)
        return torch.cat([half_bytes(fields.d), upper, lower, _pack_nibbles(fields.codes)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales and codes."""
        scales = unpack_neighbours(blocks[:, 4:8], 4) | unpack_neighbours(blocks[:, 2:4], 2) << 4
        codes = _unpack_nibbles(blocks[:, 8:])
        return Fields(half_values(blocks[:, :2]), codes, scales.view(torch.int8) - 32)

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * scale * value."""
        scale = (fields.d[:, None] * fields.scales.float())[:, :, None]
        return scale * _values(fields.codes).reshape(len(fields.codes), 8, 32)
