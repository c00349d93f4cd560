"""What a GGUF or a checkpoint holds, as plain data for a table or for JSON.

Opening is the inspection. A GGUF of a kind that no conversion takes is shown by its head, and the reasons
that a conversion would give are its findings; what opens but is known to answer badly has findings as well.
Only what cannot be read is an error.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import open_checkpoint
from converters.exl2_source import Exl2Folder, open_exl2, stored_names
from converters.findings import exl2_findings, gguf_findings, gptq_findings
from converters.gguf_file import GgufHead, read_head
from converters.gguf_source import GgufFile, open_gguf
from converters.gptq_config import quantization_of
from converters.gptq_source import PARTS, GptqFolder, module_of, open_gptq
from converters.vocabulary import TokenType, Vocabulary
from quantize.errors import CheckpointError, DscqError, TokenizerError
from quantize.llama import HEAD, LlamaConfig

_SHOWN_ITEMS = 8
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class TensorRow:
    """One tensor: the name in the file's own words, shape with rows first, type, bytes."""

    name: str
    shape: tuple[int, ...]
    quant: str
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What there is: `facts` in the order of printing, every tensor, and what is wrong."""

    path: str
    kind: str
    facts: dict[str, str]
    tensors: tuple[TensorRow, ...]
    findings: tuple[str, ...] = ()

    def by_type(self) -> list[tuple[str, int, int]]:
        """Return (type, number of tensors, bytes), the largest first."""
        count = Counter(row.quant for row in self.tensors)
        n_bytes = {quant: sum(r.n_bytes for r in self.tensors if r.quant == quant) for quant in count}
        return sorted(((q, count[q], n_bytes[q]) for q in count), key=lambda row: -row[2])

    def document(self) -> dict[str, Any]:
        """Return everything as plain data for `--json`."""
        return asdict(self)


def inspect_path(path: Path) -> Inspection:
    """Open a `.gguf` (of a split: its first shard), a GPTQ, EXL2 or checkpoint folder and describe it.

    Raises CheckpointError or TokenizerError with all reasons for a checkpoint that cannot be opened, and
    CheckpointError for a GGUF that is truncated or corrupt.
    """
    method = (quantization_of(path) or {}).get("quant_method") if path.is_dir() else None
    if method == "gptq":
        return _inspect_gptq(open_gptq(path))
    if method == "exl2":
        return _inspect_exl2(open_exl2(path))
    if not path.is_file() or path.suffix.lower() != ".gguf":
        return _inspect_checkpoint(path)
    try:
        return _inspect_gguf(open_gguf(path))
    except (CheckpointError, TokenizerError) as error:
        return _inspect_head(read_head(path), error)


def _inspect_checkpoint(path: Path) -> Inspection:
    opened = open_checkpoint(path)
    rows = tuple(
        TensorRow(spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), spec.n_bytes)
        for spec in opened.weights.specs().values()
    )
    facts = model_facts(opened.config) | vocabulary_facts(opened.tokenizer.vocabulary)
    facts["licence"] = opened.provenance.licence or "not stated"
    return Inspection(str(path), "checkpoint", facts, rows, opened.notes)


def _inspect_gptq(file: GptqFolder) -> Inspection:
    stored = file.weights.stored
    rows = tuple(
        TensorRow(name, shape, file.tensor_types[name], sum(_stored_bytes(file, name)))
        for name, shape in file.weights.shapes.items()
    )
    size = sum(path.stat().st_size for path in file.files)
    scheme = file.quantization.scheme
    groups = f"groups of {scheme.group_size}" if scheme.group_size > 0 else "one group a row"
    symmetry = "symmetric" if scheme.sym else "asymmetric"
    order = "by activation (desc_act)" if scheme.desc_act else "natural order"
    facts = model_facts(file.config) | vocabulary_facts(file.vocabulary)
    facts["quantization"] = (
        f"{scheme.bits} bits, {groups}, {symmetry}, {order}, format {file.quantization.format_name}"
    )
    facts["files"] = (
        f"{len(file.files)}, {len(stored)} tensors, {size:,} bytes, "
        f"{8 * size / file.config.n_parameters:.3f} bits per weight"
    )
    return Inspection(str(file.paths[0]), "GPTQ folder", facts, rows, gptq_findings(file))


def _inspect_exl2(file: Exl2Folder) -> Inspection:
    stored, shapes = file.weights.stored, file.weights.shapes
    rows = tuple(
        TensorRow(name, shape, file.tensor_types[name], sum(stored[part].entry.n_bytes for part in parts))
        for name, shape in shapes.items()
        for parts in [stored_names(file.weights, name)]
    )
    linears = [row for row in rows if ".layers." in row.name and row.name in file.weights.groups]
    bits = 8 * sum(row.n_bytes for row in linears) / max(sum(math.prod(row.shape) for row in linears), 1)
    size = sum(path.stat().st_size for path in file.files)
    facts = model_facts(file.config) | vocabulary_facts(file.vocabulary)
    facts["quantization"] = f"EXL2, {bits:.4f} bits per weight of the decoder's linears"
    facts["head"] = file.tensor_types.get(HEAD, "tied to the embedding")
    facts["files"] = (
        f"{len(file.files)}, {len(stored)} tensors, {size:,} bytes, "
        f"{8 * size / file.config.n_parameters:.3f} bits per weight"
    )
    return Inspection(str(file.paths[0]), "EXL2 folder", facts, rows, exl2_findings(file))


def _stored_bytes(file: GptqFolder, name: str) -> Iterator[int]:
    """Yield the bytes of everything that makes up one tensor."""
    parts = [name] if name not in file.weights.schemes else [f"{module_of(name)}.{part}" for part in PARTS]
    yield from (file.weights.stored[part].entry.n_bytes for part in parts)


def _inspect_gguf(file: GgufFile) -> Inspection:
    rows = tuple(row for head in file.weights.heads for row in _rows(head))
    size = sum(path.stat().st_size for path in file.paths)
    own = ("general.", "dscq.")
    general = {key: _text(value) for key, value in file.metadata.items() if key.startswith(own)}
    facts = model_facts(file.config) | vocabulary_facts(file.vocabulary)
    facts["files"] = (
        f"{len(file.paths)}, {size:,} bytes, {8 * size / file.config.n_parameters:.3f} bits per weight"
    )
    findings = gguf_findings(file.config, file.vocabulary, file.metadata)
    return Inspection(str(file.paths[0]), "GGUF", facts | general, rows, findings)


def _inspect_head(head: GgufHead, error: DscqError) -> Inspection:
    """Describe a file by its head alone; `error` says why it is not more."""
    facts = {key: _text(value) for key, value in head.metadata.items()}
    facts["file"] = f"GGUF version {head.version}, {head.path.stat().st_size:,} bytes"
    said = (error.message.removeprefix(f"{head.path}: "), *error.reasons, error.hint)
    findings = tuple(f"not supported by dscq: {text}" for text in said if text)
    return Inspection(str(head.path), "GGUF", facts, _rows(head), findings)


def _rows(head: GgufHead) -> tuple[TensorRow, ...]:
    return tuple(TensorRow(entry.name, entry.shape, entry.quant, entry.n_bytes) for entry in head.tensors)


def _text(value: object) -> str:
    """Return a metadata value as a line: of a long array its length, of a long text its beginning."""
    if isinstance(value, list) and len(value) > _SHOWN_ITEMS:
        return f"{len(value)} entries"
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        return f"{value[:_SHOWN_CHARACTERS]}... ({len(value)} characters)"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def model_facts(config: LlamaConfig) -> dict[str, str]:
    """Return the model's figures as label -> text."""
    heads = f"{config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} KV heads"
    widths = f"{config.hidden_size} wide, MLP {config.intermediate_size}"
    return {
        "parameters": f"{config.n_parameters:,}",
        "shape": f"{config.n_layers} layers, {widths}, {heads}",
        "context": f"{config.context_length} tokens",
        "RoPE": f"theta {config.rope_theta:g}, linear scaling factor {config.rope_factor:g}",
        "head": "tied to the embedding" if config.tied_head else "its own matrix",
    }


def vocabulary_facts(vocabulary: Vocabulary) -> dict[str, str]:
    """Return the tokenizer's facts as label -> text."""
    unused = sum(kind is TokenType.UNUSED for kind in vocabulary.token_types)
    n_rows = len(vocabulary.tokens)

    def token(number: int | None) -> str:
        return "none" if number is None else f"{number} {vocabulary.tokens[number]}"

    fim = (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle)
    return {
        "vocabulary": f"{n_rows} rows, {n_rows - unused} tokens, {len(vocabulary.merges)} merges",
        "pre-tokenizer": vocabulary.pre,
        "BOS": f"{token(vocabulary.bos_id)}, {'added' if vocabulary.add_bos else 'not added'}",
        "EOS": token(vocabulary.eos_id),
        "FIM": "none" if None in fim else "prefix {}, suffix {}, middle {}".format(*fim),
        "chat template": "none"
        if not vocabulary.chat_template
        else f"{len(vocabulary.chat_template)} characters",
    }
