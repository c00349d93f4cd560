"""The quant types: `codec("q8_0")`.

Each family of block layouts is a file of this package; importing it registers its types.
"""

from quantize.codecs import floats, i_quants, iq4, k_quants, legacy, other
from quantize.codecs.base import CODECS, Codec
from quantize.errors import UsageError

__all__ = ["CODECS", "ENCODING", "Codec", "codec", "floats", "i_quants", "iq4", "k_quants", "legacy", "other"]

ENCODING = 1
"""The version of all encoders together: raised when any of them writes other bytes than before."""

# The more bits, the earlier: the order in which users meet the types.
for _kind in sorted(CODECS.values(), key=lambda kind: -kind.block_bytes / kind.block_size):
    CODECS[_kind.name] = CODECS.pop(_kind.name)


def codec(name: str) -> Codec:
    """Return the codec of a quant type by its GGML name, in any case.

    Raises UsageError, naming the known types, for any other name.
    """
    found = CODECS.get(name.upper())
    if found is None:
        raise UsageError(f"unknown quant type {name!r}", hint=f"known: {', '.join(CODECS)}")
    return found
