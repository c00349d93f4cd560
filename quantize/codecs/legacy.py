"""The legacy types: blocks of 32 weights with one scale each.

| type | bytes | layout                                         | weight          |
|------|-------|------------------------------------------------|-----------------|
| Q4_0 | 18    | d: half @0, nibbles[16] @2                      | d * (code - 8)  |
| Q4_1 | 20    | d: half @0, m: half @2, nibbles[16] @4          | d * code + m    |
| Q5_0 | 22    | d: half @0, fifth bits[4] @2, nibbles[16] @6    | d * (code - 16) |
| Q5_1 | 24    | d, m: half @0, fifth bits[4] @4, nibbles[16] @8 | d * code + m    |
| Q8_0 | 34    | d: half @0, codes: int8[32] @2                  | d * code        |

The low nibble of byte j is weight j, the high one weight j + 16; the fifth bit of weight i is bit i % 8 of
byte i // 8.

The numerics follow ggml's reference to the bit: everything in float32, the scale is inverted once and
multiplied, codes are rounded half away from zero by the *unrounded* scale, and only then is the scale
rounded to half precision. With importances, Q4_0 to Q5_1 search for the scale; Q8_0 has no need to.
"""

import torch

from quantize.codecs import search, tensor_blocks
from quantize.codecs.base import Codec
from quantize.codecs.bits import (
    half_bytes,
    half_values,
    pack_bits,
    pack_neighbours,
    unpack_bits,
    unpack_neighbours,
)
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.native import legacy as native
from quantize.codecs.tensors import over

# The largest float32 below one half. Adding it and truncating rounds half away from zero; adding one half
# itself would lift 0.49999997 to 1.
_ALMOST_HALF = torch.tensor(0.49999997)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d == 0, d, 1 / d)


def _codes(scaled: torch.Tensor, inverse: torch.Tensor, top: int) -> torch.Tensor:
    """Cut scaled weights (B, 32) to codes 0..top; all zero where the inverse of a tiny d is infinite."""
    return scaled.to(torch.uint8).clamp_(max=top).masked_fill_(inverse.isinf(), 0)


def _pack_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Return the parts of the layout that hold codes (B, 32): fifth bits, if there are, and nibbles."""
    nibbles = pack_bits((codes & 15).reshape(-1, 2, 16), 4)
    return [nibbles] if bits == 4 else [pack_neighbours(codes >> 4, 1), nibbles]


def _unpack_codes(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes (B, 32) of what `_pack_codes` laid side by side."""
    nibbles = unpack_bits(data[:, -16:], 4).reshape(-1, 32)
    return nibbles if bits == 4 else nibbles | unpack_neighbours(data[:, :4], 1) << 4


class _Centred(FieldCodec):
    """Codes around a middle: one scale, whose sign gives the larger side the one code more."""

    bits: int
    block_size = 32

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the largest magnitude's share, or the best of 19 scales by importance."""
        middle = 1 << (self.bits - 1)
        n = rows.numel() // 32
        d, codes = search.floats(n), search.codes(n, 32)
        if importance is None:
            native.plain_symmetric_blocks(rows.reshape(-1, 32).numpy(), middle, d.numpy(), codes.numpy())
        else:
            search.run(native.symmetric_blocks, rows, 32, importance, middle, d, codes)
        return Fields(d, codes)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        middle = 1 << (self.bits - 1)
        if importance is None:
            return self._plain(rows.reshape(-1, 32), middle)
        return tensor_blocks.legacy_symmetric(rows, importance, middle)

    @staticmethod
    def _plain(x: torch.Tensor, middle: int) -> Fields:
        extreme = x.gather(1, x.abs().argmax(dim=1, keepdim=True))  # (B, 1), signed
        d = extreme.add_(0.0) / -middle  # no negative zero: ggml's search starts from a positive one
        inverse = _inverse(d)
        return Fields(d[:, 0], _codes((x * inverse).add_(middle + 0.5), inverse, 2 * middle - 1))

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, then the codes."""
        return torch.cat([half_bytes(fields.d), *_pack_codes(fields.codes, self.bits)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d and the codes."""
        return Fields(half_values(blocks[:, :2]), _unpack_codes(blocks[:, 2:], self.bits))

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * (code - middle)."""
        return fields.d[:, None] * (fields.codes.float() - (1 << (self.bits - 1)))


class _Based(FieldCodec):
    """Codes from a base `m` upwards: scale and base."""

    bits: int
    block_size = 32

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the smallest and the range's share, or the best of 38 scales and minima by importance."""
        top = (1 << self.bits) - 1
        n = rows.numel() // 32
        d, m, codes = search.floats(n), search.floats(n), search.codes(n, 32)
        if importance is None:
            blocks = rows.reshape(-1, 32).numpy()
            native.plain_affine_blocks(blocks, top, d.numpy(), m.numpy(), codes.numpy())
        else:
            search.run(native.affine_blocks, rows, 32, importance, top, d, m, codes)
        return Fields(d, codes, dmin=m)

    def search_tensors(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the same fields by torch operations."""
        top = (1 << self.bits) - 1
        if importance is None:
            return self._plain(rows.reshape(-1, 32), top)
        return tensor_blocks.legacy_affine(rows, importance, top)

    @staticmethod
    def _plain(x: torch.Tensor, top: int) -> Fields:
        low = x.gather(1, x.argmin(dim=1, keepdim=True))  # the first: 0 and -0 are equal, not their bits
        d = over((x.amax(dim=1, keepdim=True) - low).abs_(), float(top))
        inverse = _inverse(d)
        codes = _codes(((x - low) * inverse).add_(0.5), inverse, top)
        return Fields(d[:, 0], codes, dmin=low[:, 0])

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, m, then the codes."""
        scales = [half_bytes(fields.d), half_bytes(fields.dmin)]
        return torch.cat([*scales, *_pack_codes(fields.codes, self.bits)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, m and the codes."""
        codes = _unpack_codes(blocks[:, 4:], self.bits)
        return Fields(half_values(blocks[:, :2]), codes, dmin=half_values(blocks[:, 2:4]))

    def value(self, fields: Fields) -> torch.Tensor:
        """Return d * code + m."""
        return fields.d[:, None] * fields.codes.float() + fields.dmin[:, None]


class Q4_0(_Centred):
    """Four bits around zero."""

    name, ggml_type, file_type = "Q4_0", 2, 2
    block_bytes, bits = 18, 4
    overflow = 65504.0 * 4


class Q4_1(_Based):
    """Four bits and a base."""

    name, ggml_type, file_type = "Q4_1", 3, 3
    block_bytes, bits = 20, 4
    overflow = 65504.0 / 2


class Q5_0(_Centred):
    """Five bits around zero."""

    name, ggml_type, file_type = "Q5_0", 6, 8
    block_bytes, bits = 22, 5
    overflow = 65504.0 * 8


class Q5_1(_Based):
    """Five bits and a base."""

    name, ggml_type, file_type = "Q5_1", 7, 9
    block_bytes, bits = 24, 5
    overflow = 65504.0 / 2


class Q8_0(Codec):
    """Eight bits per weight and a scale: in practice as good as the original."""

    name, ggml_type, file_type = "Q8_0", 8, 7
    block_size, block_bytes = 32, 34
    overflow = 65520.0 * 127
    gains_from_gpu = True

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the blocks: d = largest magnitude / 127, code = x / d."""
        x = rows.float().reshape(-1, self.block_size)  # (blocks, 32)
        d = over(x.abs().amax(dim=1, keepdim=True), 127.0)  # (blocks, 1)
        inverse = _inverse(d)
        # All codes are zero where the inverse of a tiny d is infinite; casts of infinities are not portable.
        scaled = x * inverse.masked_fill_(inverse.isinf(), 0)
        blocks = torch.empty(len(x), self.block_bytes, dtype=torch.uint8, device=rows.device)
        blocks[:, :2] = d.half().view(torch.uint8)
        rounded = scaled.add_(torch.copysign(_ALMOST_HALF.to(rows.device), scaled))
        blocks[:, 2:] = rounded.to(torch.int8).view(torch.uint8)
        return blocks.reshape(len(rows), -1)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, then the codes, int8 (B, 32): blocks of a scale that was chosen elsewhere."""
        return torch.cat([half_bytes(fields.d), fields.codes.view(torch.uint8)], dim=1)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return d * code."""
        parts = blocks.reshape(-1, self.block_bytes)  # (blocks, 34)
        d = parts[:, :2].contiguous().view(torch.float16).float()
        codes = parts.view(torch.int8)[:, 2:].float()  # one copy: whole embeddings pass through here
        return codes.mul_(d).reshape(-1, n_columns)
