"""GPTQ: the 4-bit checkpoints of exllama, transformers and vLLM.

The linears of the decoder blocks are quantized with their inputs' Hessians (quantize/solver); embedding,
norms and output matrix stay half precision, as all readers expect. Codes are stored as the solver found them
under the scale in half precision: nothing is rounded twice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.donors import slice_key
from converters.hessians import Hessians
from converters.hf_folder import folder_files, hf_faults
from converters.places import Piece
from converters.plan import ConvertOptions, FilePlan, Plan, Request, TensorPlan
from converters.targets.gptq_layout import FLOAT, ROW_STEP, members, shard, stripe
from converters.targets.gptq_limits import Verdict, limit_faults, reader_verdicts, verdict_rows
from converters.targets.gptq_spec import GROUP_SIZES, GptqSpec, parse_shape, parse_spec
from converters.targets.solved_folder import SolvedFolder
from quantize.codecs.gptq import VERSIONS, pack_codes, pack_zeros
from quantize.errors import ArchiveError
from quantize.llama import LlamaConfig
from quantize.reference import INPUTS
from quantize.solver import SOLVING
from quantize.solver.linears import Input, QuantizedLinear, Settings, prepare_input, quantize_rows

SHARD_BYTES = 5_000_000_000
_LARGEST = 65504.0


@dataclass(frozen=True)
class GptqTarget:
    """`--to gptq:4bit-128g`."""

    format: str = "gptq"

    @property
    def quants(self) -> Sequence[str]:
        """The bits and group sizes; what may follow them is in `gptq_spec`."""
        return tuple(GptqSpec(bits, size).shape for bits in (4, 8, 3, 2) for size in GROUP_SIZES)

    def parse(self, text: str) -> str:
        """Return a quant in its own spelling; raises UsageError."""
        return str(parse_spec(text))

    def needs_hessians(self, request: Request) -> bool:
        """Always: that is what GPTQ is."""
        return True

    def check(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> list[str]:
        """Return what stands against an export: shapes that no reader loads, a tokenizer without a file."""
        config, spec = checkpoint.config, parse_spec(request.quant)
        reasons = hf_faults(checkpoint)
        shapes = {(each.bits, each.group_size) for each in module_specs(config, spec, options).values()}
        for bits, group_size in sorted(shapes):
            reasons += limit_faults(config, bits, group_size)
        reasons += _useless_overrides(config, options) + _tensor_parallel_faults(config, spec, options)
        return list(dict.fromkeys(reasons))

    def plan(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> Plan:
        """Return the folder's files and what the readers will make of it."""
        spec, config = parse_spec(request.quant), checkpoint.config
        specs = module_specs(config, spec, options)
        quantization = quantization_config(config, spec, options)
        small = folder_files(checkpoint, quantization)
        first = {"config.json": small.pop("config.json")}  # renamed last, for it is what readers look for
        heads = [FilePlan(name, data, len(data)) for name, data in (first | small).items()]
        unplaced = [_tensor_plan(name, shape, specs) for name, shape in config.tensor_shapes().items()]
        max_bytes = options.split_max_bytes or SHARD_BYTES
        files, tensors = shard(unplaced, specs, max_bytes, len(heads))
        verdicts = _verdicts(config, spec, options)
        notes = [f"override {rule}: {count} linears" for rule, count in _overridden(config, options).items()]
        return Plan(
            request,
            (*heads, *files),
            tuple(tensors),
            tuple(notes),
            spec.directory,
            tuple(verdict_rows(verdicts)),
        )

    def open_writer(self, plan: Plan, options: ConvertOptions) -> "GptqWriter":
        """Create the folder under a temporary name; raises OutputError, ArchiveError."""
        return GptqWriter(plan, options)


class GptqWriter(SolvedFolder[Settings, Input]):
    """The folder of one plan, being written."""

    def __init__(self, plan: Plan, options: ConvertOptions) -> None:
        """Create every file, or go on with an interrupted run's; raises OutputError, ArchiveError."""
        if options.archive is None:
            raise ArchiveError("GPTQ needs a statistics archive", hint="give --stats, or let dscq calibrate")
        self._specs = {t.name: parse_spec(t.quant) for t in plan.tensors if t.quant != FLOAT}
        self._errors: dict[str, list[float]] = {}
        hessians = Hessians(options.archive, _prepared, options.device, options.first_tokens)
        super().__init__(plan, options, hessians)

    def _shares(self) -> Mapping[str, float]:
        return {name: lost / energy for name, (lost, energy) in self._errors.items() if energy > 0}

    def put(self, name: str, first_row: int, rows: torch.Tensor) -> Piece:
        """Quantize rows (n, K) of a linear, or round those of another tensor, and write them."""
        tensor = self._plan.by_name[name]
        file, spec = self._folder.files[tensor.file], self._specs.get(name)
        if spec is None:
            return self._put_float(tensor, first_row, rows)
        settings = spec.settings(self._effort)
        rounding = f"{SOLVING} {settings} {self._hessians.archive.identity(name)} {self._hessians.device}"
        key = slice_key(rows, str(spec), 0, None, f"{rounding} {first_row == 0}")
        places = stripe(tensor, spec, first_row, len(rows))
        found = self._reuse(name, file, key, places)
        if found is not None:
            return found
        with self._solving(name):
            shared = self._hessians.prepared(name, settings)
            result = quantize_rows(rows.to(self._hessians.device), shared)
            packed = _packed(result, spec, with_index=first_row == 0)
        self._note(name, result)
        return file.write(key, places, memoryview(packed))

    def _note(self, name: str, result: QuantizedLinear) -> None:
        with self._lock:
            sums = self._errors.setdefault(name, [0.0, 0.0])
            sums[0] += result.lost
            sums[1] += result.energy


def _prepared(
    H: torch.Tensor, damp_scale: float, settings: Settings, name: str
) -> tuple[Input, tuple[str, ...]]:
    shared = prepare_input(H, replace(settings, damp=settings.damp * damp_scale), name)
    return shared, shared.factor.log


def _packed(result: QuantizedLinear, spec: GptqSpec, *, with_index: bool) -> bytes:
    """Return the bytes of a stripe: qweight, qzeros, scales, and g_idx if it belongs to it."""
    parts = [
        pack_codes(result.codes.cpu(), spec.bits),
        pack_zeros(result.zeros.cpu(), spec.bits, spec.version),
        result.scales.cpu().T.contiguous(),
    ]
    if with_index:
        parts.append(result.g_idx.cpu())
    return b"".join(part.numpy().tobytes() for part in parts)


def module_specs(config: LlamaConfig, spec: GptqSpec, options: ConvertOptions) -> dict[str, GptqSpec]:
    """Return what each linear of the decoder blocks becomes, by the checkpoint's names of tensors."""
    names = [name for name in config.tensor_shapes() if _is_linear(name)]
    specs = dict.fromkeys(names, spec)
    for pattern, shape in reversed(options.module_bits):  # the first that matches counts
        bits, group_size = parse_shape(shape)
        changed = replace(spec, bits=bits, group_size=group_size)
        specs |= {name: changed for name in names if re.search(pattern, name.removesuffix(".weight"))}
    return specs


def quantization_config(config: LlamaConfig, spec: GptqSpec, options: ConvertOptions) -> dict[str, Any]:
    """Return what config.json and quantize_config.json say: every key that one of the readers asks for."""
    settings = spec.settings(options.effort)
    checkpoint_format = next(name for name, number in VERSIONS.items() if number == spec.version)
    dynamic = {}
    for pattern, shape in options.module_bits:
        bits, group_size = parse_shape(shape)
        # Readers match from the start of a module's name.
        dynamic[f"+:.*(?:{pattern})"] = {"bits": bits, "group_size": group_size}
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": spec.desc_act,
        "sym": spec.symmetric,
        "lm_head": False,
        "quant_method": "gptq",
        "format": checkpoint_format,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": settings.damp,
        "static_groups": False,
        "true_sequential": False,
        "meta": {"quantizer": [f"dscq:{version('dscq')}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _is_linear(name: str) -> bool:
    return any(name.endswith(f".{linear}.weight") for linear in INPUTS)


def _overridden(config: LlamaConfig, options: ConvertOptions) -> dict[str, int]:
    """Return for each override how many linears it is the first to match."""
    counts = {f"{pattern}={shape}": 0 for pattern, shape in options.module_bits}
    for name in filter(_is_linear, config.tensor_shapes()):
        module = name.removesuffix(".weight")
        first = next((rule for rule in options.module_bits if re.search(rule[0], module)), None)
        if first is not None:
            counts["=".join(first)] += 1
    return counts


def _verdicts(config: LlamaConfig, spec: GptqSpec, options: ConvertOptions) -> list[Verdict]:
    figures = (spec.bits, spec.group_size, spec.symmetric, spec.desc_act, options.tensor_parallel)
    return reader_verdicts(config, *figures)


def _tensor_parallel_faults(config: LlamaConfig, spec: GptqSpec, options: ConvertOptions) -> list[str]:
    """Return why no kernel of vLLM takes the folder on the GPUs that were asked for."""
    if options.tensor_parallel == 1:
        return []
    served = [verdict for verdict in _verdicts(config, spec, options) if verdict.reader.startswith("vLLM")]
    if any(verdict.loads for verdict in served):
        return []
    return [f"--tp {options.tensor_parallel}: {reason}" for reason in served[0].reasons]


def _useless_overrides(config: LlamaConfig, options: ConvertOptions) -> list[str]:
    return [
        f"--tensor-type {rule}: no linear of a decoder block has such a name that no earlier rule matches"
        for rule, count in _overridden(config, options).items()
        if not count
    ]


def _tensor_plan(name: str, shape: tuple[int, ...], specs: Mapping[str, GptqSpec]) -> TensorPlan:
    spec = specs.get(name)
    tensor = TensorPlan(
        name=name,
        written_name=name.removesuffix(".weight") if spec is not None else name,
        shape=shape,
        quant=FLOAT if spec is None else str(spec),
        reason="not a linear of a decoder block" if spec is None else "a linear of a decoder block",
        n_bytes=0,
        file=0,
        offset=0,
        row_step=1 if spec is None else ROW_STEP,
        overflow=_LARGEST,
        compensated=spec is not None,
    )
    return replace(tensor, n_bytes=sum(member.n_bytes for member in members(tensor, specs)))
