"""`--fold`: a GGUF of a model whose inner channels are scaled, with the statistics that belong to it.

Checkpoint and archive stay on the disk as they are. Folded views of both are handed on, and all that is
behind them, losses and budgets too, works as for any other model (quantize/folding.py). The proof compares
logits with the original's, and takes the factors back from the file's metadata to compare tensors
(fold_fields.py).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from converters.checkpoint import Checkpoint
from converters.imatrix import Importances
from converters.plan import ConvertOptions, Plan
from converters.stats.archive import Archive
from quantize.errors import ArchiveError, UsageError
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

_ROWS = 1024


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
    def variant(self) -> str:
        """What tells this fold from all others."""
        return f"fold {_digest(self.fold.exponents[place] for place in places(self.fold.config))}"


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def refuse_useless(plans: Sequence[Plan]) -> None:
    """Raise UsageError for exports in which nothing that would be folded is rounded with Hessians."""
    linears = tuple(f".{linear}.weight" for pair in PAIRS.values() for linear in pair)
    idle = [
        str(plan.request)
        for plan in plans
        if not any(tensor.compensated and tensor.name.endswith(linears) for tensor in plan.tensors)
    ]
    if idle:
        hint = "the same command without --fold, for these alone, makes better files"
        raise UsageError(f"--fold: {', '.join(idle)} has no type that gains from it", hint=hint)


def folded(
    checkpoint: Checkpoint, options: ConvertOptions, on_place: OnPlace = lambda done, total: None
) -> tuple[Checkpoint, ConvertOptions]:
    """Return the checkpoint folded, and the options with the statistics of its inputs.

    First tokens that the options have (`first_tokens_known`) are the original's: so what is not folded gets
    the very bytes that it has without folding. Takes one read of the o, v, up and down matrices. Raises
    ArchiveError for options without an archive.
    """
    archive = options.archive
    if archive is None:
        raise ArchiveError("--fold needs statistics, and there are none", hint="give --stats")
    if checkpoint.fold is not None:
        raise AssertionError("folded already")
    exponents = dict[Place, torch.Tensor]()
    wanted = list(places(checkpoint.config))
    for place in wanted:
        exponents[place] = exponents_of(_channels(checkpoint, archive, place))
        on_place(len(exponents), len(wanted))
    fold = Fold(checkpoint.config, exponents)
    theirs = FoldedArchive(archive.folder, archive.manifest, archive.checked, fold=fold)
    weights = FoldedWeights(checkpoint.weights, fold)
    importances = None if options.importances is None else _importances(options.importances, fold)
    first = None if options.first_tokens is None else fold.first_tokens(options.first_tokens)
    made = replace(checkpoint, weights=weights, fold=fold)
    return made, replace(options, archive=theirs, importances=importances, first_tokens=first)


def _importances(importances: Importances, fold: Fold) -> Importances:
    rows = dict(importances.rows)
    for name, row in rows.items():
        if (factors := fold.multiplied(name)) is not None:
            rows[name] = row / factors.square()
    return replace(importances, rows=rows)


def as_if_folded(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint marked as folded, by factors of one: what a plan needs to know of sizes."""
    config = checkpoint.config
    ones = {place: torch.zeros(n_channels(config, place[1]), dtype=torch.int8) for place in places(config)}
    return replace(checkpoint, fold=Fold(config, ones))


@torch.inference_mode()
def _channels(checkpoint: Checkpoint, archive: Archive, place: Place) -> Channels:
    layer, name = place
    first, second = (block_tensor(layer, linear) for linear in PAIRS[name])
    power = archive.packed(second).diagonal
    weight = _power(checkpoint, second, torch.ones_like(power))[0]
    if name == ATTENTION_MIXED:
        power, weight = (of_kv_heads(checkpoint.config, each) for each in (power, weight))
    # E[y^2] as if the inputs were uncorrelated: only its distribution over the channels is looked at.
    output = _power(checkpoint, first, archive.packed(first).diagonal)[1]
    return Channels(power, weight, output)


def _power(checkpoint: Checkpoint, name: str, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean square of a matrix's columns, and the power of its rows for that of the inputs, f64.

    In f64, so that exponents do not depend on how sums are split; some rows at a time.
    """
    W, columns, rows = checkpoint.weights.load(name), torch.zeros(len(inputs)).double(), []
    for part in torch.split(W, _ROWS):
        squares = part.double().square_()
        columns += squares.sum(0)
        rows.append(squares @ inputs.double())
    return columns / len(W), torch.cat(rows)
