"""Calibration: rows of tokens pushed through the model one block at a time, every linear's input looked at.

For each block, all rows pass through it and the sums of x x^T of its four inputs grow; then they are the
block's statistics, and the next block is begun. One block is in memory in f32, the next one is read from
the disk meanwhile; the hidden states of all rows lie in `States`.

        block 0            block 1                      final norm
    A ---------> B     B ---------> A     A ---> ...  ------------> statistics of the output matrix's input
         |                  |
     statistics         statistics

The model is the unquantized one and stays so: that is why its statistics serve any quantization. What
depends on the quantization of the blocks before is quantize/shifted.py's.

Rows do not see each other, and sums do not depend on their order beyond rounding (see SecondMoment), so
micro-batches and ranks change the result by less than 1e-5 of it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch

from quantize.errors import CalibrationError
from quantize.ranks import Ranks, share_out
from quantize.reference import HEAD_INPUT, INPUTS, Block, ReferenceModel, full_f32
from quantize.sensitivity import TokenWeights
from quantize.states import Pack, States, packs
from quantize.statistics import SecondMoment

MICRO_BATCH = 2048
_PAGE = 4096
_FEWEST = 256


@dataclass(frozen=True)
class Dropped:
    """A row that is left out: its number, and the layer and input at which it first was not finite."""

    row: int
    layer: int
    input: str


@dataclass(frozen=True)
class Settings:
    """How to calibrate: tokens per micro-batch, the diagonal alone, whether to leave out bad rows.

    With `drop_nonfinite`, a row with an activation that is not a finite number is left out from the next
    block on; of the block where it happens, only its finite inputs are counted.
    """

    micro_batch: int = MICRO_BATCH
    diagonal_only: bool = False
    drop_nonfinite: bool = False


Moments = dict[str, SecondMoment]
Weigh = Callable[[str, Pack], torch.Tensor | None]
"""From an input and a pack to a factor for each token's inputs, f32 (n,)."""


class Calibration:
    """A model and rows of `lengths` tokens: yields the sums of block after block.

    With several ranks every rank makes one over all rows; it works on its own share of them, `rows`, and all
    get the same sums. With `weights` each token counts so often.
    """

    def __init__(
        self,
        model: ReferenceModel,
        lengths: Sequence[int],
        settings: Settings,
        ranks: Ranks | None = None,
        weights: TokenWeights | None = None,
    ) -> None:
        self.model, self.settings, self.weights = model, settings, weights
        self._starts = [0, *accumulate(lengths)]
        self.ranks = ranks if ranks is not None else Ranks()
        self.rows = share_out(lengths, self.ranks.count)[self.ranks.number]
        self.lengths = [lengths[row] for row in self.rows]
        self.n_rows = len(lengths)
        self.dropped: list[Dropped] = []

    @property
    def n_tokens(self) -> int:
        """Number of tokens of this rank's rows, dropped ones included: the length of its states."""
        return sum(self.lengths)

    @torch.no_grad()
    def embed(self, ids: Sequence[torch.Tensor], states: States) -> None:
        """Fill the states with the embedded ids; `ids` are all rows, of all ranks."""
        batches = list(packs(self.rows, self.lengths, self.settings.micro_batch))
        joined = (torch.cat([ids[row] for row in pack.rows]) for pack in batches)
        for pack, embedded in zip(batches, self.model.embed(joined), strict=True):
            states.write(pack.start, embedded)
        states.turn()

    def blocks(self, states: States, first: int = 0) -> Iterator[tuple[int, Moments]]:
        """Yield (layer, sums by input) from block `first` on, whose input the states are.

        When a layer is yielded, the states are already the next one's. Raises CalibrationError for
        activations that are not finite, on every rank alike.
        """
        n_layers = self.model.config.n_layers
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read_ahead, first) if first < n_layers else None
            for layer in range(first, n_layers):
                assert ahead is not None
                stored = ahead.result()
                ahead = pool.submit(self._read_ahead, layer + 1) if layer + 1 < n_layers else None
                yield layer, self._block(layer, stored, states)

    @torch.no_grad()
    def head(self, states: States) -> SecondMoment:
        """Return the sums of the output matrix's input, for the states behind the last block."""
        config = self.model.config
        moments = self._moments({HEAD_INPUT: config.hidden_size})
        watch = _Watch(config.n_layers, moments)
        with full_f32():
            for pack in self._packs():
                states_of_pack = states.read(pack.start, pack.end).to(self.model.device)
                watch.begin(pack)
                watch(HEAD_INPUT, self.model.final_norm(states_of_pack), 0)
        self._finish(watch)
        return moments[HEAD_INPUT]

    @torch.no_grad()
    def _block(self, layer: int, stored: Block, states: States) -> Moments:
        block = self.model.widen(stored)
        widths = {INPUTS[name]: shape[1] for name, shape in self._linears().items()}
        moments = self._moments(widths)
        watch = _Watch(layer, moments, self._weighing(layer))
        with full_f32():
            for pack in self._packs():
                state = states.read(pack.start, pack.end).to(self.model.device)
                watch.begin(pack)
                states.write(pack.start, self.model.forward_block(block, state, pack.lengths, watch))
                if watch.faults and not self.settings.drop_nonfinite:
                    break
        states.turn()  # before the ranks meet: whoever comes out of that knows that all states are safe
        self._finish(watch)
        return moments

    def _weighing(self, layer: int) -> Weigh | None:
        """Return what scales a pack's inputs, so that their squares count by the tokens' weights."""
        if self.weights is None:
            return None
        found = self.weights

        def weigh(name: str, pack: Pack) -> torch.Tensor | None:
            of_all = found.of(layer, name)
            if of_all is None:
                return None
            rows = [of_all[self._starts[row] : self._starts[row + 1]] for row in pack.rows]
            return torch.cat(rows).sqrt().to(self.model.device)

        return weigh

    def _linears(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.model.config.block_shapes().items() if name in INPUTS}

    def _moments(self, widths: dict[str, int]) -> Moments:
        only = self.settings.diagonal_only
        return {name: SecondMoment(width, self.model.device, only) for name, width in widths.items()}

    def _packs(self) -> Iterator[Pack]:
        without = {dropped.row for dropped in self.dropped}
        return packs(self.rows, self.lengths, self.settings.micro_batch, without)

    def _finish(self, watch: "_Watch") -> None:
        """Bring the ranks together: their faults, then their sums."""
        faults = [fault for share in self.ranks.gather(list(watch.faults.values())) for fault in share]
        if faults and not self.settings.drop_nonfinite:
            raise _not_finite(faults, [])
        self.dropped += faults
        if self.dropped and len(self.dropped) == self.n_rows:
            raise _not_finite(self.dropped, ["that was the last row: nothing is left to calibrate on"])
        for name, moment in watch.moments.items():
            self.ranks.sum_(moment.tensors())
            moment.n_tokens = sum(self.ranks.gather(moment.n_tokens))
            if not bool(moment.diagonal().isfinite().all()):
                raise _not_finite([], [f"layer {watch.layer}, {name}: the sum of squares is beyond f32"])

    def _read_ahead(self, layer: int) -> Block:
        """Map a block and touch every page of it, so that it is in the page cache when it is needed."""
        block = self.model.read_block(layer)
        for tensor in block.values():
            tensor.flatten().view(torch.uint8)[::_PAGE].sum()
        return block


class _Watch:
    """Sees every input of a block: adds it to its sum, and notes rows that are not finite."""

    def __init__(self, layer: int, moments: Moments, weigh: Weigh | None = None) -> None:
        self.layer, self.moments, self._weigh = layer, moments, weigh
        self.faults: dict[int, Dropped] = {}
        self._pack: Pack | None = None

    def begin(self, pack: Pack) -> None:
        """Expect the inputs of this pack."""
        self._pack = pack

    def __call__(self, name: str, inputs: torch.Tensor, start: int) -> None:
        if self._weigh is not None and self._pack is not None:
            factors = self._weigh(name, self._pack)
            if factors is not None:
                inputs = inputs * factors[start : start + len(inputs), None]
        # One pass over the data, and one number to wait for; a sum that overflows is looked at again.
        if not bool(inputs.sum().isfinite()):
            inputs = self._finite(name, inputs, start)
        self.moments[name].add(inputs)

    def _finite(self, name: str, inputs: torch.Tensor, start: int) -> torch.Tensor:
        """Return the inputs that are finite; the rows of the others are noted."""
        assert self._pack is not None
        finite = inputs.isfinite().all(-1)
        for token in (~finite).nonzero().flatten().tolist():
            row = self._pack.row_of(start + token)
            self.faults.setdefault(row, Dropped(row, self.layer, name))
        return inputs[finite]


def micro_batch_for(n_columns: int, free_bytes: int) -> int:
    """Return how many tokens of a model with inputs of up to `n_columns` fit an eighth of free memory.

    At most MICRO_BATCH, beyond which products are no faster, and at least 256, below which they are slow.
    """
    per_token = 8 * 4 * n_columns  # eight activations of the widest kind, in f32
    return max(_FEWEST, min(MICRO_BATCH, free_bytes // 8 // per_token))


def _not_finite(faults: Sequence[Dropped], reasons: Sequence[str]) -> CalibrationError:
    listed = [f"layer {fault.layer}, {fault.input}: row {fault.row}" for fault in faults[:12]]
    if len(faults) > len(listed):
        listed.append(f"and {len(faults) - len(listed)} more")
    return CalibrationError(
        "activations that are not finite numbers",
        reasons=[*listed, *reasons],
        hint="look at the weights of that layer and at those rows, or leave such rows out",
    )
