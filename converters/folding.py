"""`--fold`: a GGUF of a model whose inner channels are scaled, with the statistics that belong to it.

Checkpoint and archive stay on the disk as they are. Folded views of both are handed on, and all that is
behind them, losses and budgets too, works as for any other model (quantize/folding.py). The proof compares
logits with the original's, and takes the factors back from the file's metadata to compare tensors
(fold_fields.py).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from converters.checkpoint import Checkpoint
from converters.pipeline import first_tokens_known
from converters.plan import ConvertOptions
from converters.stats.archive import Archive
from quantize.errors import ArchiveError
from quantize.folding import (
    PAIRS,
    Channels,
    Fold,
    FoldedWeights,
    Place,
    exponents_of,
    n_channels,
    of_kv_heads,
    places,
)
from quantize.llama import block_tensor
from quantize.reference import ATTENTION_MIXED
from quantize.statistics import PackedStatistics

OnPlace = Callable[[int, int], None]
"""Called with (inputs done, in all)."""


@dataclass(frozen=True)
class FoldedArchive(Archive):
    """An archive as that of the folded model."""

    fold: Fold = field(kw_only=True)

    def packed(self, name: str) -> PackedStatistics:
        """Return the statistics of a matrix's folded input."""
        return self.fold.statistics(name, super().packed(name))

    def identity(self, name: str) -> str:
        """Return what tells the statistics of a matrix's input from all others, other folds' too."""
        factors = self.fold.multiplied(name)
        return super().identity(name) + ("" if factors is None else f" fold {_digest([factors])}")

    @cached_property
    def view(self) -> str:
        """What tells this fold from all others."""
        return f"fold {_digest(self.fold.exponents[place] for place in places(self.fold.config))}"


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def folded(
    checkpoint: Checkpoint, options: ConvertOptions, on_place: OnPlace = lambda done, total: None
) -> tuple[Checkpoint, ConvertOptions]:
    """Return the checkpoint folded, and the options with the statistics of its inputs.

    Those have the inputs of first tokens too (`first_tokens_known`), where they are needed. It takes one
    read of the o, v, up and down matrices. Raises ArchiveError for options without an archive.
    """
    archive = options.archive
    if archive is None:
        raise ArchiveError("--fold needs statistics, and there are none", hint="give --stats")
    # From the original: what is not folded gets the very bytes that it has without folding.
    options = first_tokens_known(checkpoint, options)
    exponents = dict[Place, torch.Tensor]()
    wanted = list(places(checkpoint.config))
    for place in wanted:
        exponents[place] = exponents_of(_channels(checkpoint, archive, place))
        on_place(len(exponents), len(wanted))
    fold = Fold(checkpoint.config, exponents)
    theirs = FoldedArchive(archive.folder, archive.manifest, archive.checked, fold=fold)
    weights = FoldedWeights(checkpoint.weights, fold)
    importances = None if options.importances is None else theirs.importances()
    first = None if options.first_tokens is None else fold.first_tokens(options.first_tokens)
    made = replace(checkpoint, weights=weights, fold=fold)
    return made, replace(options, archive=theirs, importances=importances, first_tokens=first)


def foldable(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint marked as folded, by factors of one: what a plan needs to know of sizes."""
    config = checkpoint.config
    ones = {place: torch.zeros(n_channels(config, place[1]), dtype=torch.int8) for place in places(config)}
    return replace(checkpoint, fold=Fold(config, ones))


@torch.inference_mode()
def _channels(checkpoint: Checkpoint, archive: Archive, place: Place) -> Channels:
    layer, name = place
    first, second = (block_tensor(layer, linear) for linear in PAIRS[name])
    power, weight = archive.packed(second).diagonal, _squares(checkpoint, second).mean(0)
    if name == ATTENTION_MIXED:
        power, weight = (of_kv_heads(checkpoint.config, each) for each in (power, weight))
    # E[y^2] as if the inputs were uncorrelated: only its distribution over the channels is looked at.
    return Channels(power, weight, _squares(checkpoint, first) @ archive.packed(first).diagonal)


def _squares(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.weights.load(name).float().square()
