"""The legacy types: blocks of 32 weights with one scale each.

| type | weights | bytes | layout                          | weight  |
|------|---------|-------|---------------------------------|---------|
| Q8_0 | 32      | 34    | d: half @0, codes: int8[32] @2  | d * code |

The numerics follow ggml's reference to the bit: everything in float32, the scale is inverted once and
multiplied, codes are rounded half away from zero by the *unrounded* scale, and only then is the scale
rounded to half precision.
"""

import torch

from quantize.codecs.base import Codec

# The largest float32 below one half. Adding it and truncating rounds half away from zero; adding one half
# itself would lift 0.49999997 to 1.
_ALMOST_HALF = torch.tensor(0.49999997)


class Q8_0(Codec):
    """Eight bits per weight and a scale: in practice as good as the original."""

    name, ggml_type, file_type = "Q8_0", 8, 7
    block_size, block_bytes = 32, 34
    overflow = 65520.0 * 127

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the blocks: d = largest magnitude / 127, code = x / d."""
        x = rows.float().reshape(-1, self.block_size)  # (blocks, 32)
        d = x.abs().amax(dim=1, keepdim=True).div_(127)  # (blocks, 1)
        scaled = x * torch.where(d == 0, d, 1 / d)
        blocks = torch.empty(len(x), self.block_bytes, dtype=torch.uint8)
        blocks[:, :2] = d.half().view(torch.uint8)
        blocks[:, 2:] = scaled.add_(torch.copysign(_ALMOST_HALF, scaled)).to(torch.int8).view(torch.uint8)
        return blocks.reshape(len(rows), -1)

    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return d * code."""
        parts = blocks.reshape(-1, self.block_bytes)  # (blocks, 34)
        d = parts[:, :2].contiguous().view(torch.float16).float()
        codes = parts.view(torch.int8)[:, 2:].float()  # one copy: whole embeddings pass through here
        return codes.mul_(d).reshape(-1, n_columns)
