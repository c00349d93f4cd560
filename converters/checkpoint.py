"""A checkpoint, opened: configuration, weights, tokenizer and where they came from."""

from dataclasses import dataclass, field
from pathlib import Path

from converters.tokenizer import CheckpointTokenizer
from quantize.llama import LlamaConfig
from quantize.weights import Weights


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint came from, for the metadata and the report.

    `source` is what the user typed (a path's last part or a hub id), `revision` the commit of a hub
    download, `licence` the licence's name if known, `travelling` the files that go along with every
    export (LICENSE*, NOTICE*, README.md).
    """

    name: str
    source: str
    revision: str | None = None
    licence: str | None = None
    adapter: str | None = None
    travelling: tuple[Path, ...] = field(default=())


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to be converted: everything is checked except the values of the weights."""

    config: LlamaConfig
    weights: Weights
    tokenizer: CheckpointTokenizer
    provenance: Provenance
