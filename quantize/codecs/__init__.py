"""The quant types that can be written: `codec("q8_0")`.

Each family of block layouts is a file of this package; importing it registers its types.
"""

from quantize.codecs import floats, iq4, k_quants, legacy
from quantize.codecs.base import CODECS, Codec
from quantize.errors import UsageError

__all__ = ["CODECS", "Codec", "codec", "floats", "iq4", "k_quants", "legacy"]


def codec(name: str) -> Codec:
    """Return the codec of a quant type by its GGML name, in any case.

    Raises UsageError, naming the known types, for any other name.
    """
    found = CODECS.get(name.upper())
    if found is None:
        raise UsageError(f"unknown quant type {name!r}", hint=f"known: {', '.join(CODECS)}")
    return found
