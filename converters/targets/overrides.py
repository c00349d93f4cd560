"""`--tensor-type PATTERN=TYPE`: another type for tensors whose name a regular expression is found in.

For GGUF the name is GGUF's and the type one of ggml's (`ffn_down=Q6_K`); for GPTQ the name is that of a
linear in the checkpoint and the type is bits and group size (`mlp.down_proj=8bit-32g`). What the type looks
like says which of the two is meant.
"""

import re
from collections.abc import Sequence

from converters.targets.gguf_types import written_type
from converters.targets.gptq_spec import GptqSpec, parse_shape
from quantize.errors import UsageError

Overrides = tuple[tuple[str, str], ...]
_BITS = re.compile(r"[0-9]+bit.*", re.IGNORECASE)


def parse_overrides(texts: Sequence[str], formats: set[str]) -> tuple[Overrides, Overrides]:
    """Return (regular expression, type) of every override: those for GGUF, and those for GPTQ.

    Raises UsageError for what is no override, and for one of a format that is not asked for.
    """
    of_gguf, of_gptq = [], []
    for text in texts:
        pattern, quant = _split(text)
        is_gptq = _BITS.fullmatch(quant) is not None
        if is_gptq:
            of_gptq.append((pattern, GptqSpec(*parse_shape(quant)).shape))
        else:
            of_gguf.append((pattern, written_type(quant, f"--tensor-type {text}")))
        meant = "gptq" if is_gptq else "gguf"
        if meant not in formats:
            raise UsageError(f"--tensor-type {text}: a type of {meant}:, which is not asked for")
    return tuple(of_gguf), tuple(of_gptq)


def _split(text: str) -> tuple[str, str]:
    option = f"--tensor-type {text}"
    pattern, equals, quant = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"{option}: expected PATTERN=TYPE",
            hint="for example --tensor-type ffn_down=Q6_K, or for GPTQ --tensor-type down_proj=8bit-32g",
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option}: {pattern!r} is no regular expression: {error}") from None
    return pattern, quant.strip()
