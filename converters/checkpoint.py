"""A checkpoint, opened: configuration, weights, tokenizer and where they came from.

Opening checks everything that can be known without reading the weights: the config, every shard's header,
the tokenizer, the adapter. All that is wrong is reported at once, before any work has started.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from converters.adapter import Adapter, MergedWeights, read_adapter
from converters.disk import readable
from converters.hub import hub_source
from converters.inventory import Inventory, tensor_reasons
from converters.sources import Source, file_source, folder_source, is_hub_id, unknown_source
from converters.token_roles import EosRule
from converters.tokenizer import CheckpointTokenizer
from quantize.errors import CheckpointError, DscqError, UsageError
from quantize.folding import Fold
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from quantize.weights import Weights

Result = TypeVar("Result")


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
    """A model ready to be converted: everything is checked except the values of the weights.

    `notes` are remarks for the user: a tokenizer taken from elsewhere, a rule that was inferred.
    `source_files` are the files of a GGUF source, whose place no export may take; `fold` is what was done to
    the weights' channels (converters/folding.py).
    """

    config: LlamaConfig
    weights: Weights
    tokenizer: CheckpointTokenizer
    provenance: Provenance
    notes: tuple[str, ...] = field(default=())
    source_files: tuple[Path, ...] = field(default=())
    fold: Fold | None = None


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    lora: Path | None = None,
    low_disk: bool = False,
    eos: EosRule = "model",
    name: str | None = None,
    headers_only: bool = False,
    quiet: bool = False,
) -> Checkpoint:
    """Open a folder, a `.gguf` file with float tensors, or a hub id (tried in this order).

    `revision` (a branch, tag or commit) and `low_disk` (shards are fetched when they are needed and
    deleted when they are done) belong to hub ids; `lora` is the folder of an adapter to merge into the
    weights as they are loaded; `name` replaces the model's name in provenance; `headers_only` is for
    those who will load no weights: a hub id's shards then stay where they are; `quiet` hides the
    download's progress. Raises CheckpointError or TokenizerError with every reason at once, UsageError
    for options that do not fit the source.
    """
    if name is not None and not name.strip():
        raise UsageError("--name is empty; leave it out for the model's own name")
    path = Path(source)
    with readable(path):
        local = bool(str(source)) and path.exists()
        is_folder = local and path.is_dir()
    if local and (revision is not None or low_disk):
        option = "--low-disk" if low_disk else "--revision"
        raise UsageError(f"{option} is for hub ids; {source} is on this disk")
    if local:
        opened = folder_source(path, eos) if is_folder else file_source(path, eos)
    elif is_hub_id(str(source)):
        how = {"low_disk": low_disk, "headers_only": headers_only, "quiet": quiet}
        opened = hub_source(str(source), revision, eos, **how)
    else:
        raise unknown_source(str(source))
    typed = str(source) if not local else path.resolve().name
    return _assemble(opened, lora, typed, opened.name if name is None else name)


def _assemble(source: Source, lora: Path | None, typed: str, name: str) -> Checkpoint:
    """Open all parts of a source, and fail with everything that is wrong with any of them."""
    trouble = _Trouble(source.label)
    config = trouble.attempt(source.config)
    inventory = trouble.attempt(source.inventory)
    adapter = trouble.attempt(lambda: read_adapter(lora)) if lora is not None else None
    tokenizer = None
    if config is not None:
        tokenizer = trouble.attempt(lambda: source.tokenizer(config))
        reasons = _mismatches(config, inventory, adapter)
        trouble.add("the tensors are not those of the model", reasons, source.advice)
    trouble.raise_if_any()
    if config is None or inventory is None or tokenizer is None:
        raise AssertionError("what could not be opened has raised")
    return Checkpoint(
        config,
        _weights(config, inventory, adapter),
        tokenizer,
        Provenance(
            name=name,
            source=typed,
            revision=source.revision,
            licence=source.licence,
            adapter=adapter.name if adapter is not None else None,
            travelling=source.travelling,
        ),
        (*source.notes, *tokenizer.notes),
        source.files,
    )


def _mismatches(config: LlamaConfig, inventory: Inventory | None, adapter: Adapter | None) -> list[str]:
    reasons = tensor_reasons(config, inventory.found) if inventory is not None else []
    return reasons + (adapter.reasons(config) if adapter is not None else [])


def _weights(config: LlamaConfig, inventory: Inventory, adapter: Adapter | None) -> Weights:
    """Open the weights in the model's order, after the last check: is a stored tied head the embedding?"""
    if config.tied_head and HEAD in inventory.found:
        _check_tied_head(inventory.open([EMBEDDING, HEAD]))
    weights = inventory.open(list(config.tensor_shapes()))
    return MergedWeights(weights, adapter) if adapter is not None else weights


def _check_tied_head(weights: Weights) -> None:
    """Refuse a head that is stored although it is tied, and differs from the embedding.

    transformers 4 ignores such a head, transformers 5 uses it: nobody can know which one is meant.
    """
    embedding, head = weights.load(EMBEDDING), weights.load(HEAD)
    if embedding.dtype != head.dtype or not torch.equal(_bits(embedding), _bits(head)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}",
            hint="Set tie_word_embeddings to false if the head was trained, else remove it from the shards.",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


class _Trouble:
    """Collects the errors of several attempts, to raise them as one."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._errors: list[DscqError] = []

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """Return what the action returns, or note its error and return None."""
        try:
            return action()
        except DscqError as error:
            self._errors.append(error)
            return None

    def add(self, message: str, reasons: list[str], hint: str) -> None:
        """Note reasons, if there are any."""
        if reasons:
            self._errors.append(CheckpointError(message, reasons=reasons, hint=hint))

    def raise_if_any(self) -> None:
        """Raise the only error as it is, or one CheckpointError with the reasons of all."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            reasons = [line for error in self._errors for line in _lines(error)]
            hints = [error.hint for error in self._errors if error.hint]
            raise CheckpointError(
                f"{self._label} cannot be used", reasons=reasons, hint="\n".join(dict.fromkeys(hints))
            )


def _lines(error: DscqError) -> list[str]:
    """Return an error as reasons of a larger one: each of its own, after what they are about."""
    return [f"{error.message}: {reason}" for reason in error.reasons] or [error.message]
