"""The types that are not quantized: one number is one block.

| type | bytes | layout                                                       |
|------|-------|--------------------------------------------------------------|
| F32  | 4     | IEEE single                                                  |
| F16  | 2     | IEEE half: 5 exponent bits, 10 of mantissa; overflows at 65520 |
| BF16 | 2     | the upper half of a single: 8 exponent bits, 7 of mantissa   |

All little endian, all rounded to nearest, ties to even. bf16 weights of ordinary size fit F16 without
loss, since its mantissa is longer; what is very small loses bits there, what is very large does not fit.
"""

import torch

from quantize.codecs.base import Codec


class F32(Codec):
    """Single precision: what norms are always stored as."""

    name, ggml_type, file_type = "F32", 0, 0
    block_size, block_bytes = 1, 4

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows as singles; a copy only where the dtype changes."""
        return rows.to(torch.float32).contiguous().view(torch.uint8)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the singles."""
        return blocks.contiguous().view(torch.float32).reshape(-1, n_columns)


class F16(Codec):
    """Half precision."""

    name, ggml_type, file_type = "F16", 1, 1
    block_size, block_bytes = 1, 2
    overflow = 65520.0

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows as halves."""
        # By way of float32, which is exact: torch has no vectorised kernel from bf16 to half.
        wide = rows.float() if rows.dtype == torch.bfloat16 else rows
        return wide.to(torch.float16).contiguous().view(torch.uint8)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the halves, widened."""
        return blocks.contiguous().view(torch.float16).reshape(-1, n_columns).float()


class BF16(Codec):
    """Brain float; a plain copy of a bf16 checkpoint."""

    name, ggml_type, file_type = "BF16", 30, 32
    block_size, block_bytes = 1, 2
    # Half a step above the largest bf16 number, where rounding to nearest turns to infinity.
    overflow = (2 - 2.0**-8) * 2.0**127

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows as brain floats; no copy where they are that already."""
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return the brain floats, widened."""
        return blocks.contiguous().view(torch.bfloat16).reshape(-1, n_columns).float()
