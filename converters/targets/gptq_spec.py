"""What stands behind `--to gptq:`: bits, group size, and what else a GPTQ checkpoint can be.

gptq:4bit-128g                4 bits, groups of 128 columns, symmetric
gptq:3bit-32g,asym            with zero-points
gptq:4bit--1g                 one group a row
gptq:4bit-64g,desc_act        groups along falling activation: smaller errors, slower kernels
gptq:4bit-128g,v2             zero-points as they are (gptq_v2), not less one
"""

import re
from dataclasses import dataclass

from quantize.codecs.gptq import BITS, Version
from quantize.errors import UsageError
from quantize.solver.linears import Effort, Settings

GROUP_SIZES = (32, 64, 128, -1)
_FLAGS = ("desc_act", "asym", "v2")
_SHAPE = re.compile(r"([0-9]+)bit(?:-(-?[0-9]+)g)?", re.IGNORECASE)
_DEFAULT_GROUP = 128


@dataclass(frozen=True)
class GptqSpec:
    """One kind of GPTQ checkpoint; a group size of -1 is one group a row."""

    bits: int = 4
    group_size: int = _DEFAULT_GROUP
    desc_act: bool = False
    symmetric: bool = True
    version: Version = 1

    def __str__(self) -> str:
        flags = {"desc_act": self.desc_act, "asym": not self.symmetric, "v2": self.version == 2}
        return ",".join([self.shape, *(flag for flag, is_set in flags.items() if is_set)])

    @property
    def shape(self) -> str:
        """Bits and group size: 4bit-128g."""
        return f"{self.bits}bit-{self.group_size}g"

    @property
    def directory(self) -> str:
        """The export's folder."""
        return "gptq-" + str(self).replace(",", "-")

    def n_groups(self, n_columns: int) -> int:
        """Return the groups of a row."""
        return 1 if self.group_size == -1 else -(-n_columns // self.group_size)

    def settings(self, effort: Effort) -> Settings:
        """Return what the solver is to do."""
        return Settings(
            bits=self.bits,
            group_size=max(self.group_size, 0),
            symmetric=self.symmetric,
            desc_act=self.desc_act,
            effort=effort,
        )


def parse_spec(text: str) -> GptqSpec:
    """Return what `4bit-128g,desc_act` stands for; raises UsageError, listing what is known."""
    shape, *flags = (part.strip() for part in text.split(","))
    bits, group_size = parse_shape(shape)
    flags = [flag.lower() for flag in flags]
    if unknown := [flag for flag in flags if flag not in _FLAGS]:
        raise UsageError(
            f"--to gptq:{text}: unknown {', '.join(map(repr, unknown))}", hint=f"known: {', '.join(_FLAGS)}"
        )
    version: Version = 2 if "v2" in flags else 1
    return GptqSpec(bits, group_size, "desc_act" in flags, "asym" not in flags, version)


def parse_shape(text: str) -> tuple[int, int]:
    """Return bits and group size of `4bit-128g`; the group size is 128 where it is not said.

    Raises UsageError for others than GPTQ's readers know.
    """
    found = _SHAPE.fullmatch(text)
    bits, group_size = (int(found[1]), int(found[2] or _DEFAULT_GROUP)) if found else (0, 0)
    if bits not in BITS or group_size not in GROUP_SIZES:
        known = f"{', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}"
        raise UsageError(
            f"gptq:{text}: expected BITSbit-GROUPg, as 4bit-128g",
            hint=f"known: {known} (-1: one group a row)",
        )
    return bits, group_size
