"""`--to gguf:bpw=3.5`, `size=4.1GB`, `fit=8GiB`: types for all tensors, so that the least is lost in a size.

    bpw     8 * bytes of the file / weights of the model
    size    bytes of the file
    fit     bytes of memory, for the file and what llama.cpp needs beside it (converters/runtime_memory.py)

"The file" is all files of a split, their heads included. (llama.cpp keeps token_embd.weight in main memory
where it can: `fit` counts it, and so errs on the safe side. With --ngl what is on the card counts alone, and
the types of all blocks are still chosen together: those that are not there get no better ones.) A matrix
that no option pins may have each type that its rows fit, with the bytes in the file and the predicted loss of
it; `quantize.allocate` chooses. A head's length depends, if little, on the types, so the bytes of the whole
are counted after the choice, and the choice is made again with as much less as they are over.

Of two types that lose the same but for 2 %, the one that is decoded faster wins, if it takes no more bytes.

Before there are statistics, while a run has yet to measure them, types are provisional: a weight of b bits is
taken to lose 4^-b. The sizes are then what they will be, and can be checked.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from converters.gguf_file import padded
from converters.names import gguf_name
from converters.plan import ConvertOptions
from converters.runtime_memory import beside_weights, blocks_on_card, on_card
from converters.sizes import parse_size
from converters.targets.gguf_speed import without_slower
from converters.targets.gguf_types import GgufTypes
from quantize.allocate import Option, allocate
from quantize.codecs import CODECS, codec
from quantize.errors import PlanError, UsageError
from quantize.llama import EMBEDDING, LlamaConfig
from quantize.recipes import Recipe
from quantize.type_errors import usable_types

KINDS = ("bpw", "size", "fit")
_BUDGET = re.compile(r"(bpw|size|fit)\s*=\s*(.*)", re.IGNORECASE)
_PLAN = "plan="
_ATTEMPTS = 8
_HALVINGS = 20
Losses = Mapping[str, Mapping[str, float]]
CountBytes = Callable[[GgufTypes], int]
"""From types to the bytes of all files of an export of them."""


def parse_budget(text: str) -> str | None:
    """Return a budget in its own spelling, None for what is none; raises UsageError for one amiss."""
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        return None
    kind, amount = found[1].lower(), found[2].strip()
    try:
        positive = (float(amount) if kind == "bpw" else parse_size(amount)) > 0
    except ValueError:
        positive = False
    if not positive or not re.fullmatch(r"[0-9.]+ *[A-Za-z]*", amount):
        example = {"bpw": "bpw=3.5", "size": "size=4.1GB", "fit": "fit=8GiB"}[kind]
        raise UsageError(f"--to gguf:{text}: {amount!r} is no amount", hint=f"for example gguf:{example}")
    return f"{kind}={amount.replace(' ', '')}"


def is_budget(quant: str) -> bool:
    """Return whether a request is for a size in place of a recipe."""
    return quant.partition("=")[0] in KINDS


def plan_quant(stem: str) -> str:
    """Return the quant of a request for a plan file of that name."""
    return _PLAN + stem


def is_plan(quant: str) -> bool:
    """Return whether a request is for the types of a plan file."""
    return quant.startswith(_PLAN)


def budget_bytes(quant: str, config: LlamaConfig, options: ConvertOptions) -> int:
    """Return how many bytes the files may have, which is negative where `fit` leaves no room."""
    kind, _, amount = quant.partition("=")
    if kind == "bpw":
        return math.floor(float(amount) * config.n_parameters / 8)
    size = parse_size(amount)
    return size if kind == "size" else size - beside_weights(config, options.runtime)


def allocated(quant: str, config: LlamaConfig, options: ConvertOptions, count: CountBytes) -> GgufTypes:
    """Return types whose files have no more bytes than the budget, with the least predicted loss.

    Raises PlanError where the smallest types are too large.
    """
    names, choices = _options(config, options)
    budget = budget_bytes(quant, config, options)

    def types_of(chosen: Sequence[str]) -> GgufTypes:
        return _types(quant, config, options, dict(zip(names, chosen, strict=True)))

    def shared_out(room: int) -> GgufTypes:
        found = allocate([[option for _, option in each] for each in choices], room)
        return types_of([each[i][0] for each, i in zip(choices, found.choice, strict=True)])

    cheapest = types_of([min(each, key=lambda option: option[1].bits)[0] for each in choices])
    least = sum(min(option.bits for _, option in each) for each in choices)
    if quant.startswith("fit=") and options.runtime.gpu_layers is not None:
        most = sum(max(option.bits for _, option in each) for each in choices)
        count, search = card_bytes, partial(_largest, least, most)
    else:
        search = partial(_close, least + 8 * (budget - count(cheapest)))
    if (floor := count(cheapest)) > budget:
        raise PlanError(_too_small(quant, config, options, floor, budget))
    types = search(shared_out, lambda found: count(found) - budget)
    return replace(types, remarks=_remarks(types, budget))


def _close(room: int, shared_out: Callable[[int], GgufTypes], over: CountBytes) -> GgufTypes:
    """Return what fits of a room that is hardly too large: a head's length depends on the types."""
    for _ in range(_ATTEMPTS):
        types = shared_out(room)
        if (excess := over(types)) <= 0:
            return types
        room -= 8 * excess
    raise PlanError("no types were found whose files have no more bytes than that")


def _largest(least: int, most: int, shared_out: Callable[[int], GgufTypes], over: CountBytes) -> GgufTypes:
    """Return what fits of the largest room, between the cheapest types and the richest, by halving.

    What is on a card hardly ever shrinks when the whole grows; where it does, another choice than the very
    best may come out, and one that fits.
    """
    types = shared_out(most)
    if over(types) <= 0:
        return types
    types = shared_out(least)
    for _ in range(_HALVINGS):
        middle = (least + most) // 2
        tried = shared_out(middle)
        if over(tried) <= 0:
            types, least = tried, middle
        else:
            most = middle
    return types


def card_bytes(types: GgufTypes) -> int:
    """Return the bytes of the tensors that are on the card."""
    config, runtime = types.config, types.options.runtime
    return sum(
        padded(_n_bytes(types.choices[name].quant, shape))
        for name, shape in config.tensor_shapes().items()
        if on_card(config, runtime, name)
    )


def _options(
    config: LlamaConfig, options: ConvertOptions
) -> tuple[list[str], list[list[tuple[str, Option]]]]:
    """Return the matrices that are free, and the types that each may have.

    Raises PlanError for matrices whose rows fit excluded types alone.
    """
    base = GgufTypes(config, _recipe("", {}, config), options)
    free = [name for name in base.matrices() if not base.pinned(name)]
    shapes = config.tensor_shapes()
    losses = options.losses or {name: _nominal(name, shapes[name], options) for name in free}
    allowed = {
        name: {quant: nats for quant, nats in losses[name].items() if quant not in options.excluded}
        for name in free
    }
    if bare := [f"{gguf_name(name)}: all of {', '.join(losses[name])}" for name in free if not allowed[name]]:
        raise PlanError("every type that these matrices can have is excluded", reasons=bare[:5])
    return free, [
        without_slower(
            {
                quant: Option(8 * padded(_n_bytes(quant, shapes[name])), nats)
                for quant, nats in allowed[name].items()
            }
        )
        for name in free
    ]


def _nominal(name: str, shape: Sequence[int], options: ConvertOptions) -> dict[str, float]:
    """Return what types lose as long as nothing is measured: in proportion, 4^-bits for each weight."""
    measured = name != EMBEDDING and options.importances is not None
    kinds = [CODECS[quant] for quant in usable_types(shape[-1], measured=measured)]
    return {each.name: math.prod(shape) * 4 ** (-8 * each.block_bytes / each.block_size) for each in kinds}


def _n_bytes(quant: str, shape: Sequence[int]) -> int:
    return math.prod(shape[:-1]) * codec(quant).row_bytes(shape[-1])


def assigned_types(
    quant: str, config: LlamaConfig, options: ConvertOptions, by_written_name: Mapping[str, str]
) -> GgufTypes:
    """Return the types of a plan that was given back, by GGUF's names of the matrices."""
    names = {gguf_name(name): name for name, shape in config.tensor_shapes().items() if len(shape) > 1}
    assigned = {names[written]: kind for written, kind in by_written_name.items()}
    types = _types(quant, config, options, assigned)
    return replace(types, remarks=tuple(_loss_remark(types)))


def plan_faults(config: LlamaConfig, by_written_name: Mapping[str, str]) -> list[str]:
    """Return every reason why a plan's types are none of this model's matrices."""
    shapes = {gguf_name(name): shape for name, shape in config.tensor_shapes().items() if len(shape) > 1}
    reasons = [f"{name}: the model has no such matrix" for name in by_written_name if name not in shapes]
    reasons += [f"{name}: the plan has no type for it" for name in shapes if name not in by_written_name]
    for name, quant in by_written_name.items():
        if quant not in CODECS or not CODECS[quant].writable:
            known = ", ".join(kind for kind, each in CODECS.items() if each.writable)
            reasons.append(f"{name}: {quant!r} is no type that can be written; known: {known}")
        elif name in shapes and shapes[name][-1] % (size := CODECS[quant].block_size):
            reasons.append(f"{name}: {quant} has blocks of {size}, the rows {shapes[name][-1]} columns")
    return reasons


def _types(
    quant: str, config: LlamaConfig, options: ConvertOptions, assigned: Mapping[str, str]
) -> GgufTypes:
    return GgufTypes(config, _recipe(quant, assigned, config), options, assigned)


def _recipe(quant: str, assigned: Mapping[str, str], config: LlamaConfig) -> Recipe:
    """Return a recipe of that name; its number is that of the type that most weights have.

    llama.cpp shows the number and asks each tensor for its type.
    """
    weights, shapes = Counter[str](), config.tensor_shapes()
    for name, kind in assigned.items():
        weights[kind] += math.prod(shapes[name])
    most = weights.most_common(1)[0][0] if weights else "F16"
    return Recipe(quant, codec(most).file_type, "Q8_0", "Q8_0")


def predicted_loss(types: GgufTypes) -> float | None:
    """Return the predicted KL divergence of types, in nats; None where a type's loss is not known.

    F32 loses nothing, and BF16 is taken to lose nothing.
    """
    losses, total = types.options.losses, 0.0
    if losses is None:
        return None
    for name in types.matrices():
        quant = types.choices[name].quant
        nats = 0.0 if quant in ("F32", "BF16") else losses[name].get(quant)
        if nats is None:
            return None
        total += nats
    return total


def _remarks(types: GgufTypes, budget: int) -> tuple[str, ...]:
    if types.options.losses is None:
        return (f"at most {budget:,} bytes; the types are provisional: no losses have been predicted yet",)
    runtime = types.options.runtime
    if not (types.recipe.name.startswith("fit=") and runtime.gpu_layers is not None):
        return (f"at most {budget:,} bytes", *_exclusion(types), *_loss_remark(types))
    n_blocks = len(blocks_on_card(types.config, runtime))
    there = f"the output matrix and {n_blocks} of {types.config.n_layers} blocks"
    placed = f"on the card: {there}, {card_bytes(types):,} bytes of at most {budget:,}"
    return (placed, *_exclusion(types), *_loss_remark(types))


def _exclusion(types: GgufTypes) -> list[str]:
    excluded = types.options.excluded
    return [f"without {', '.join(excluded)}, which are excluded"] if excluded else []


def _loss_remark(types: GgufTypes) -> list[str]:
    nats = predicted_loss(types)
    return [] if nats is None else [f"predicted KL divergence {nats:.4g} nats"]


def _too_small(quant: str, config: LlamaConfig, options: ConvertOptions, floor: int, budget: int) -> str:
    fault = f"the smallest types need {floor:,} bytes, {budget:,} are allowed"
    if quant.startswith("fit="):
        beside = beside_weights(config, options.runtime)
        return f"{fault}: {beside:,} of the memory are for KV cache, buffers and reserve"
    return fault
