"""The formats that can be written, and the reading of `--to FORMAT:QUANT`.

A new format is one module with a class that satisfies `base.Target`, and one line here.
"""

from converters.plan import Request
from converters.targets.base import Target
from converters.targets.exl2 import Exl2Target
from converters.targets.gguf import GgufTarget
from converters.targets.gptq import GptqTarget
from quantize.errors import UsageError

__all__ = ["TARGETS", "parse_request"]

TARGETS: dict[str, Target] = {target.format: target for target in (GgufTarget(), GptqTarget(), Exl2Target())}


def parse_request(text: str) -> Request:
    """Return the request that `gguf:Q8_0`, in any case, stands for.

    Raises UsageError, listing the known formats or types, for anything else.
    """
    format_name, colon, quant = text.partition(":")
    target = TARGETS.get(format_name.strip().lower())
    if target is None:
        known = ", ".join(f"{name}:" for name in TARGETS)
        raise UsageError(f"--to {text}: unknown format {format_name!r}", hint=f"known formats: {known}")
    if not colon:
        known = ", ".join(f"{target.format}:{quant}" for quant in target.quants)
        raise UsageError(f"--to {text}: the type is missing", hint=f"known: {known}")
    return Request(target.format, target.parse(quant.strip()))
