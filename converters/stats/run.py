"""`calibrate_checkpoint`: a checkpoint and rows of tokens become a statistics archive.

    prepare    the rows, the folder, what an earlier run has left, the room on the disk (prepare.py)
    weights    where tokens count by their gradients: a pass back and forth, kept until the run is done
    embed      the states of all rows
    blocks     member after member; progress is noted after each
    head       the output matrix's input, token counts, the rows; mean gradients, if no weights had them
    manifest   last, and then what was only needed to go on is removed

Several ranks (torchrun) share the rows and the folder. Rank 0 decides and writes; its errors are everybody's.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from converters.checkpoint import Checkpoint
from converters.disk import explained
from converters.stats.archive import Archive, open_archive
from converters.stats.manifest import Manifest, Member, write_manifest
from converters.stats.members import (
    EMBEDDING,
    GRADIENTS,
    HEAD,
    ROWS,
    WEIGHTS,
    Rows,
    TokenRow,
    block_member,
    gradient_tensor,
    gradients_of,
    join_rows,
    read_member,
    read_statistics,
    row_tensors,
    statistic_tensors,
    write_member,
)
from converters.stats.prepare import (
    STATES,
    CalibrateOptions,
    Task,
    check_rows,
    free_bytes,
    prepare,
    remove_leftovers,
)
from converters.stats.progress import Progress, locked, write_progress
from converters.stats.states import FileStates
from quantize import llama
from quantize.calibrate import Calibration, Moments, Settings
from quantize.errors import DscqError, UsageError
from quantize.llama import block_tensor
from quantize.ranks import Ranks, joined_ranks, rank_device
from quantize.reference import HEAD_INPUT, INPUTS, OnBlock, ReferenceModel, usable_device
from quantize.sensitivity import (
    LONGEST,
    Gradients,
    TokenWeights,
    chunk_tokens_for,
    mean_gradients,
    token_weights,
)
from quantize.statistics import PackedStatistics, SecondMoment, merge, pack

Result = TypeVar("Result")
Weights = dict[tuple[int, str], torch.Tensor]


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    identity: Mapping[str, Any],
    options: CalibrateOptions,
    on_block: OnBlock | None = None,
    on_weights: OnBlock | None = None,
) -> Archive:
    """Gather the statistics of a checkpoint over rows of tokens; return the archive, opened.

    `identity` says which corpus the rows are, in what JSON has (its "name" is shown). An interrupted run goes
    on where it was and ends in the same bytes; a finished archive of the same request is returned as it
    is. `on_block` is called, on rank 0, with (blocks done, blocks in all), `on_weights` likewise while
    gradients are made.

    Raises UsageError for rows that the model cannot take; ArchiveError, with all that changed, for a folder
    that another request began, and for an archive to `add` that does not fit; OutputError for a full disk;
    CalibrationError for activations that are not finite.
    """
    if options.micro_batch is not None and options.micro_batch < 1:
        raise UsageError(f"a micro-batch of {options.micro_batch} tokens; at least one is needed")
    check_rows(rows, checkpoint.config)
    if options.sensitivity and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--sensitivity: the weights of tokens are made by one process, not by several")
    device = usable_device(str(rank_device(torch.device(options.device))))
    with joined_ranks(device) as ranks, ExitStack() as stack:
        together = _Together(ranks)
        together.do(lambda: stack.enter_context(_taken(options.folder)))
        task = together.do(lambda: prepare(checkpoint, rows, identity, options, ranks.count))
        if task is not None:
            model = ReferenceModel(checkpoint.config, checkpoint.weights, device)
            with _threads(task.progress.threads):
                weights = _weights(model, task, options, on_weights) if options.sensitivity else None
                _Run(model, task, options.folder, together, weights).run(on_block, on_weights)
        together.do(lambda: remove_leftovers(options.folder))
        return together.do(lambda: open_archive(options.folder))


def _weights(
    model: ReferenceModel, task: Task, options: CalibrateOptions, on_weights: OnBlock | None
) -> TokenWeights:
    """Return the weights of the rows' tokens: those that an interrupted run has left, or new ones."""
    path, config = options.folder / WEIGHTS, model.config
    places = [(layer, name) for layer in range(config.n_layers) for name in dict.fromkeys(INPUTS.values())]
    if task.begun and path.is_file():  # else it may be of another request
        tensors = read_member(path, [GRADIENTS, *(f"{layer}.{name}" for layer, name in places)])
        weights = {(layer, name): tensors[f"{layer}.{name}"] for layer, name in places}
        return TokenWeights(weights, gradients_of(tensors[GRADIENTS]), read_statistics(path, EMBEDDING))
    room = chunk_tokens_for(config.n_layers, config.hidden_size, free_bytes(options.device))
    text = token_weights(model, task.rows.text(), room, on_block=on_weights or (lambda done, total: None))
    made = replace(text, weights=_beside_noise(text.weights, task.rows))
    named = {f"{layer}.{name}": each.contiguous() for (layer, name), each in made.weights.items()}
    known = {GRADIENTS: gradient_tensor(made.gradients)} | statistic_tensors(EMBEDDING, pack(made.embedding))
    write_member(options.folder, WEIGHTS, named | known)
    return made


def _beside_noise(weights: Mapping[tuple[int, str], torch.Tensor], rows: Rows) -> Weights:
    """Return the weights of all rows' tokens for those of the text's: noise counts as the text does."""
    text = torch.repeat_interleave(rows.is_text(), rows.lengths.long())
    found = {place: torch.ones(len(text)) for place in weights}
    for place, each in weights.items():
        found[place][text] = each.cpu()
    return found


class _Together:
    """Has rank 0 do what only one may do, and tells the others."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def do(self, action: Callable[[], Result]) -> Result:
        """Return on every rank what the action returns on rank 0; its errors are raised on every rank."""
        outcome: Result | DscqError | None = None
        if self.ranks.number == 0:
            try:
                outcome = action()
            except DscqError as error:
                outcome = error
        shared: Any = self.ranks.gather(outcome)[0]
        if isinstance(shared, DscqError):
            raise shared
        result: Result = shared
        return result


class _Run:
    """A calibration that writes its members into the archive's folder."""

    def __init__(
        self,
        model: ReferenceModel,
        task: Task,
        folder: Path,
        together: _Together,
        weights: TokenWeights | None,
    ) -> None:
        self.task, self.folder, self.together = task, folder, together
        self.model, self.progress = model, task.progress
        how = task.progress.request.options
        settings = Settings(how["micro_batch"], how["diagonal_only"], how["on_nonfinite"] == "drop")
        self.calibration = Calibration(model, task.rows.lengths.tolist(), settings, together.ranks, weights)
        self.calibration.dropped = list(task.progress.dropped)

    def run(self, on_block: OnBlock | None, on_gradients: OnBlock | None) -> None:
        """Do what is left to do, down to the manifest."""
        number, n_layers = self.together.ranks.number, self.model.config.n_layers
        stem = self.folder / f"{STATES}{number}"
        n_tokens, hidden = self.calibration.n_tokens, self.model.config.hidden_size
        side, begun = self.progress.side, self.task.begun
        with FileStates(stem, n_tokens, hidden, side, begun=begun) as states:
            if not self.task.begun:
                self.calibration.embed(self.task.rows.split(), states)
                self._note(replace(self.progress, side=states.side))
            for layer, moments in self.calibration.blocks(states, self.progress.done):
                self._write_block(layer, moments, states.side)
                if on_block is not None and number == 0:
                    on_block(layer + 1, n_layers)
            head = self.calibration.head(states)
        self.together.do(lambda: self._finish(head, on_gradients or (lambda done, total: None)))

    def _note(self, progress: Progress) -> None:
        self.progress = progress
        self.together.do(lambda: write_progress(self.folder, progress))

    def _write_block(self, layer: int, moments: Moments, side: int) -> None:
        name = block_member(layer)
        member = self.together.do(
            lambda: write_member(self.folder, name, self._block_tensors(layer, moments))
        )
        dropped = tuple(self.calibration.dropped)
        self._note(self.progress.after_block(side, dropped, name, member))

    def _block_tensors(self, layer: int, moments: Moments) -> dict[str, torch.Tensor]:
        linears = {inputs: block_tensor(layer, linear) for linear, inputs in INPUTS.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name in list(moments):
            # Popped, so that its sums are gone before the next one's are packed.
            tensors |= statistic_tensors(name, self._packed(linears[name], moments.pop(name)))
        return tensors

    def _packed(self, linear: str, moment: SecondMoment) -> PackedStatistics:
        """Return what was gathered, with that of the archive to add to."""
        if self.task.base is None:
            return moment.packed()
        return pack(merge(self.task.base.statistics(linear), moment.statistics()))

    def _finish(self, head: SecondMoment, on_gradients: OnBlock) -> None:
        """Write the last members and the manifest."""
        base, rows = self.task.base, self.task.rows
        counts = torch.bincount(torch.cat(rows.text()), minlength=self.model.config.vocab_size)
        first = 0
        if base is not None:
            first, counts = base.manifest.n_rows, counts + base.token_counts()
            rows = join_rows(base.rows(), rows)
        kinds = tuple(dict.fromkeys(rows.kinds))
        tensors = statistic_tensors(HEAD_INPUT, self._packed(llama.HEAD, head)) | {"token_counts": counts}
        tensors |= self._gradients(on_gradients)
        members: dict[str, Member] = {
            **self.progress.members,
            HEAD: write_member(self.folder, HEAD, tensors),
            ROWS: write_member(self.folder, ROWS, row_tensors(rows, kinds)),
        }
        dropped = [(row.row + first, row.layer, row.input) for row in self.calibration.dropped]
        earlier = base.manifest.dropped if base is not None else ()
        request, threads = self.progress.request, self.progress.threads
        sizes = len(rows.ids), len(rows.lengths)
        manifest = Manifest(request, threads, *sizes, kinds, (*earlier, *dropped), members)
        write_manifest(self.folder, manifest)

    def _chunk_tokens(self) -> int:
        """Return how many tokens' gradients are made together: on a CPU a row's, to need little memory."""
        config, device = self.model.config, self.model.device
        if device.type == "cpu":
            return LONGEST
        return chunk_tokens_for(config.n_layers, config.hidden_size, free_bytes(str(device)))

    def _gradients(self, on_block: OnBlock) -> dict[str, torch.Tensor]:
        """Return the mean squared gradients, with those of the archive to add to, by tokens of text."""
        weights, base = self.calibration.weights, self.task.base
        if self.progress.request.options["diagonal_only"]:
            return {}
        if weights is None:
            found = mean_gradients(
                self.model, self.task.rows.text(), on_block=on_block, chunk_tokens=self._chunk_tokens()
            )
        else:
            found = Gradients(weights.gradients, weights.embedding)
        own, embedding = gradient_tensor(found.means), found.embedding
        if base is not None and (earlier := base.gradients()) is not None:
            n_own, n_base = (sum(map(len, rows.text())) for rows in (self.task.rows, base.rows()))
            places = {place: earlier[block_tensor(*place)] for place in found.means}
            own = torch.lerp(own, gradient_tensor(places), n_base / (n_own + n_base))
            if base.knows_embedding:
                embedding = merge(base.statistics(llama.EMBEDDING), embedding)
        return {GRADIENTS: own} | statistic_tensors(EMBEDDING, pack(embedding))


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """Compute with so many threads: the number decides how sums are cut, and so their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
