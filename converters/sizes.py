"""Sizes as people write them: 4000000000, 4G (10^9), 4GiB (2^30)."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Return the number of bytes that the text names; raises ValueError, in words, for anything else."""
    upper = text.strip().upper().removesuffix("B")
    number = upper.rstrip("KMGI")
    try:
        size = int(float(number) * UNITS[upper[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write 4000000000, 4G or 4GiB") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size
