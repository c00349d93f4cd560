"""GGUF: the format of llama.cpp and of everything built on it.

A type for every tensor comes from a recipe, as llama-quantize mixes them (`gguf_types`), or from a size that
the file shall have (`gguf_budget`).

The layout comes first: the head of a file states every tensor's offset, so it is complete before the
first weight is read, and tensors can be written at their offsets in any order.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch

from converters import fold_fields
from converters.checkpoint import Checkpoint
from converters.disk import rename_all
from converters.donors import Donors, is_noted, slice_key
from converters.gguf_file import head_bytes, padded, shard_name
from converters.hessians import Hessians
from converters.journal import JournaledFile, remove_other_shards
from converters.names import gguf_name, is_rotary, permute
from converters.places import Piece, Place
from converters.plan import ConvertOptions, FilePlan, Plan, Request, TensorPlan
from converters.targets.gguf_budget import (
    allocated,
    assigned_types,
    is_budget,
    is_plan,
    parse_budget,
    plan_faults,
)
from converters.targets.gguf_fields import add_split_fields, bare_fields, gguf_fields
from converters.targets.gguf_types import GgufTypes, suits_gpu
from quantize.codecs import Codec, codec
from quantize.codecs.encoder import Encoder, encoding_gpus
from quantize.errors import PlanError, UsageError
from quantize.recipes import ALIASES, RECIPES, Choice
from quantize.solver import SOLVING
from quantize.solver.block_factor import DAMP, BlockFactor, prepare_blocks
from quantize.solver.blocks import compensates_on, encode_compensated

_READ_ONLY = {
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "a model must be trained for ternary weights"),
    **dict.fromkeys(("Q1_0", "Q2_0"), "a model must be trained for so few values"),
    **dict.fromkeys(("MXFP4", "MXFP4_MOE", "NVFP4"), "it is for models that were trained in it"),
}


@dataclass(frozen=True)
class GgufTarget:
    """`--to gguf:TYPE`."""

    format: str = "gguf"

    @property
    def quants(self) -> Sequence[str]:
        """Every recipe."""
        return tuple(RECIPES)

    def parse(self, text: str) -> str:
        """Return a budget, or a recipe by its name in any case; as in llama-quantize, Q4_K is Q4_K_M."""
        if (budget := parse_budget(text)) is not None:
            return budget
        name = text.upper()
        named = {quant.upper(): quant for quant in self.quants}
        if quant := named.get(ALIASES.get(name, name)):
            return quant
        fault = (
            f"{name} is not written: {_READ_ONLY[name]}" if name in _READ_ONLY else f"unknown type {text!r}"
        )
        known = ", ".join(f"{self.format}:{quant}" for quant in self.quants)
        raise UsageError(
            f"--to {self.format}:{text}: {fault}",
            hint=f"known: {known}, {self.format}:bpw=3.5, size=4.1GB, fit=8GiB",
        )

    def needs_hessians(self, request: Request) -> bool:
        """Only for a budget, which is shared out by predicted losses: scales can be searched without."""
        return is_budget(request.quant)

    def check(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> list[str]:
        """Return what stands against an export: its name, odd heads, odd tokens, types that cannot be."""
        reasons, config, name = [], checkpoint.config, checkpoint.provenance.name
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            reasons.append(f"the model's name {name!r} cannot be a file name; give another with --name")
        if config.head_dim % 2:
            reasons.append(f"heads of {config.head_dim} rows: rotary embedding needs an even number")
        n_tokens = len(checkpoint.tokenizer.vocabulary.tokens)
        if n_tokens != config.vocab_size:
            reasons.append(
                f"{n_tokens} tokens for the embedding's {config.vocab_size} rows; GGUF needs one each"
            )
        if is_plan(request.quant) and (faults := plan_faults(config, options.assigned or {})):
            return reasons + faults
        try:
            return reasons + gguf_types(checkpoint, request, options).faults()
        except PlanError as error:
            return [*reasons, error.message, *error.reasons]

    def plan(self, checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> Plan:
        """Return the layout; raises PlanError when a tensor alone is larger than `split_max_bytes`."""
        types = gguf_types(checkpoint, request, options)
        return self.plan_types(checkpoint, request, types)

    def plan_types(self, checkpoint: Checkpoint, request: Request, types: GgufTypes) -> Plan:
        """Return the layout of a file of these types; raises PlanError as `plan`."""
        layout = _Layout(checkpoint, types)
        shards = _split(layout, _unplaced(types), types.options.split_max_bytes)
        stem = f"{checkpoint.provenance.name}-{request.quant.replace('=', '-')}"
        files: list[FilePlan] = []
        placed: list[TensorPlan] = []
        for number, shard in enumerate(shards):
            head = layout.head(shard, number, len(shards), sum(map(len, shards)))
            end = len(head)
            for tensor in shard:
                placed.append(replace(tensor, file=number, offset=end))
                end += padded(tensor.n_bytes)
            name = f"{stem}.gguf" if len(shards) == 1 else shard_name(stem, number, len(shards))
            files.append(FilePlan(name, head, end))
        folded = [] if checkpoint.fold is None else [fold_fields.NOTE]
        return Plan(request, tuple(files), tuple(placed), (*types.notes(), *folded))

    def open_writer(self, plan: Plan, options: ConvertOptions) -> "GgufWriter":
        """Create the files under temporary names, with their heads in place."""
        return GgufWriter(plan, options)


def gguf_types(checkpoint: Checkpoint, request: Request, options: ConvertOptions) -> GgufTypes:
    """Return the types that a request gives the tensors; raises PlanError for a budget that is too small."""
    config, quant = checkpoint.config, request.quant
    if is_plan(quant):
        return assigned_types(quant, config, options, options.assigned or {})
    if is_budget(quant):
        target = GgufTarget()
        return allocated(
            quant, config, options, lambda types: target.plan_types(checkpoint, request, types).n_bytes
        )
    return GgufTypes(config, RECIPES[quant], options)


class GgufWriter:
    """The files of one plan, being written."""

    def __init__(self, plan: Plan, options: ConvertOptions) -> None:
        """Create every file in its full length, or go on with an interrupted run's; raises OutputError."""
        self._plan = plan
        self._importances = {} if options.importances is None else options.importances.rows
        compensating = any(tensor.compensated for tensor in plan.tensors)
        self._hessians = _hessians(options) if compensating else None
        self._effort, self._gpus = options.effort, encoding_gpus(options.device)
        self._encoder, self._hashed = Encoder(self._gpus), options.hash_tensors
        self._reused, self._lock = Counter[str](), Lock()
        self._files: list[JournaledFile] = []
        try:
            for file in plan.files:
                path = options.folder / file.name
                self._files.append(JournaledFile(path, file.head, file.n_bytes, fresh=options.fresh))
        except BaseException:
            self.abort()
            raise
        # After a leftover of another layout has stepped aside.
        self._donors = None if options.fresh else Donors(options.folder)

    @property
    def reused(self) -> Mapping[str, int]:
        """Bytes that earlier runs had made, by the checkpoint's names of tensors."""
        return self._reused

    @property
    def notes(self) -> tuple[str, ...]:
        """Dampings that had to be raised."""
        return () if self._hessians is None else self._hessians.log

    def put(self, name: str, first_row: int, rows: torch.Tensor) -> Piece:
        """Encode whole heads or rows (n, K), in GGUF's order of rows, and write them at their offset."""
        tensor, file = self._plan.by_name[name], self._files[self._plan.by_name[name].file]
        kind, importance = codec(tensor.quant), self._importances.get(name)
        row_bytes = kind.row_bytes(rows.shape[1])
        places = (Place(tensor.offset + first_row * row_bytes, len(rows) * row_bytes),)
        if not tensor.compensated and not is_noted(kind, importance):
            return file.put(places, self._encoded(name, rows), hashed=self._hashed)
        key = self._key(tensor, rows, importance)
        found = file.reuse(key, places, self._donors)
        if found is not None:
            with self._lock:
                self._reused[name] += found.n_bytes
            return found
        return file.write(key, places, self._encoded(name, rows))

    def _key(self, tensor: TensorPlan, rows: torch.Tensor, importance: torch.Tensor | None) -> str:
        order = tensor.row_step if is_rotary(tensor.name) else 0
        if self._hessians is None or not tensor.compensated:
            return slice_key(rows, tensor.quant, order, importance)
        rounding = f"{SOLVING} {self._effort} {self._hessians.archive.identity(tensor.name)}"
        # Near-ties may fall to the other side on another kind of device.
        where = f" {self._gpus[0].type}" if self._gains(codec(tensor.quant)) else ""
        return slice_key(rows, tensor.quant, order, None, rounding + where)

    def _gains(self, kind: Codec) -> bool:
        """Return whether a GPU compensates a type's errors."""
        return bool(self._gpus) and compensates_on(kind, self._gpus[0])

    def _encoded(self, name: str, rows: torch.Tensor) -> memoryview:
        tensor = self._plan.by_name[name]
        # The row step of q and k is a head: rows change places within it alone.
        ordered = permute(rows, tensor.row_step) if is_rotary(name) else rows
        if self._hessians is not None and tensor.compensated:
            kind = codec(tensor.quant)
            with self._encoder.place(kind, gains=self._gains(kind)) as device:
                factor = self._hessians.prepared(name, None, str(device))
                blocks = encode_compensated(kind, ordered.to(device).float(), factor, self._effort).cpu()
            return blocks.numpy().data.cast("B")
        # Importances are of columns, which keep their order.
        blocks = self._encoder.encode(codec(tensor.quant), ordered, self._importances.get(name))
        return blocks.numpy().data.cast("B")

    def flush(self) -> None:
        """Wait until the disk has everything."""
        for file in self._files:
            file.flush()

    def commit(self) -> None:
        """Give all files their final names; nothing stays under them when one of the renames fails."""
        rename_all([file.file for file in self._files])
        for file in self._files:
            file.forget()
        remove_other_shards(self._files[0].file.path)

    def abort(self) -> None:
        """Leave the temporary files for the next run, but for those without use to it."""
        for file in self._files:
            file.leave()

    def discard(self) -> None:
        """Remove the temporary files."""
        for file in self._files:
            file.discard()


@dataclass(frozen=True)
class _Layout:
    """The heads of an export's files."""

    checkpoint: Checkpoint
    types: GgufTypes

    def head(self, tensors: Sequence[TensorPlan], number: int, count: int, n_tensors: int) -> bytes:
        """Return the head of file `number` of `count`: all metadata is in the first."""
        writer = gguf_fields(self.checkpoint, self.types) if number == 0 else bare_fields()
        if count > 1:
            add_split_fields(writer, number, count, n_tensors)
        entries = ((t.written_name, t.shape, codec(t.quant).ggml_type, t.n_bytes) for t in tensors)
        return head_bytes(writer, entries)


def _hessians(options: ConvertOptions) -> Hessians[None, BlockFactor]:
    if options.archive is None:
        raise AssertionError("the plan compensates without an archive")
    return Hessians(options.archive, _prepared, first=options.first_tokens)


def _prepared(
    H: torch.Tensor, damp_scale: float, _settings: None, name: str
) -> tuple[BlockFactor, tuple[str, ...]]:
    factor = prepare_blocks(H, damp=DAMP * damp_scale, name=name)
    return factor, factor.log


def _unplaced(types: GgufTypes) -> list[TensorPlan]:
    """Return every tensor with its type and the reason for it, at no place yet."""
    shapes, head_dim = types.config.tensor_shapes(), types.config.head_dim
    compensated = types.compensated()
    return [
        _tensor_plan(name, shapes[name], choice, head_dim, name in compensated)
        for name, choice in types.choices.items()
    ]


def _tensor_plan(
    name: str, shape: tuple[int, ...], choice: Choice, head_dim: int, compensated: bool
) -> TensorPlan:
    kind = codec(choice.quant)
    return TensorPlan(
        name=name,
        written_name=gguf_name(name),
        shape=shape,
        quant=kind.name,
        reason=choice.reason,
        n_bytes=math.prod(shape[:-1]) * kind.row_bytes(shape[-1]),
        file=0,
        offset=0,
        row_step=head_dim if is_rotary(name) else 1,
        overflow=kind.overflow,
        suits_gpu=suits_gpu(kind, compensated) or kind.block_size == 1,
        compensated=compensated,
        falls_back=choice.falls_back,
    )


def _split(layout: _Layout, tensors: list[TensorPlan], max_bytes: int | None) -> list[list[TensorPlan]]:
    """Return the tensors of each file, whole and in order, every file at most `max_bytes` long."""
    if max_bytes is None:
        return [tensors]
    shards: list[list[TensorPlan]] = [[]]
    size, too_large = len(layout.head([], 0, 2, 0)), []
    for tensor in tensors:
        # Its table row, its data, and the padding of both.
        added = 24 + 8 * len(tensor.shape) + len(tensor.written_name) + padded(tensor.n_bytes) + 32
        if shards[-1] and size + added > max_bytes:
            shards.append([])
            size = len(layout.head([], 1, 2, 0))
        if size + added > max_bytes:
            too_large.append(f"{tensor.written_name} alone needs a file of {size + added} bytes")
        shards[-1].append(tensor)
        size += added
    if too_large:
        raise PlanError(f"files of at most {max_bytes} bytes: tensors are never cut", reasons=too_large)
    return shards
