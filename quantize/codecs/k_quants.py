"""The K-quants: super-blocks of 256 weights, whose sub-blocks have small integer scales of their own.

| type | bytes | layout                                                              |
|------|-------|---------------------------------------------------------------------|
| Q2_K | 84    | scale and min nibbles[16] @0, twos[64] @16, d @80, dmin @82         |
| Q3_K | 110   | high bits[32] @0, twos[64] @32, six-bit scales[12] @96, d @108      |
| Q4_K | 144   | d @0, dmin @2, six-bit scales and mins[12] @4, nibbles[128] @16     |
| Q5_K | 176   | as Q4_K to @16, then fifth bits[32] @16, nibbles[128] @48           |
| Q6_K | 210   | nibbles[128] @0, upper twos[64] @128, int8 scales[16] @192, d @208  |

A weight is d * scale * code - dmin * min in Q2_K, Q4_K and Q5_K, d * scale * (code - middle) in Q3_K
(middle 4) and Q6_K (middle 32).
Q2_K, Q3_K and Q6_K have 16 sub-blocks of 16 weights, Q4_K and Q5_K eight of 32. d and dmin are halves.

| part        | weight e of the super-block lies in                                                 |
|-------------|-------------------------------------------------------------------------------------|
| twos        | byte 32 * (e // 128) + e % 32, bits 2 * (e % 128 // 32) and one more                |
| nibbles     | Q4_K, Q5_K: byte 32 * (e // 64) + e % 32, low where e % 64 < 32                      |
|             | Q6_K: byte 64 * (e // 128) + e % 64, low where e % 128 < 64                          |
| single bits | byte e % 32, bit e // 32                                                            |
"""

from typing import Any

import numpy as np
import torch

from quantize.codecs import search, tensor_blocks
from quantize.codecs.bits import half_bytes, half_values, pack_bits, unpack_bits
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.native import k_quants as native

_HALF_MAX = 65504.0


def _pack_twos(codes: torch.Tensor) -> torch.Tensor:
    """Return the low two bits of codes (B, 256) in 64 bytes."""
    return pack_bits((codes & 3).reshape(-1, 2, 4, 32), 2).flatten(1)


def _unpack_twos(data: torch.Tensor) -> torch.Tensor:
    return unpack_bits(data.reshape(-1, 2, 32), 2).flatten(1)


def _pack_singles(bits: torch.Tensor) -> torch.Tensor:
    """Return bits (B, 256) in 32 bytes."""
    return pack_bits(bits.reshape(-1, 8, 32), 1)


def _unpack_singles(data: torch.Tensor) -> torch.Tensor:
    return unpack_bits(data, 1).flatten(1)


def _pack_scales_mins(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """Return eight scales and eight minima of six bits in 12 bytes (ggml `get_scale_min_k4` undone).

    Bytes 0-3 and 4-7 hold the first four scales and minima, and above them the upper two bits of the last
    four; bytes 8-11 hold the lower four bits of those.
    """
    upper = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scales, mins)]
    return torch.cat([*upper, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], dim=1)


def _unpack_scales_mins(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second, lower = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, lower & 15 | (first >> 6) << 4], dim=1)
    return scales, torch.cat([second & 63, lower >> 4 | (second >> 6) << 4], dim=1)


def _by_sub(codes: torch.Tensor, n_subs: int) -> torch.Tensor:
    return codes.float().reshape(len(codes), n_subs, -1)


class _Affine(FieldCodec):
    """A scale and a minimum for each sub-block."""

    block_size = 256
    n_subs: int
    top: int
    scale_top: int
    ladder: tuple[Any, Any, int]

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search of the family finds."""
        n = rows.numel() // 256
        d, dmin, codes = search.floats(n), search.floats(n), search.codes(n, 256)
        scales, mins = search.codes(n, self.n_subs), search.codes(n, self.n_subs)
        shape = (self.n_subs, self.top, self.scale_top)
        outputs = (d, dmin, scales, mins, codes)
        search.run(native.affine_blocks, rows, 256, importance, shape, self.ladder, *outputs)
        return Fields(d, codes, scales, dmin, mins)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        first, step, count = self.ladder
        ladder = float(first), float(step), count
        shape = self.n_subs, self.top, self.scale_top
        return tensor_blocks.affine_blocks(rows, importance, shape, ladder)

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * scale * code - dmin * min."""
        scale = (fields.d[:, None] * fields.scales.float())[:, :, None]
        drop = (fields.dmin[:, None] * fields.mins.float())[:, :, None]
        return scale * _by_sub(fields.codes, self.n_subs) - drop


class Q2_K(_Affine):
    """Two bits; four bits for each sub-block's scale and minimum."""

    name, ggml_type, file_type = "Q2_K", 10, 10
    block_bytes = 84
    overflow = _HALF_MAX * 15 / 2
    n_subs, top, scale_top = 16, 3, 15
    ladder = (np.float32(-0.5), np.float32(0.1), 15)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the four parts of the layout."""
        scales = fields.scales | fields.mins << 4
        return torch.cat(
            [scales, _pack_twos(fields.codes), half_bytes(fields.d), half_bytes(fields.dmin)], dim=1
        )

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return all fields."""
        scales = blocks[:, :16]
        d, dmin = half_values(blocks[:, 80:82]), half_values(blocks[:, 82:])
        return Fields(d, _unpack_twos(blocks[:, 16:80]), scales & 15, dmin, scales >> 4)


class Q4_K(_Affine):
    """Four bits; six bits for each sub-block's scale and minimum."""

    name, ggml_type, file_type = "Q4_K", 12, 15
    block_bytes = 144
    overflow = _HALF_MAX * 63 / 2
    n_subs, top, scale_top = 8, 15, 63
    ladder = (np.float32(-1), np.float32(0.1), 20)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the four parts of the layout."""
        nibbles = pack_bits(fields.codes.reshape(-1, 4, 2, 32), 4).flatten(1)
        scales = _pack_scales_mins(fields.scales, fields.mins)
        return torch.cat([half_bytes(fields.d), half_bytes(fields.dmin), scales, nibbles], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return all fields."""
        scales, mins = _unpack_scales_mins(blocks[:, 4:16])
        codes = unpack_bits(blocks[:, 16:].reshape(-1, 4, 32), 4).flatten(1)
        return Fields(half_values(blocks[:, :2]), codes, scales, half_values(blocks[:, 2:4]), mins)


class Q5_K(_Affine):
    """Five bits; six bits for each sub-block's scale and minimum."""

    name, ggml_type, file_type = "Q5_K", 13, 17
    block_bytes = 176
    overflow = _HALF_MAX * 63 / 2
    n_subs, top, scale_top = 8, 31, 63
    ladder = (np.float32(-0.5), np.float32(0.1), 15)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the five parts of the layout."""
        nibbles = pack_bits((fields.codes & 15).reshape(-1, 4, 2, 32), 4).flatten(1)
        scales = _pack_scales_mins(fields.scales, fields.mins)
        head = [half_bytes(fields.d), half_bytes(fields.dmin), scales]
        return torch.cat([*head, _pack_singles(fields.codes >> 4), nibbles], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return all fields."""
        scales, mins = _unpack_scales_mins(blocks[:, 4:16])
        codes = unpack_bits(blocks[:, 48:].reshape(-1, 4, 32), 4).flatten(1)
        codes |= _unpack_singles(blocks[:, 16:48]) << 4
        return Fields(half_values(blocks[:, :2]), codes, scales, half_values(blocks[:, 2:4]), mins)


class _Symmetric(FieldCodec):
    """A signed scale for each sub-block of 16, and no minimum."""

    block_size = 256
    middle: int

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * scale * (code - middle)."""
        scale = (fields.d[:, None] * fields.scales.float())[:, :, None]
        return scale * (_by_sub(fields.codes, 16) - self.middle)

    def _searched(self, kernel: search.Kernel, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        n = rows.numel() // 256
        d, scales, codes = search.floats(n), search.codes(n, 16, torch.int8), search.codes(n, 256)
        search.run(kernel, rows, 256, importance, d, scales, codes)
        return Fields(d, codes, scales)


class Q3_K(_Symmetric):
    """Three bits; six for each sub-block's scale, stored 32 above its value."""

    name, ggml_type, file_type = "Q3_K", 11, 12
    block_bytes, middle = 110, 4
    overflow = _HALF_MAX * 32

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search finds."""
        return self._searched(native.q3_k_blocks, rows, importance)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        return tensor_blocks.q3_k_blocks(rows, importance)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the layout's parts; of the scales first the lower four bits, then the upper two."""
        scales = (fields.scales + 32).view(torch.uint8)
        lower = pack_bits((scales & 15).reshape(-1, 2, 8), 4)
        upper = pack_bits((scales >> 4).reshape(-1, 4, 4), 2)
        codes = [_pack_singles(fields.codes >> 2), _pack_twos(fields.codes)]
        return torch.cat([*codes, lower, upper, half_bytes(fields.d)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales and codes."""
        codes = _unpack_twos(blocks[:, 32:96]) | _unpack_singles(blocks[:, :32]) << 2
        lower = unpack_bits(blocks[:, 96:104], 4).flatten(1)
        scales = lower | unpack_bits(blocks[:, 104:108], 2).flatten(1) << 4
        return Fields(half_values(blocks[:, 108:]), codes, scales.view(torch.int8) - 32)


class Q6_K(_Symmetric):
    """Six bits; eight for each sub-block's scale."""

    name, ggml_type, file_type = "Q6_K", 14, 18
    block_bytes, middle = 210, 32
    overflow = _HALF_MAX * 128

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search finds."""
        return self._searched(native.q6_k_blocks, rows, importance)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        return tensor_blocks.q6_k_blocks(rows, importance)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the four parts of the layout."""
        lower = pack_bits((fields.codes & 15).reshape(-1, 2, 2, 64), 4).flatten(1)
        upper = _pack_twos(fields.codes >> 4)
        return torch.cat([lower, upper, fields.scales.view(torch.uint8), half_bytes(fields.d)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales and codes."""
        codes = unpack_bits(blocks[:, :128].reshape(-1, 2, 64), 4).flatten(1)
        codes |= _unpack_twos(blocks[:, 128:192]) << 4
        scales = blocks[:, 192:208].contiguous().view(torch.int8)
        return Fields(half_values(blocks[:, 208:]), codes, scales)
