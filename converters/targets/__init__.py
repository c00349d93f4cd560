"""The formats that can be written, and the reading of `--to FORMAT:QUANT`.

A new format is one module with a class that satisfies `base.Target`, and one line here.
"""

from converters.plan import Request
from converters.targets.base import Target
from converters.targets.gguf import GgufTarget
from quantize.errors import UsageError

__all__ = ["TARGETS", "parse_request"]

TARGETS: dict[str, Target] = {target.format: target for target in (GgufTarget(),)}


def parse_request(text: str) -> Request:
    """Return the request that `gguf:Q8_0`, in any case, stands for.

    Raises UsageError, listing the known formats or types, for anything else.
    """
    format_name, colon, quant_name = text.partition(":")
    target = TARGETS.get(format_name.strip().lower())
    if target is None:
        known = ", ".join(f"{name}:" for name in TARGETS)
        raise UsageError(f"--to {text}: unknown format {format_name!r}", hint=f"known formats: {known}")
    name = quant_name.strip().upper()
    named = {quant.upper(): quant for quant in target.quants}
    if quant := named.get(target.aliases.get(name, name)):
        return Request(target.format, quant)
    fault = f"unknown type {quant_name!r}" if colon else "the type is missing"
    if name in target.refused:
        fault = f"{name} is not written: {target.refused[name]}"
    known = ", ".join(f"{target.format}:{quant}" for quant in target.quants)
    raise UsageError(f"--to {text}: {fault}", hint=f"known: {known}")
