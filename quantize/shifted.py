"""A second pass: the same rows through the original and through the quantized prefix at once.

Once blocks are quantized, the blocks behind them see other inputs than the original model's: x^ for x. At
three bits and fewer it pays to quantize a block for the inputs that it will have, and to steer it back to
the outputs that it should have: min E[|W x - W^ x^|^2] needs, for every input, H^ = E[x^ x^^T] and the
cross-covariance C = E[x^ x^T].

Both streams go through a block together, pack by pack. The statistics of a block are those behind quantized
*earlier* blocks: inside it, x^ is what its original weights make of the quantized stream. Then the caller
answers with the quantized weights, and the quantized stream advances with them.

    original    A -- W --> x  ------------------> A'
    quantized   B -- W --> x^ --> H^, C --> W^,   B -- W^ --> B'

Tokens may have weights, as in a calibration: those of their gradients (quantize/sensitivity.py), or a share
for first tokens (quantize/first_tokens.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantize.calibrate import MICRO_BATCH
from quantize.products import linear
from quantize.reference import HEAD_INPUT, INPUTS, Block, ReferenceModel, full_f32
from quantize.states import MemoryStates, Pack, States, packs


@dataclass(frozen=True)
class ShiftedStatistics:
    """Statistics of one input behind quantized blocks, f32 (K, K) each.

    `hessian` is the mean of w x^ x^^T, w the tokens' weights; `cross` that of w x^ x^T: rows belong to the
    quantized stream, columns to the original one. `plain` is the mean of |x^|^2, without weights.
    """

    n_tokens: int
    hessian: torch.Tensor
    cross: torch.Tensor
    plain: float


class Weighing(Protocol):
    """What each token of all rows counts, f32 (n_tokens,), at a layer's input; None: all alike."""

    def of(self, layer: int, name: str) -> torch.Tensor | None:
        """Return the weights."""
        ...


QuantizeBlock = Callable[[int, Mapping[str, ShiftedStatistics]], Mapping[str, torch.Tensor]]
"""Called with (layer, statistics by input); returns f32 weights by names within the block.

What it does not return, as the norms, stays as it is."""


def stream_shifted(
    model: ReferenceModel,
    rows: Sequence[torch.Tensor],
    quantize_block: QuantizeBlock,
    states: tuple[States, States] | None = None,
    micro_batch: int = MICRO_BATCH,
    weights: Weighing | None = None,
) -> ShiftedStatistics:
    """Stream rows of ids, int64 (n,), through both models; return the statistics of the head's input.

    `states` are those of the original and of the quantized stream, by default in memory: n_tokens x
    hidden_size x 4 bytes each. Besides, one block in f32 twice and the sums of one block are in memory.
    `weights` has those of all rows' tokens at each input; None: all count alike.
    """
    lengths = [len(row) for row in rows]
    if states is None:
        n_tokens, hidden = sum(lengths), model.config.hidden_size
        states = MemoryStates(n_tokens, hidden), MemoryStates(n_tokens, hidden)
    stream = _Pair(model, list(packs(range(len(rows)), lengths, micro_batch)), *states, weights)
    with full_f32(), torch.no_grad():
        stream.embed(rows)
        for layer in range(model.config.n_layers):
            block = model.widen(model.read_block(layer))
            statistics = stream.look(layer, block)
            answer = quantize_block(layer, statistics)
            stream.advance(block | {name: weight.to(model.device) for name, weight in answer.items()})
        return stream.head()


class _Pair:
    """Both streams' states, and the packs in which they go on."""

    def __init__(
        self,
        model: ReferenceModel,
        batches: Sequence[Pack],
        original: States,
        quantized: States,
        weights: Weighing | None,
    ) -> None:
        self.model, self.packs, self.weights = model, batches, weights
        self.original, self.quantized = original, quantized

    def embed(self, rows: Sequence[torch.Tensor]) -> None:
        """Begin both streams alike."""
        joined = (torch.cat([rows[row] for row in pack.rows]) for pack in self.packs)
        for pack, embedded in zip(self.packs, self.model.embed(joined), strict=True):
            for states in (self.original, self.quantized):
                states.write(pack.start, embedded)
        self._turn()

    def look(self, layer: int, block: Block) -> dict[str, ShiftedStatistics]:
        """Push both streams through the original block: the original one advances, the other does not."""
        sums: dict[str, _Sums] = {}
        for pack in self.packs:
            seen: dict[tuple[str, int], torch.Tensor] = {}

            def keep(
                name: str, x: torch.Tensor, at: int, seen: dict[tuple[str, int], torch.Tensor] = seen
            ) -> None:
                seen[name, at] = x

            def compare(
                name: str,
                x: torch.Tensor,
                at: int,
                seen: dict[tuple[str, int], torch.Tensor] = seen,
                first: int = pack.start,
            ) -> None:
                weights = self._weights(layer, name, first + at, len(x))
                sums.setdefault(name, _Sums(x)).add(x, seen.pop((name, at)), weights)

            state = self._read(self.original, pack)
            self.original.write(pack.start, self.model.forward_block(block, state, pack.lengths, keep))
            self.model.forward_block(block, self._read(self.quantized, pack), pack.lengths, compare)
        return {name: sums[name].statistics() for name in dict.fromkeys(INPUTS.values())}

    def advance(self, block: Block) -> None:
        """Push the quantized stream through the quantized block; both streams are then behind it."""
        for pack in self.packs:
            state = self._read(self.quantized, pack)
            self.quantized.write(pack.start, self.model.forward_block(block, state, pack.lengths))
        self._turn()

    def head(self) -> ShiftedStatistics:
        """Return the statistics of the final-normed states."""
        sums: dict[str, _Sums] = {}
        for pack in self.packs:
            both = (self._read(states, pack) for states in (self.original, self.quantized))
            x, shifted = (self.model.final_norm(state) for state in both)
            sums.setdefault(HEAD_INPUT, _Sums(x)).add(shifted, x, None)
        return sums[HEAD_INPUT].statistics()

    def _weights(self, layer: int, name: str, first: int, count: int) -> torch.Tensor | None:
        """Return what tokens count, f32 (count,), from one on: rows lie in the states in their order."""
        of_all = None if self.weights is None else self.weights.of(layer, name)
        return None if of_all is None else of_all[first : first + count].to(self.model.device)

    def _turn(self) -> None:
        self.original.turn()
        self.quantized.turn()

    def _read(self, states: States, pack: Pack) -> torch.Tensor:
        return states.read(pack.start, pack.end).to(self.model.device)


class _Sums:
    """The running sums of x^ x^^T and x^ x^T, as wide as the inputs `like`."""

    def __init__(self, like: torch.Tensor) -> None:
        self.n_tokens, self.plain = 0, 0.0
        self.hessian, self.cross = (like.new_zeros(like.shape[1], like.shape[1]) for _ in range(2))

    def add(self, shifted: torch.Tensor, original: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add both streams' inputs of the same tokens, f32 (n, K) each, with their weights f32 (n,)."""
        self.n_tokens += len(shifted)
        self.plain += float(shifted.square().sum(dtype=torch.float64))
        weighted = shifted if weights is None else shifted * weights[:, None]
        by_input = weighted.T.contiguous()
        self.hessian += linear(by_input, shifted.T.contiguous())
        self.cross += linear(by_input, original.T.contiguous())

    def statistics(self) -> ShiftedStatistics:
        """Return the means, on the CPU."""
        # A product of a matrix with its own transpose may differ from its mirror image in the last bit.
        hessian = (self.hessian + self.hessian.T) / (2 * self.n_tokens)
        means = hessian.cpu(), (self.cross / self.n_tokens).cpu()
        return ShiftedStatistics(self.n_tokens, *means, self.plain / self.n_tokens)
