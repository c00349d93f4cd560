"""What a GGUF or a checkpoint holds, as plain data for a table or for JSON.

Opening is the inspection: a file that cannot be opened raises the same error, with all its reasons, that
a conversion would meet. What opens but is known to answer badly is listed under `findings`.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import open_checkpoint
from converters.findings import gguf_findings
from converters.gguf_source import GgufFile, open_gguf
from converters.vocabulary import TokenType, Vocabulary
from quantize.llama import LlamaConfig


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
    """Open a `.gguf` (of a split: its first shard) or a checkpoint folder and describe it.

    Raises CheckpointError or TokenizerError with all reasons where it cannot be opened.
    """
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _inspect_gguf(open_gguf(path))
    return _inspect_checkpoint(path)


def _inspect_checkpoint(path: Path) -> Inspection:
    opened = open_checkpoint(path)
    rows = tuple(
        TensorRow(spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), spec.n_bytes)
        for spec in opened.weights.specs().values()
    )
    facts = model_facts(opened.config) | vocabulary_facts(opened.tokenizer.vocabulary)
    facts["licence"] = opened.provenance.licence or "not stated"
    return Inspection(str(path), "checkpoint", facts, rows, opened.notes)


def _inspect_gguf(file: GgufFile) -> Inspection:
    specs = file.weights.specs()
    rows = tuple(
        TensorRow(name, specs[name].shape, quant, file.blocks(name).numel())
        for name, quant in file.tensor_types.items()
    )
    size = sum(path.stat().st_size for path in file.paths)
    general = {
        key: str(value) for key, value in file.metadata.items() if key.startswith(("general.", "dscq."))
    }
    facts = model_facts(file.config) | vocabulary_facts(file.vocabulary)
    facts["files"] = (
        f"{len(file.paths)}, {size:,} bytes, {8 * size / file.config.n_parameters:.3f} bits per weight"
    )
    findings = gguf_findings(file.config, file.vocabulary, file.metadata)
    return Inspection(str(file.paths[0]), "GGUF", facts | general, rows, findings)


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
