"""Which layout each linear gets: a budget of bits, shared out by what was measured.

The budget is bits per weight times the weights of the decoder blocks' linears; embedding, norms and head
are not in it, as in ExLlamaV2. What is minimised is the predicted KL divergence, added up over linears: by
their gradients, of an archive that knows them (quantize/sensitivity.py), else the share of the output's
energy that is lost, times a constant of its kind (quantize/type_errors.py). Of a measurement by ExLlamaV2 it
is the sum of its squared relative errors, which are no KL.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from converters.exl2_measurement import Choice, Measurement, decoder_linears, linear_kind
from quantize.allocate import Option, allocate
from quantize.layouts import HEAD, Layout, Part
from quantize.llama import HEAD as HEAD_NAME
from quantize.llama import LlamaConfig
from quantize.type_errors import SENSITIVITY


@dataclass(frozen=True)
class Layouts:
    """What was decided: `layouts` by the checkpoint's names, head included; `bits` of the decoder's linears.

    `errors` are the predicted lost shares, by name, of linears that were measured one by one; `loss` is what
    was minimised, in nats if they were. `exact` says that no other choice is better, by the prediction.
    """

    layouts: Mapping[str, Layout]
    errors: Mapping[str, float]
    bits: int
    loss: float
    exact: bool


def n_weights(config: LlamaConfig) -> int:
    """Return the weights that a size counts: those of the decoder blocks' linears."""
    return sum(math.prod(shape) for shape in decoder_linears(config).values())


def budget_of(config: LlamaConfig, bits: Fraction) -> int:
    """Return the whole bits that the decoder's linears may take."""
    return math.floor(bits * n_weights(config))


def least_bits(measurement: Measurement) -> int:
    """Return what the cheapest choices take."""
    return sum(min(choice.bits for choice in slot) for slot in measurement.slots)


def most_bits(measurement: Measurement) -> int:
    """Return what the richest choices take."""
    return sum(max(choice.bits for choice in slot) for slot in measurement.slots)


def choose(config: LlamaConfig, measurement: Measurement, bits: Fraction, head_bits: int) -> Layouts:
    """Return every linear's layout; raises PlanError if the cheapest are above the budget."""
    options = [[Option(choice.bits, _loss(choice)) for choice in slot] for slot in measurement.slots]
    found = allocate(options, budget_of(config, bits))
    layouts, errors = dict[str, Layout](), dict[str, float]()
    for slot, number in zip(measurement.slots, found.choice, strict=True):
        choice = slot[number]
        layouts |= choice.layouts
        if measurement.gathered_by and len(choice.layouts) == 1:
            errors |= dict.fromkeys(choice.layouts, choice.error)
    ordered = {name: layouts[name] for name in decoder_linears(config)}
    return Layouts({**ordered, HEAD_NAME: HEAD[head_bits]}, errors, found.bits, found.loss, found.exact)


def _loss(choice: Choice) -> float:
    """Return what a choice is predicted to cost: a single linear in nats, a module by its own measure."""
    if choice.nats is not None:
        return choice.nats
    if len(choice.layouts) > 1:
        return choice.error
    (name,) = choice.layouts
    return SENSITIVITY[linear_kind(name)] * choice.error


def parse_layout(text: str) -> Layout:
    """Return the layout of a name that `Layout.name` gave."""
    parts = []
    for part in text.split(" "):
        widths, share = part.split(":")
        bits, size = widths.split("b")
        parts.append(Part(int(bits), int(size), float(share)))
    return Layout(tuple(parts))
