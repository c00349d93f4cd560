"""EXL2: ExLlamaV2's checkpoints of mixed widths, to a size of the user's choice.

The linears of the decoder blocks get the layouts that a measurement recommends for the budget
(`exl2_types`), the output matrix that of its bits; both are rounded with their inputs' Hessians
(quantize/solver/exl2). Embedding and norms are half precision. Matrices come whole: a group's maximum is
shared by all outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.donors import slice_key
from converters.exl2_measurement import DAMP, decoder_linears, nominal
from converters.exl2_source import PARTS
from converters.hessians import Hessians
from converters.hf_folder import folder_files, hf_faults
from converters.places import Piece
from converters.plan import ConvertOptions, FilePlan, Plan, Request, TensorPlan
from converters.targets import exl2_layout
from converters.targets.exl2_fit import fit_faults, fit_notes, fitting_bits
from converters.targets.exl2_layout import FLOAT
from converters.targets.exl2_spec import Exl2Spec, parse_spec
from converters.targets.exl2_types import (
    Layouts,
    budget_of,
    choose,
    least_bits,
    most_bits,
    n_weights,
    parse_layout,
)
from converters.targets.solved_folder import SolvedFolder
from quantize.codecs.exl2 import encode, shape_faults
from quantize.errors import ArchiveError
from quantize.layouts import Layout
from quantize.llama import HEAD, LlamaConfig
from quantize.solver import SOLVING
from quantize.solver.exl2 import quantize_matrix
from quantize.solver.factor import Factor, prepare

SHARD_BYTES = 8 << 30
SIZES = ("2.5", "3", "3.5", "4", "4.25", "4.65", "5", "6", "8", "fit=24GiB")
_WRITER = "0.3.2"  # the version of ExLlamaV2 whose tensors these are
_LARGEST = 65504.0


@dataclass(frozen=True)
class Exl2Target:
    """`--to exl2:4.25`, `--to exl2:fit=24GiB`."""

    format: str = "exl2"

    @property
    def quants(self) -> Sequence[str]:
        """Sizes that are usual; any other between the least and the most, and any card, can be had."""
        return SIZES

    def parse(self, text: str) -> str:
        """Return a quant in its own spelling; raises UsageError."""
        return str(parse_spec(text))

    def needs_hessians(self, request: Request) -> bool:
        """Always."""
        return True

    def check(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> list[str]:
        """Return what stands against an export: shapes, too small a size or card, a head without a matrix."""
        config, spec = checkpoint.config, parse_spec(request.quant)
        reasons = hf_faults(checkpoint)
        if config.tied_head:
            reasons.append(f"{HEAD} is tied to the embedding: EXL2's head is a quantized matrix of its own")
        for name, shape in _linears(config).items():
            reasons += [f"{name}: {fault}" for fault in shape_faults(*shape)]
        if reasons:
            return reasons
        least = least_bits(options.measurement or nominal(config))
        if spec.bits is None:
            return fit_faults(spec, config, options.runtime, least)
        if spec.bits < (per_weight := Fraction(least, n_weights(config))):
            rounded = math.ceil(100 * per_weight) / 100
            reasons.append(f"{float(spec.bits):g} bits per weight: this model takes {rounded:g} at the least")
        return reasons

    def plan(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> Plan:
        """Return the folder's files; without a measurement its sizes are right and its layouts are not."""
        spec, config = parse_spec(request.quant), checkpoint.config
        measurement = options.measurement or nominal(config)
        bits = fitting_bits(spec, config, options.runtime)
        chosen = choose(config, measurement, bits, spec.head_bits)
        # As the plan's names say them: the writer reads them there.
        layouts = {name: parse_layout(layout.name) for name, layout in chosen.layouts.items()}
        shapes = config.tensor_shapes()
        groups = {name: layout.groups(shapes[name][1]) for name, layout in layouts.items()}
        small = folder_files(checkpoint, quantization_config(config, spec, chosen, options))
        first = {"config.json": small.pop("config.json")}  # renamed last, for it is what readers look for
        heads = [FilePlan(name, data, len(data)) for name, data in (first | small).items()]
        unplaced = [
            _tensor_plan(name, shape, layouts.get(name), groups, chosen) for name, shape in shapes.items()
        ]
        max_bytes = options.split_max_bytes or SHARD_BYTES
        files, tensors = exl2_layout.shard(unplaced, groups, max_bytes, len(heads))
        notes = _notes(config, chosen, options)
        if spec.bits is None:
            notes += fit_notes(spec, config, options.runtime, chosen.bits)
        if budget_of(config, bits) >= most_bits(measurement):
            notes.append("the richest layouts fit everywhere: more memory brings nothing")
        return Plan(request, (*heads, *files), tuple(tensors), tuple(notes), spec.directory)

    def open_writer(self, plan: Plan, options: ConvertOptions) -> "Exl2Writer":
        """Create the folder under a temporary name; raises OutputError, ArchiveError."""
        return Exl2Writer(plan, options)


class Exl2Writer(SolvedFolder[float, tuple[torch.Tensor, Factor]]):
    """The folder of one plan, being written."""

    def __init__(self, plan: Plan, options: ConvertOptions) -> None:
        """Create every file, or go on with an interrupted run's; raises OutputError, ArchiveError."""
        if options.archive is None:
            raise ArchiveError("EXL2 needs a statistics archive", hint="give --stats, or let dscq calibrate")
        if options.measurement is None:
            raise ArchiveError("EXL2 needs a measurement of its layouts", hint="measure, or read one, first")
        layouts = {t.name: parse_layout(t.quant) for t in plan.tensors if t.quant != FLOAT}
        self._groups = {name: each.groups(plan.by_name[name].shape[1]) for name, each in layouts.items()}
        self._places = exl2_layout.places(plan, self._groups)
        self._errors: dict[str, float] = {}
        hessians = Hessians(options.archive, _prepared, options.device, options.first_tokens)
        super().__init__(plan, options, hessians)

    def _shares(self) -> Mapping[str, float]:
        return self._errors

    def put(self, name: str, first_row: int, rows: torch.Tensor) -> Piece:
        """Quantize a linear, which comes whole, or round rows (n, K) of another tensor, and write them."""
        tensor, places = self._plan.by_name[name], self._places[name]
        file, groups = self._folder.files[tensor.file], self._groups.get(name)
        if groups is None:
            return self._put_float(tensor, first_row, rows)
        rounding = f"{SOLVING} {DAMP} {self._effort} {self._hessians.archive.identity(name)}"
        key = slice_key(rows, f"exl2 {tensor.quant}", 0, None, f"{rounding} {self._hessians.device}")
        found = self._reuse(name, file, key, places)
        if found is not None:
            return found
        with self._solving(name):
            H, factor = self._hessians.prepared(name, DAMP)
            result = quantize_matrix(rows.to(self._hessians.device), H, factor, groups, self._effort)
            stored = encode(result.linear)
        with self._lock:
            self._errors[name] = result.error
        packed = b"".join(getattr(stored, part).numpy().tobytes() for part in PARTS)
        return file.write(key, places, memoryview(packed))


def _prepared(
    H: torch.Tensor, damp_scale: float, damp: float, name: str
) -> tuple[tuple[torch.Tensor, Factor], tuple[str, ...]]:
    factor = prepare(H, damp=damp * damp_scale, order="activation", name=name)
    return (H, factor), factor.log


def quantization_config(
    config: LlamaConfig, spec: Exl2Spec, chosen: Layouts, options: ConvertOptions
) -> dict[str, Any]:
    """Return what config.json says: the loader looks at the tensors alone, user interfaces look here."""
    calibration: dict[str, Any] = {}
    used = round(chosen.bits / n_weights(config), 4)
    if options.archive is not None:
        manifest = options.archive.manifest
        calibration = {
            "rows": manifest.n_rows,
            "length": manifest.n_tokens // max(manifest.n_rows, 1),
            "dataset": str(manifest.request.corpus.get("name", "")),
        }
    return {
        "quant_method": "exl2",
        "version": _WRITER,
        "bits": used if spec.bits is None else float(spec.bits),
        "bits_in_use": used,
        "head_bits": spec.head_bits,
        "calibration": calibration,
        "meta": {"quantizer": [f"dscq:{version('dscq')}"]},
    }


def _linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    return {**decoder_linears(config), HEAD: (config.vocab_size, config.hidden_size)}


def _notes(config: LlamaConfig, chosen: Layouts, options: ConvertOptions) -> list[str]:
    """Return what the budget came to."""
    used = chosen.bits / n_weights(config)
    notes = [f"{used:.4f} bits per weight of the decoder's linears"]
    if options.measurement is None:
        return [*notes, "nothing is measured yet: sizes are as the budget says, layouts will be others"]
    best = "the least that the budget allows" if chosen.exact else "near the least that the budget allows"
    if options.measurement.gathered_by == "exllamav2":
        return [*notes, f"layouts by exllamav2's measurement, squared errors {chosen.loss:.3g}: {best}"]
    return [*notes, f"predicted KL divergence of these linears, roughly: {chosen.loss:.3g} nats, {best}"]


def _tensor_plan(
    name: str,
    shape: tuple[int, ...],
    layout: Layout | None,
    groups: exl2_layout.Groups,
    chosen: Layouts,
) -> TensorPlan:
    error = chosen.errors.get(name)
    reason = "by the head's bits" if name == HEAD else "by the budget"
    if error is not None:
        reason += f", predicted error {error:.3g}"
    return TensorPlan(
        name=name,
        written_name=name if layout is None else name.removesuffix(".weight"),
        shape=shape,
        quant=FLOAT if layout is None else layout.name,
        reason="not a linear" if layout is None else reason,
        n_bytes=exl2_layout.n_bytes(name, shape, groups),
        file=0,
        offset=0,
        row_step=1 if layout is None else shape[0],
        overflow=_LARGEST,
        compensated=layout is not None,
    )
