"""What each layout of each linear would cost, and the file in which that is kept: measurement.json.

It is gathered once for a model and an archive (`converters.exl2_measure`) and serves every size. The file:

    format    "dscq-exl2-measurement"      version   1
    key       digest of all that decides the numbers: model, Hessians, solver, layouts
    linears   name -> {shape: [N, K], energy: tr(W H Wᵀ), layouts: [{parts, error}]}, where `parts` are [bits,
              group size, share] and `error` is the predicted tr(E H Eᵀ) / tr(W H Wᵀ); and `nats`, the KL
              divergence that an error of 1 would cost, from an archive that knows gradients
    measurement, last_module_idx           the same for ExLlamaV2's converter (`converters.exl2_modules`)

A file that has these alone is ExLlamaV2's own, and is read as well. It chooses for a whole attention or MLP,
so there several linears are one slot; its numbers are 1 - accuracy, a relative error whose square is such a
share of energy.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.config import read_json
from converters.disk import write_whole
from converters.exl2_modules import linears_of, module_names, modules_document, their_layout
from converters.stats.archive import Archive
from quantize.codecs.exl2 import group_faults
from quantize.errors import CheckpointError, UsageError
from quantize.first_tokens import SHARE
from quantize.layout_errors import PREDICTING, ROWS, Prediction
from quantize.layouts import ATTENTION, DOWN, GATE_UP, Layout, Part
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import INPUTS
from quantize.sensitivity import fisher_kl
from quantize.solver import SOLVING

NAME = "measurement.json"
FORMAT, VERSION = "dscq-exl2-measurement", 1
DAMP = 0.05
"""Share of the Hessian's mean diagonal that is added to it, in measuring and in quantizing."""
_FAMILIES = {"mlp.gate_proj": GATE_UP, "mlp.up_proj": GATE_UP, "mlp.down_proj": DOWN}


@dataclass(frozen=True)
class Choice:
    """One way to store a slot's linears: a layout for each by its name, bits in all, and the loss of it.

    `nats` is the predicted KL divergence, where gradients say it.
    """

    layouts: Mapping[str, Layout]
    bits: int
    error: float
    nats: float | None = None


@dataclass(frozen=True)
class Measurement:
    """`slots` are the linears, or modules, that choose for themselves; `gathered_by` is for the user."""

    slots: tuple[tuple[Choice, ...], ...]
    gathered_by: str
    document: Mapping[str, Any]


def layouts_of(name: str) -> Sequence[Layout]:
    """Return the layouts that are tried for a linear of a decoder block, by its tensor's name."""
    return _FAMILIES.get(linear_kind(name), ATTENTION)


def linear_kind(name: str) -> str:
    """Return a linear's name within its block: mlp.up_proj."""
    return name.removesuffix(".weight").split(".", 3)[-1]


def decoder_linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return name -> (N, K) of the linears that a size counts, in the model's order."""
    shapes = config.tensor_shapes()
    names = [block_tensor(layer, name) for layer in range(config.n_layers) for name in INPUTS]
    return {name: (shapes[name][0], shapes[name][1]) for name in names}


def measurement_key(archive: Archive) -> str:
    """Return the digest of all that decides a measurement's numbers, but for the machine's rounding."""
    config = archive.config
    inputs = {name: archive.identity(name) for name in decoder_linears(config)}
    tried = {name: [layout.name for layout in layouts_of(f"model.layers.0.{name}.weight")] for name in INPUTS}
    versions = [SOLVING, PREDICTING, ROWS, DAMP, SHARE]
    decided = [versions, tried, inputs, archive.gradients(), archive.manifest.request.model]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def document_of(
    key: str,
    config: LlamaConfig,
    predictions: Mapping[str, Prediction],
    gradients: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the content of the file; `gradients` are the mean |g|^2 at the linears' outputs."""
    shapes = decoder_linears(config)
    linears = {
        name: {
            "shape": list(shapes[name]),
            "energy": predictions[name].energy,
            **_nats(
                predictions[name].energy, shapes[name][0], None if gradients is None else gradients[name]
            ),
            "layouts": [
                {"parts": [[p.bits, p.group_size, p.share] for p in each.layout.parts], "error": each.error}
                for each in predictions[name].errors
            ],
        }
        for name in shapes
    }
    head = {"format": FORMAT, "version": VERSION, "key": key, "linears": linears}
    return head | modules_document(config, predictions)


def _nats(energy: float, n_outputs: int, gradient: float | None) -> dict[str, float]:
    return {} if gradient is None else {"nats": fisher_kl(energy, n_outputs, gradient)}


def write_measurement(path: Path, document: Mapping[str, Any]) -> None:
    """Write the file so that it appears whole; raises OutputError."""
    write_whole(path, (json.dumps(document) + "\n").encode("ascii"))


def read_measurement(path: Path, config: LlamaConfig, key: str | None) -> Measurement:
    """Read a measurement of ours, which must have this key unless that is None, or one of ExLlamaV2's.

    Raises UsageError for what is none, or is another model's or another archive's, with all reasons.
    """
    try:
        document = read_json(path)
    except CheckpointError as error:
        raise UsageError(f"{path}: no measurement: {error.message}") from None
    try:
        if document.get("format") == FORMAT:
            return _own(path, document, config, key)
        if "format" not in document and isinstance(document.get("measurement"), dict):
            return _exllamav2s(path, document, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path}: a damaged measurement: {type(error).__name__}: {error}") from None
    raise UsageError(f"{path}: no measurement", hint=f"dscq convert --to exl2: writes one, {NAME}")


def from_document(document: Mapping[str, Any]) -> Measurement:
    """Return the measurement of a content that this version wrote."""
    slots = []
    for name, linear in document["linears"].items():
        n, k = linear["shape"]
        choices = []
        for each in linear["layouts"]:
            layout = Layout(
                tuple(Part(int(bits), int(size), float(share)) for bits, size, share in each["parts"])
            )
            error, whole = float(each["error"]), linear.get("nats")
            nats = None if whole is None else float(whole) * error
            choices.append(Choice({name: layout}, layout.total_bits(n, k), error, nats))
        slots.append(tuple(choices))
    return Measurement(tuple(slots), "dscq", document)


def nominal(config: LlamaConfig) -> Measurement:
    """Return what a plan can be made with before anything is measured: a code's error is 4^-bits."""
    slots = []
    for name, (n, k) in decoder_linears(config).items():
        choices = []
        for layout in layouts_of(name):
            error = sum(group.size * 4.0**-group.bits for group in layout.groups(k)) / k
            choices.append(Choice({name: layout}, layout.total_bits(n, k), error))
        slots.append(tuple(choices))
    return Measurement(tuple(slots), "", {})


def _own(path: Path, document: Mapping[str, Any], config: LlamaConfig, key: str | None) -> Measurement:
    if document["version"] != VERSION:
        raise UsageError(f"{path}: a measurement of version {document['version']}; known: {VERSION}")
    if key is not None and document["key"] != key:
        raise UsageError(
            f"{path}: measured on another model, with another archive or by another version",
            hint="give the --stats that it was made with, or leave it out to measure anew",
        )
    measurement = from_document(document)
    _check_fit(path, measurement, config)
    return measurement


def _exllamav2s(path: Path, document: Mapping[str, Any], config: LlamaConfig) -> Measurement:
    """Return ExLlamaV2's choices; bits are counted anew, for theirs leave the padding out."""
    shapes, slots = decoder_linears(config), []
    missing = [name for name in module_names(config) if name not in document["measurement"]]
    if missing:
        reasons = [f"{name} is missing" for name in missing[:5]]
        raise UsageError(f"{path}: a measurement of another model", reasons=reasons)
    for module in module_names(config):
        linears = linears_of(module)
        choices = []
        for each in document["measurement"][module]:
            layouts = {f"{module}.{linear}.weight": their_layout(each[linear]) for linear in linears}
            bits = sum(layout.total_bits(*shapes[name]) for name, layout in layouts.items())
            choices.append(Choice(layouts, bits, (1 - float(each["accuracy"])) ** 2))
        slots.append(tuple(choices))
    measurement = Measurement(tuple(slots), "exllamav2", document)
    _check_fit(path, measurement, config)
    return measurement


def _check_fit(path: Path, measurement: Measurement, config: LlamaConfig) -> None:
    """Raise UsageError, with all reasons, unless this is a measurement of a model of these shapes."""
    shapes, reasons, found = decoder_linears(config), list[str](), set[str]()
    for slot in measurement.slots:
        reasons += [] if slot else ["a slot without a choice"]
        for choice in slot:
            if not math.isfinite(choice.error) or choice.error < 0:
                reasons.append(f"{', '.join(choice.layouts)}: an error of {choice.error}")
            for name, layout in choice.layouts.items():
                found.add(name)
                if name in shapes:
                    faults = group_faults(layout.groups(shapes[name][1]), shapes[name][1])
                    reasons += [f"{name}: {layout.name}: {fault}" for fault in faults]
    reasons += [f"{name} is missing" for name in shapes if name not in found]
    reasons += [f"{name} is not in the model" for name in found if name not in shapes]
    if reasons:
        raise UsageError(f"{path}: a measurement of another model, or damaged", reasons=reasons[:10])
