"""`--to exl2:fit=24GiB`: bits per weight such that the model runs in ExLlamaV2 on one card.

What is left of the card goes to the linears of the decoder blocks:

    fit - head - norms - KV cache - overhead - reserve        (converters/exllamav2_memory.py)

None of these depends on the layouts, so the budget is known before them. It is whole bytes, and the layouts
are chosen as for a size that was given, but for its bounds: where the richest layouts fit everywhere, they
are taken, which is a little more than 8 bits per weight.
"""

from dataclasses import dataclass
from fractions import Fraction

from converters.exllamav2_memory import HALVES, cache_bytes, cache_faults, context, norm_bytes, overhead
from converters.runtime_memory import Runtime
from converters.sizes import parse_size
from converters.targets.exl2_spec import Exl2Spec
from converters.targets.exl2_types import n_weights
from quantize.layouts import HEAD
from quantize.llama import LlamaConfig


@dataclass(frozen=True)
class Card:
    """The memory of a card: `size` bytes; those for all but the decoder's linears are `beside`, by part."""

    size: int
    beside: dict[str, int]

    @property
    def room(self) -> int:
        """Bytes for the decoder's linears, negative where there is none."""
        return self.size - sum(self.beside.values())


def card_of(spec: Exl2Spec, config: LlamaConfig, runtime: Runtime) -> Card:
    """Return what a card of the size that `fit=` names has room for."""
    parts = {
        "head": HEAD[spec.head_bits].total_bits(config.vocab_size, config.hidden_size) // 8,
        "norms": norm_bytes(config),
        "KV cache": cache_bytes(config, runtime),
        "overhead": sum(overhead(config, runtime).values()),
        "reserve": runtime.reserve,
    }
    return Card(parse_size(spec.fit), parts)


def fitting_bits(spec: Exl2Spec, config: LlamaConfig, runtime: Runtime) -> Fraction:
    """Return the bits per weight of the decoder's linears: those that were said, or those that fit."""
    if spec.bits is not None:
        return spec.bits
    return Fraction(8 * card_of(spec, config, runtime).room, n_weights(config))


def fit_faults(spec: Exl2Spec, config: LlamaConfig, runtime: Runtime, least: int) -> list[str]:
    """Return why nothing fits: a cache that cannot be, `least` bits of the cheapest layouts, too many."""
    card, faults = card_of(spec, config, runtime), cache_faults(config, runtime)
    if 8 * card.room < least:
        parts = {"decoder's linears": least // 8, **card.beside}
        said = ", ".join(f"{part} {n_bytes:,}" for part, n_bytes in parts.items())
        needed = sum(parts.values())
        faults.append(f"the cheapest layouts need {needed:,} bytes, {card.size:,} are allowed: {said}")
    return faults


def fit_notes(spec: Exl2Spec, config: LlamaConfig, runtime: Runtime, bits: int) -> list[str]:
    """Return what takes how much of the card, the linears `bits` bits, and what is not on it."""
    card, overheads = card_of(spec, config, runtime), overhead(config, runtime)
    parts = {"decoder's linears": bits // 8, **card.beside}
    said = ", ".join(f"{part} {readable(n)}" for part, n in parts.items())
    worked = ", ".join(f"{part} {readable(n)}" for part, n in overheads.items())
    cache = f"KV cache of {context(runtime):,} tokens in {runtime.cache or HALVES}"
    embedding = f"the embedding, {readable(2 * config.vocab_size * config.hidden_size)}"
    return [
        f"of {readable(card.size)}: {said}; {readable(card.room - bits // 8)} are left",
        f"{cache}; overhead at the most, by ExLlamaV2's sources, not measured: {worked}",
        f"not on the card: {embedding}, which ExLlamaV2 keeps in main memory",
        "not counted: CUDA's own memory, which --reserve is for",
    ]


def readable(n_bytes: int) -> str:
    """Return a size in the largest binary unit of which there is one."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} bytes"
