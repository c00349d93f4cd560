"""How fast llama.cpp decodes its types, for a budget that may choose among them.

A processor reads a codebook type (IQ1, IQ2, IQ3) through tables, and takes several times as long for a token
as with a K-quant of the same size; a GPU hardly minds. So of two types that lose all but the same, the faster
one is chosen, and who runs a file on a processor can exclude types by name.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import filter as filter_names

from quantize.allocate import Option
from quantize.codecs import CODECS
from quantize.errors import UsageError

TIE = 0.02
"""By how much more loss, as a share of it, a faster type of no more bytes still wins."""
SPEED: Mapping[str, float] = {
    "Q4_K": 1.0,
    "Q4_0": 1.16,
    "IQ4_NL": 1.18,
    "Q2_K": 1.18,
    "Q3_K": 1.65,
    "Q6_K": 1.65,
    "IQ4_XS": 1.7,
    "Q4_1": 1.72,
    "Q5_K": 1.83,
    "Q8_0": 1.94,
    "Q5_0": 1.97,
    "Q5_1": 2.05,
    "IQ3_S": 4.28,
}
"""How long a token takes on a CPU, all matrices in a type, over Q4_K's (scripts/bench/decode_speed).

Other types are slower than all of these.
"""


def excluded_types(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the quant types that match a shell pattern, as IQ2*; raises UsageError where none does."""
    known = [name for name, kind in CODECS.items() if kind.writable]
    found = {pattern: filter_names(known, pattern.upper()) for pattern in patterns}
    if idle := [pattern for pattern, names in found.items() if not names]:
        fault = f"--exclude-type {', '.join(idle)}: no type has such a name"
        raise UsageError(fault, hint=f"the types are {', '.join(known)}")
    return tuple(name for name in known if any(name in names for names in found.values()))


def without_slower(options: Mapping[str, Option]) -> list[tuple[str, Option]]:
    """Return the types of a matrix, less those that a faster one of no more bits all but equals."""

    def is_beaten(quant: str, own: Option) -> bool:
        return any(
            SPEED.get(other, math.inf) < SPEED.get(quant, math.inf)
            and its.bits <= own.bits
            and its.loss <= (1 + TIE) * own.loss
            for other, its in options.items()
        )

    return [(quant, own) for quant, own in options.items() if not is_beaten(quant, own)]
