"""ExLlamaV2's own words for a measurement: for each attention and MLP a list of ways to store all of it.

Of each way its file has a layout for each linear, the bits of all, and an accuracy: 1 - |error| / |output| of
the module. Ours is measured linear by linear, so the ways are made of it: for a ladder of budgets the layouts
that lose the least, and as accuracy 1 - sqrt(sum of lost shares). That is the error if the linears' errors
add up and the residual stream, which ExLlamaV2's measure has in it, is left out: coarser steps between its
modules than its own numbers, the same order within them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from quantize.allocate import Option, allocate
from quantize.layout_errors import Prediction
from quantize.layouts import Layout, Part
from quantize.llama import LlamaConfig

MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_STEPS = 20
_LEAST_ACCURACY = 1e-6


def module_names(config: LlamaConfig) -> Iterator[str]:
    """Yield the modules of all blocks, in the model's order."""
    for layer in range(config.n_layers):
        yield from (f"model.layers.{layer}.{module}" for module in MODULES)


def linears_of(module: str) -> tuple[str, ...]:
    """Return a module's linears by their names within it."""
    return MODULES[module.rsplit(".", 1)[-1]]


def their_layout(stated: Mapping[str, Any]) -> Layout:
    """Return the layout of `group_size` (one, or one for each width), `bits` and `bits_prop`.

    Raises ValueError, KeyError or TypeError for what is none.
    """
    sizes = stated["group_size"]
    parts = []
    for bits, share in zip(stated["bits"], stated["bits_prop"], strict=True):
        size = sizes[str(bits)] if isinstance(sizes, dict) else sizes
        parts.append(Part(int(bits), int(size), float(share)))
    if stated["scale_bits"] != 4 or any(part.group_size < 16 for part in parts):
        raise ValueError(f"scales of {stated['scale_bits']} bits, parts {parts}")
    return Layout(tuple(parts))


def modules_document(config: LlamaConfig, predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """Return the content of ExLlamaV2's file, made of predictions by the names of all decoder linears."""
    modules = {module: _ways(module, predictions) for module in module_names(config)}
    # Its modules are the embedding, two a block, the final norm and the head; all have been gone through.
    return {"measurement": modules, "last_module_idx": 2 * config.n_layers + 2}


def _ways(module: str, predictions: Mapping[str, Prediction]) -> list[dict[str, Any]]:
    linears = linears_of(module)
    errors = [predictions[f"{module}.{linear}.weight"].errors for linear in linears]
    options = [[Option(each.bits, each.error) for each in some] for some in errors]
    least, most = (sum(pick(each.bits for each in some) for some in errors) for pick in (min, max))
    ways: dict[tuple[int, ...], dict[str, Any]] = {}
    for step in range(_STEPS + 1):
        found = allocate(options, least + (most - least) * step // _STEPS)
        layouts = [some[i].layout for some, i in zip(errors, found.choice, strict=True)]
        way = {linear: _stated(layout) for linear, layout in zip(linears, layouts, strict=True)}
        accuracy = max(_LEAST_ACCURACY, 1 - math.sqrt(found.loss))
        ways[found.choice] = {"accuracy": accuracy, "total_bits": found.bits, **way}
    return list(ways.values())


def _stated(layout: Layout) -> dict[str, Any]:
    return {
        "group_size": {str(part.bits): part.group_size for part in layout.parts},
        "bits": [part.bits for part in layout.parts],
        "bits_prop": [part.share for part in layout.parts],
        "scale_bits": 4,
    }
