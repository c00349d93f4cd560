"""The IQ1, IQ2 and IQ3 types: eight (or four) neighbouring weights are one point of a fixed grid.

| type    | bytes | layout                                                                              |
|---------|-------|-------------------------------------------------------------------------------------|
| IQ2_XXS | 66    | d @0, for each 32 weights 4 points, u32 of 4 x 7 signs and a 4-bit scale @2          |
| IQ2_XS  | 74    | d @0, u16 of 9-bit point and 7 signs for each 8 weights @2, scale nibbles[16] @66    |
| IQ2_S   | 82    | d @0, points[32] @2, signs[32] @34, upper two bits of points[8] @66, scales @74      |
| IQ3_XXS | 98    | d @0, points[64] @2, u32 of 4 x 7 signs and a 4-bit scale for each 32 weights @66    |
| IQ3_S   | 110   | d @0, points[64] @2, ninth bits[8] @66, signs[32] @74, scale nibbles[8] @106         |
| IQ1_S   | 50    | d @0, points[32] @2, u16 of 4 x 3 upper bits, scale, shift for each 32 weights @34   |
| IQ1_M   | 56    | points[32] @0, nibbles of 3 upper bits and shift[32] @32, u16[4] of 4 x 3-bit scales |
|         |       | and, in the top nibbles, d @48                                                      |

d is a half. Seven stored signs of eight are completed to an even number.

| types           | weight                                   |
|-----------------|------------------------------------------|
| IQ2_*, IQ3_XXS  | d * (0.5 + scale) / 4 (or 2) * ±grid      |
| IQ3_S           | d * (1 + 2 * scale) * ±grid              |
| IQ1_*           | d * (1 + 2 * scale) * (grid ± 0.125)     |
"""

import numpy as np
import torch

from quantize.codecs import grids, search
from quantize.codecs.bits import half_bytes, half_values, pack_neighbours, unpack_neighbours
from quantize.codecs.fields import FieldCodec, Fields
from quantize.codecs.native import i_quants as native
from quantize.codecs.native import iq1 as native_iq1

_SHIFTS = torch.tensor([0, 7, 14, 21])
_THREES = torch.tensor([0, 3, 6, 9])


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Return the little-endian bytes (B, m) of integers (B, n)."""
    return numbers.contiguous().view(torch.uint8).reshape(len(numbers), -1)


def _words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the little-endian integers of bytes as non-negative int64 (B, n)."""
    # One block's bytes are contiguous as they are, and may begin where no integer can.
    numbers = data.clone(memory_format=torch.contiguous_format).view(dtype).long()
    return numbers & ((1 << (8 * dtype.itemsize)) - 1)


def _complete(signs: torch.Tensor) -> torch.Tensor:
    """Return sign bytes of eight of those of seven."""
    return torch.from_numpy(grids.PARITY_SIGNS).to(signs.device)[signs.long()]


class _Signed(FieldCodec):
    """A grid of magnitudes, and signs beside it."""

    block_size = 256
    n_subs: int
    search_by: native.Search

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search of the family finds; signs as they are stored."""
        n = rows.numel() // 256
        grid = grids.grid(self.name)
        d, scales = search.floats(n), search.codes(n, self.n_subs)
        points = search.codes(n, 256 // grid.levels.shape[1], torch.int16)
        signs = search.codes(n, 32)
        outputs = (d, scales, points, signs)
        search.run(native.grid_blocks, rows, 256, importance, grid, self.search_by, *outputs)
        return Fields(d, points, scales, signs=signs)

    def value(self, fields: Fields) -> torch.Tensor:
        """Return step * ±grid."""
        table = torch.from_numpy(grids.values(self.name)).to(fields.d.device)
        magnitude = table[fields.codes.int()].reshape(-1, 256)
        negative = unpack_neighbours(fields.signs, 1)
        step = self._step(fields).repeat_interleave(256 // self.n_subs, dim=1)
        return step * magnitude * (1 - 2 * negative.float())

    def _step(self, fields: Fields) -> torch.Tensor:
        return fields.d[:, None] * (0.5 + fields.scales.float()) * 0.25


def _by(
    n: int, reach: int, step: float, parity: bool, tiny: float, factor: int, fudge: float
) -> native.Search:
    """Return what IQ2_XS searches by; the others change single entries."""
    f = np.float32
    return native.Search(n, 2, reach, f(step), parity, f(tiny), f(factor), f(0), False, 0, True, f(fudge))


class IQ2_XXS(_Signed):
    """256 points of eight weights; 2.06 bits."""

    name, ggml_type, file_type = "IQ2_XXS", 16, 19
    block_bytes, n_subs = 66, 8
    overflow = 65504.0 * 16
    needs_importance = True
    search_by = _by(32, 6, 0.1, True, 1e-15, 1, 1)._replace(first_fit=True, again=2)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, then eight bytes for each 32 weights."""
        signs = (fields.signs.reshape(-1, 8, 4).long() << _SHIFTS.to(fields.d.device)).sum(dim=2)
        words = (signs | fields.scales.long() << 28).to(torch.int64)
        points = fields.codes.to(torch.uint8).reshape(-1, 8, 4)
        tail = words.view(torch.uint8).reshape(-1, 8, 8)[:, :, :4]
        return torch.cat([half_bytes(fields.d), torch.cat([points, tail], dim=2).flatten(1)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and completed signs."""
        parts = blocks[:, 2:].reshape(-1, 8, 8)
        words = _words(parts[:, :, 4:].flatten(1), torch.int32)
        signs = words[:, :, None] >> _SHIFTS.to(words.device) & 127
        points = parts[:, :, :4].flatten(1).short()
        return Fields(half_values(blocks[:, :2]), points, words >> 28, signs=_complete(signs.flatten(1)))


class IQ2_XS(_Signed):
    """512 points of eight weights; 2.31 bits."""

    name, ggml_type, file_type = "IQ2_XS", 17, 20
    block_bytes, n_subs = 74, 16
    overflow = 65504.0 * 16
    needs_importance = True
    search_by = _by(16, 9, 0.1, True, 1e-15, 1, 1)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, words, scales."""
        words = (fields.codes.int() | fields.signs.int() << 9).to(torch.int16)
        return torch.cat([half_bytes(fields.d), _bytes(words), pack_neighbours(fields.scales, 4)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and completed signs."""
        words = _words(blocks[:, 2:66], torch.int16)
        scales = unpack_neighbours(blocks[:, 66:], 4)
        return Fields(half_values(blocks[:, :2]), words & 511, scales, signs=_complete(words >> 9))


class IQ2_S(_Signed):
    """1024 points of eight weights and all signs; 2.56 bits."""

    name, ggml_type, file_type = "IQ2_S", 22, 28
    block_bytes, n_subs = 82, 16
    overflow = 65504.0 * 16
    search_by = _by(16, 9, 0.1, False, 1e-8, 2, 0.9875)._replace(floor=np.float32(0.25))

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the five parts of the layout."""
        upper = pack_neighbours((fields.codes >> 8).to(torch.uint8), 2)
        parts = [half_bytes(fields.d), (fields.codes & 255).to(torch.uint8), fields.signs, upper]
        return torch.cat([*parts, pack_neighbours(fields.scales, 4)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and signs."""
        points = blocks[:, 2:34].short() | unpack_neighbours(blocks[:, 66:74], 2).short() << 8
        scales = unpack_neighbours(blocks[:, 74:], 4)
        return Fields(half_values(blocks[:, :2]), points, scales, signs=blocks[:, 34:66])


class IQ3_XXS(_Signed):
    """256 points of four weights; 3.06 bits."""

    name, ggml_type, file_type = "IQ3_XXS", 18, 23
    block_bytes, n_subs = 98, 8
    overflow = 65504.0 * 16
    search_by = _by(32, 15, 0.2, True, 1e-8, 2, 1.0125)._replace(top=7)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, points, and the words of signs and scale."""
        signs = (fields.signs.reshape(-1, 8, 4).long() << _SHIFTS.to(fields.d.device)).sum(dim=2)
        words = signs | fields.scales.long() << 28
        tail = words.view(torch.uint8).reshape(-1, 8, 8)[:, :, :4].flatten(1)
        return torch.cat([half_bytes(fields.d), fields.codes.to(torch.uint8), tail], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and completed signs."""
        words = _words(blocks[:, 66:], torch.int32)
        signs = words[:, :, None] >> _SHIFTS.to(words.device) & 127
        points = blocks[:, 2:66].short()
        return Fields(half_values(blocks[:, :2]), points, words >> 28, signs=_complete(signs.flatten(1)))

    def _step(self, fields: Fields) -> torch.Tensor:
        return fields.d[:, None] * (0.5 + fields.scales.float()) * 0.5


class IQ3_S(_Signed):
    """512 points of four weights and all signs; 3.44 bits."""

    name, ggml_type, file_type = "IQ3_S", 21, 26
    block_bytes, n_subs = 110, 8
    overflow = 65504.0 * 16
    search_by = _by(32, 9, 0.2, False, 0, 2, 1.033)._replace(top=7, again=1, start_on_grid=False)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return the five parts of the layout."""
        ninth = pack_neighbours((fields.codes >> 8).to(torch.uint8), 1)
        parts = [half_bytes(fields.d), (fields.codes & 255).to(torch.uint8), ninth, fields.signs]
        return torch.cat([*parts, pack_neighbours(fields.scales, 4)], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and signs."""
        points = blocks[:, 2:66].short() | unpack_neighbours(blocks[:, 66:74], 1).short() << 8
        scales = unpack_neighbours(blocks[:, 106:], 4)
        return Fields(half_values(blocks[:, :2]), points, scales, signs=blocks[:, 74:106])

    def _step(self, fields: Fields) -> torch.Tensor:
        return fields.d[:, None] * (1 + 2 * fields.scales.float())


class _Shifted(FieldCodec):
    """The grid of -1, 0 and 1, shifted up or down by an eighth; `signs` holds 1 for down."""

    block_size = 256
    overflow = 65504.0
    n_subs: int
    n_shifts: int
    kernel: search.Kernel

    def search(self, rows: torch.Tensor, importance: torch.Tensor | None) -> Fields:
        """Return the fields that the search finds."""
        n = rows.numel() // 256
        d, scales = search.floats(n), search.codes(n, self.n_subs)
        points, shifts = search.codes(n, 32, torch.int16), search.codes(n, self.n_shifts)
        kernel = type(self).kernel
        search.run(kernel, rows, 256, importance, grids.grid("IQ1_S"), d, scales, points, shifts)
        return Fields(d, points, scales, signs=shifts)

    def value(self, fields: Fields) -> torch.Tensor:
        """Return step * (grid ± 0.125)."""
        table = torch.from_numpy(grids.values("IQ1_S")).to(fields.d.device)
        delta = (0.125 - 0.25 * fields.signs.float()).repeat_interleave(256 // self.n_shifts, dim=1)
        step = fields.d[:, None] * (1 + 2 * fields.scales.float())
        shifted = table[fields.codes.int()].reshape(-1, 256) + delta
        return step.repeat_interleave(256 // self.n_subs, dim=1) * shifted


class IQ1_S(_Shifted):
    """2048 points; a scale and a shift for each 32 weights; 1.56 bits."""

    name, ggml_type, file_type = "IQ1_S", 19, 24
    block_bytes, n_subs, n_shifts = 50, 8, 8
    needs_importance = True
    kernel = staticmethod(native_iq1.s_blocks)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return d, points, words."""
        upper = fields.codes.reshape(-1, 8, 4).int() >> 8 << _THREES.to(fields.d.device)
        words = upper.sum(dim=2) | fields.scales.int() << 12 | fields.signs.int() << 15
        points = (fields.codes & 255).to(torch.uint8)
        return torch.cat([half_bytes(fields.d), points, _bytes(words.to(torch.int16))], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and shifts."""
        words = _words(blocks[:, 34:], torch.int16)
        upper = (words[:, :, None] >> _THREES.to(words.device) & 7).flatten(1)
        points = blocks[:, 2:34].long() | upper << 8
        return Fields(half_values(blocks[:, :2]), points, words >> 12 & 7, signs=words >> 15)


class IQ1_M(_Shifted):
    """2048 points; a scale for each 16 weights and a shift for each 8; 1.75 bits."""

    name, ggml_type, file_type = "IQ1_M", 29, 31
    block_bytes, n_subs, n_shifts = 56, 16, 32
    kernel = staticmethod(native_iq1.m_blocks)

    def pack(self, fields: Fields) -> torch.Tensor:
        """Return points, upper bits and shifts, scales and d."""
        nibbles = (fields.codes >> 8).to(torch.uint8) | fields.signs << 3
        half = _words(half_bytes(fields.d), torch.int16)
        quarters = half >> torch.tensor([0, 4, 8, 12], device=half.device) & 15
        words = (fields.scales.reshape(-1, 4, 4).long() << _THREES.to(half.device)).sum(
            dim=2
        ) | quarters << 12
        points = (fields.codes & 255).to(torch.uint8)
        return torch.cat([points, pack_neighbours(nibbles, 4), _bytes(words.to(torch.int16))], dim=1)

    def unpack(self, blocks: torch.Tensor) -> Fields:
        """Return d, scales, points and shifts."""
        nibbles = unpack_neighbours(blocks[:, 32:48], 4)
        words = _words(blocks[:, 48:], torch.int16)
        quarters = (words >> 12) << torch.tensor([0, 4, 8, 12], device=words.device)
        d = half_values(_bytes(quarters.sum(dim=1, keepdim=True).to(torch.int16)))
        scales = (words[:, :, None] >> _THREES.to(words.device) & 7).flatten(1)
        points = blocks[:, :32].short() | (nibbles & 7).short() << 8
        return Fields(d, points, scales, signs=nibbles >> 3)
