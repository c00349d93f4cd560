"""What stands behind `--to exl2:`: bits per weight or a card, and the bits of the output matrix.

exl2:4.25                 4.25 bits per weight over the linears of the decoder blocks, head in 6 bits
exl2:4.25,h8              the same with the head in 8 bits
exl2:fit=24GiB            as many bits per weight as a card of 24 GiB has room for, beside the rest
exl2:fit=24GiB,h8
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from converters.sizes import parse_size
from quantize.errors import UsageError

LEAST, MOST = Fraction("2.3"), Fraction(8)
HEADS = (6, 8)
DEFAULT_HEAD = 6
_BITS = re.compile(r"[0-9]+(\.[0-9]{1,6})?", re.ASCII)
_FIT = re.compile(r"fit\s*=\s*(.*)", re.IGNORECASE)
_AMOUNT = re.compile(r"[0-9.]+ *[A-Za-z]*", re.ASCII)


@dataclass(frozen=True)
class Exl2Spec:
    """A size: `bits` per weight over the decoder's linears, as ExLlamaV2 counts, and those of the head.

    `bits` is None where `fit`, a number of bytes as people write it, decides; otherwise that is empty.
    """

    bits: Fraction | None
    head_bits: int = DEFAULT_HEAD
    fit: str = ""

    def __str__(self) -> str:
        head = "" if self.head_bits == DEFAULT_HEAD else f",h{self.head_bits}"
        size = f"fit={self.fit}" if self.bits is None else f"{float(self.bits):.9g}"
        return size + head

    @property
    def directory(self) -> str:
        """The export's folder."""
        return "exl2-" + str(self).replace(",", "-").replace("=", "-")


def parse_spec(text: str) -> Exl2Spec:
    """Return what `4.25,h8` or `fit=24GiB` stands for; raises UsageError, saying what is expected."""
    size, *flags = (part.strip() for part in text.split(","))
    head_bits = _head_bits(text, [flag.lower() for flag in flags])
    if found := _FIT.fullmatch(size):
        return Exl2Spec(None, head_bits, _amount(text, found[1]))
    return Exl2Spec(_bits(text, size), head_bits)


def _bits(text: str, size: str) -> Fraction:
    bits = Fraction(size) if _BITS.fullmatch(size) else Fraction(0)
    if not LEAST <= bits <= MOST:
        raise UsageError(
            f"--to exl2:{text}: expected bits per weight, {float(LEAST):g} to {float(MOST):g}",
            hint="for example exl2:4.25, exl2:4.25,h8 for an output matrix of 8 bits, or exl2:fit=24GiB",
        )
    return bits


def _amount(text: str, amount: str) -> str:
    """Return the bytes of a card in their own spelling."""
    try:
        size = parse_size(amount) if _AMOUNT.fullmatch(amount) else 0
    except ValueError:
        size = 0
    if not size:
        fault = f"--to exl2:{text}: {amount!r} is no amount"
        raise UsageError(fault, hint="for example exl2:fit=24GiB")
    return amount.replace(" ", "")


def _head_bits(text: str, flags: list[str]) -> int:
    known = {f"h{bits}": bits for bits in HEADS}
    if unknown := [flag for flag in flags if flag not in known]:
        raise UsageError(
            f"--to exl2:{text}: unknown {', '.join(map(repr, unknown))}", hint=f"known: {', '.join(known)}"
        )
    if len(flags) > 1:
        raise UsageError(f"--to exl2:{text}: the head's bits are said {len(flags)} times")
    return known[flags[0]] if flags else DEFAULT_HEAD
