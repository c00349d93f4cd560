"""What stands behind `--to exl2:`: bits per weight, and the bits of the output matrix.

exl2:4.25                 4.25 bits per weight over the linears of the decoder blocks, head in 6 bits
exl2:4.25,h8              the same with the head in 8 bits
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from quantize.errors import UsageError

LEAST, MOST = Fraction("2.3"), Fraction(8)
HEADS = (6, 8)
DEFAULT_HEAD = 6
_BITS = re.compile(r"[0-9]+(\.[0-9]{1,6})?", re.ASCII)


@dataclass(frozen=True)
class Exl2Spec:
    """A size: `bits` per weight over the decoder's linears, as ExLlamaV2 counts, and those of the head."""

    bits: Fraction
    head_bits: int = DEFAULT_HEAD

    def __str__(self) -> str:
        head = "" if self.head_bits == DEFAULT_HEAD else f",h{self.head_bits}"
        return f"{float(self.bits):.9g}{head}"

    @property
    def directory(self) -> str:
        """The export's folder."""
        return "exl2-" + str(self).replace(",", "-")


def parse_spec(text: str) -> Exl2Spec:
    """Return what `4.25,h8` stands for; raises UsageError, saying what is expected."""
    number, *flags = (part.strip().lower() for part in text.split(","))
    bits = Fraction(number) if _BITS.fullmatch(number) else Fraction(0)
    if not LEAST <= bits <= MOST:
        raise UsageError(
            f"--to exl2:{text}: expected bits per weight, {float(LEAST):g} to {float(MOST):g}",
            hint="for example exl2:4.25, or exl2:4.25,h8 for an output matrix of 8 bits",
        )
    known = {f"h{bits}": bits for bits in HEADS}
    if unknown := [flag for flag in flags if flag not in known]:
        raise UsageError(
            f"--to exl2:{text}: unknown {', '.join(map(repr, unknown))}", hint=f"known: {', '.join(known)}"
        )
    if len(flags) > 1:
        raise UsageError(f"--to exl2:{text}: the head's bits are said {len(flags)} times")
    return Exl2Spec(bits, known[flags[0]] if flags else DEFAULT_HEAD)
