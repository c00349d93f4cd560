"""Numbers of a few bits in bytes, as tensors, and halves among bytes."""

import torch


def pack_bits(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Pack uint8 (..., 8 / width, m) into bytes (..., m): the first of dimension -2 into the lowest bits."""
    packed = numbers[..., 0, :].clone()
    for i in range(1, numbers.shape[-2]):
        packed |= numbers[..., i, :] << (width * i)
    return packed


def unpack_bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return uint8 (..., 8 / width, m) of bytes (..., m): `pack_bits` undone."""
    mask = (1 << width) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-2)


def pack_neighbours(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Pack uint8 (..., n) into bytes (..., n * width / 8): neighbours share a byte, the first lies lowest."""
    per_byte = 8 // width
    grouped = numbers.reshape(*numbers.shape[:-1], -1, per_byte)
    return pack_bits(grouped.transpose(-1, -2), width)


def unpack_neighbours(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return uint8 (..., m * 8 / width) of bytes (..., m): `pack_neighbours` undone."""
    return unpack_bits(packed, width).transpose(-1, -2).reshape(*packed.shape[:-1], -1)


def half_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Return the two bytes (B, 2) of float32 (B,) rounded to half precision."""
    return numbers.half().contiguous().view(torch.uint8).reshape(len(numbers), 2)


def half_values(data: torch.Tensor) -> torch.Tensor:
    """Return float32 (B,) of the halves' bytes (B, 2)."""
    return data.contiguous().view(torch.float16).reshape(-1).float()
