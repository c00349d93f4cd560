"""How much each token matters at each input: gradients, streamed backwards one block at a time.

An error E in a linear shifts the model's next-token distribution by a KL divergence of about

    1/2 E[(g . E x)^2]        g the gradient of -log p(label) at the linear's output, labels drawn from p

(the Fisher information; labels of the text itself would not do). H = E[x x^T] counts every token alike. With
the weight |g|^2 for each token (GuidedQuant, with one group of outputs) it counts what the model makes of it:
much for a row's first token, where the attention rests, little for a token that nothing looks at.

Rows are taken in chunks. A chunk goes forward through all blocks, and its states before each stay in memory:
tokens x hidden_size x 4 bytes x blocks. Then it goes back: each block is read once more, its outputs are made
again and differentiated. One block is held at a time, whatever the chunk.

    embed -> [block 0] -> [block 1] -> ... -> logits -> sampled labels
                 |            |                             |
              states       states      <- [block 1] <- gradient of the last states

Linears that share an input share a weight: the sum of what each would have, divided by its mean.

To put a price on errors, the mean of |g|^2 over a few thousand tokens is enough (`mean_gradients`).

An embedding is looked up, and has no inputs. An error e in a token's row costs about 1/2 e G e^T wherever the
token stands, with G = E[g g^T], g the gradient at the embedding's output: what H is to a linear.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantize.llama import EMBEDDING, FINAL_NORM, HEAD
from quantize.metrics import chunks
from quantize.products import linear
from quantize.reference import INPUTS, Block, OnBlock, ReferenceModel, full_f32
from quantize.statistics import SecondMoment, Statistics

POSITIONS = 128
"""Tokens whose logits are in memory at a time."""
SAMPLE, LONGEST = 4096, 512
"""Tokens over which gradients are averaged, and how many of them a row has at the most."""
Squares = dict[tuple[int, str], torch.Tensor]
"""Squared gradients by (layer, linear), f32 (n_tokens,)."""


@dataclass(frozen=True)
class TokenWeights:
    """What each token of all rows counts, f32 (n_tokens,), by (layer, input): 1 on average.

    `gradients` has the mean of |g|^2 by (layer, linear): with N outputs, an error E of that linear costs
    about 1/2 |g|^2 / N tr(E H E^T) nats, H made with these weights, as if all outputs mattered alike.
    `embedding` is G, over all but rows' first tokens.
    """

    weights: Mapping[tuple[int, str], torch.Tensor]
    gradients: Mapping[tuple[int, str], float]
    embedding: Statistics

    def of(self, layer: int, name: str) -> torch.Tensor | None:
        """Return the weights at an input; None for the output matrix's, where tokens count alike."""
        return self.weights.get((layer, name))


def fisher_kl(energy: float, n_outputs: int, gradient: float) -> float:
    """Return the KL divergence, in nats, of an error with tr(E H E^T) = energy: see `TokenWeights`."""
    return gradient * energy / (2 * n_outputs)


def token_weights(
    model: ReferenceModel,
    rows: Sequence[torch.Tensor],
    chunk_tokens: int,
    seed: int = 0,
    on_block: OnBlock = lambda done, total: None,
) -> TokenWeights:
    """Return the weights of the tokens of rows of ids, int64 (n,).

    A chunk is rows of up to `chunk_tokens` tokens, or one longer row. `on_block` is called with (blocks done,
    in all), twice a block and chunk. The same arguments give the same weights.
    """
    squares, embedding = _squares(model, rows, chunk_tokens, seed, on_block)
    means = {place: float(each.mean()) for place, each in squares.items()}
    return TokenWeights(_shared(squares), means, embedding)


def _squares(
    model: ReferenceModel, rows: Sequence[torch.Tensor], chunk_tokens: int, seed: int, on_block: OnBlock
) -> tuple[Squares, Statistics]:
    """Return |g|^2 of all tokens, and G."""
    differentiable = _Differentiable(model.config, model.weights, model.device)
    parts, generator = _chunks(rows, chunk_tokens), torch.Generator().manual_seed(seed)
    found, embedding = list[Squares](), SecondMoment(model.config.hidden_size, model.device)
    done, total = 0, 2 * len(parts) * model.config.n_layers

    def step() -> None:
        nonlocal done
        done += 1
        on_block(done, total)

    with full_f32():
        for part in parts:
            squares, gradients = differentiable.squares(part, generator, step)
            found.append(squares)
            embedding.add(torch.cat([row[len(row) > 1 :] for row in gradients]).nan_to_num(0, 0, 0))
    names = found[0]
    joined = {place: torch.cat([part[place] for part in found]).nan_to_num(0, 0, 0) for place in names}
    return joined, embedding.statistics()


@dataclass(frozen=True)
class Gradients:
    """The mean |g|^2 by (layer, linear), and G at the embedding's output."""

    means: Mapping[tuple[int, str], float]
    embedding: Statistics


def mean_gradients(
    model: ReferenceModel,
    rows: Sequence[torch.Tensor],
    n_tokens: int = SAMPLE,
    on_block: OnBlock = lambda done, total: None,
    chunk_tokens: int = LONGEST,
) -> Gradients:
    """Return the mean squares of gradients over about `n_tokens` tokens of rows of ids, int64 (n,).

    Rows are taken at even distances, and of each its beginning. First tokens are left out, in whose place
    the Hessians have their share (quantize/first_tokens.py), unless there are no others. For every chunk of
    `chunk_tokens` the model is read twice; how large it is changes nothing else.
    """
    some = sample_rows(rows, n_tokens)
    later = torch.cat([torch.arange(len(row)) > 0 for row in some])
    squares, embedding = _squares(model, some, chunk_tokens, 0, on_block)
    means = {place: float((each[later] if later.any() else each).mean()) for place, each in squares.items()}
    return Gradients(means, embedding)


def sample_rows(rows: Sequence[torch.Tensor], n_tokens: int) -> list[torch.Tensor]:
    """Return the beginnings of evenly spread rows, at most `LONGEST` of each, `n_tokens` or little more."""
    lengths = [min(len(row), LONGEST) for row in rows]
    count = min(len(rows), -(-n_tokens * len(rows) // sum(lengths)))
    return [rows[i * len(rows) // count][:LONGEST] for i in range(count)]


def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a label for each row of probabilities, int64 (n, 1) of f32 (n, V), drawn by them."""
    below = p.cumsum(-1)  # by far faster than torch.multinomial is on a CPU
    points = torch.rand(len(p), 1, generator=generator).to(p.device) * below[:, -1:]
    return torch.searchsorted(below, points).clamp(max=p.shape[1] - 1)


def chunk_tokens_for(n_layers: int, hidden_size: int, free_bytes: int) -> int:
    """Return how many tokens' states before all blocks fit a quarter of free memory; 512 at the least."""
    return max(512, free_bytes // 4 // (4 * hidden_size * (n_layers + 1)))


def _chunks(rows: Sequence[torch.Tensor], most: int) -> list[list[torch.Tensor]]:
    parts: list[list[torch.Tensor]] = []
    room = 0
    for row in rows:
        if len(row) > room or not parts:
            parts.append([])
            room = most
        parts[-1].append(row)
        room -= len(row)
    return parts


def _shared(found: Squares) -> dict[tuple[int, str], torch.Tensor]:
    """Give each linear the mean 1, and each input the mean of its linears."""
    shared: dict[tuple[int, str], torch.Tensor] = {}
    for (layer, name), squares in found.items():
        mean = squares.mean()
        weights = squares / mean if mean > 0 else torch.ones_like(squares)
        share = sum(inputs == INPUTS[name] for inputs in INPUTS.values())
        place = layer, INPUTS[name]
        shared[place] = shared.get(place, torch.zeros(())) + weights / share
    return shared


class _Linear(torch.autograd.Function):
    """x W^T, with W fixed; backwards it notes |g|^2."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Multiply; `squares`, f32 (n,), is where |g|^2 goes."""
        ctx.weight, ctx.squares = weight, squares
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x."""
        (gradient,) = gradients
        gradient = gradient.contiguous()
        ctx.squares.copy_(gradient.square().sum(-1))
        return linear(gradient, ctx.weight.T.contiguous()), None, None


class _Differentiable(ReferenceModel):
    """The reference forward, differentiable, row by row."""

    def squares(
        self, rows: Sequence[torch.Tensor], generator: torch.Generator, step: Callable[[], None]
    ) -> tuple[Squares, list[torch.Tensor]]:
        """Return |g|^2 of a chunk's tokens at every linear's output, and g at the embedding's, by row."""
        n_layers, lengths = self.config.n_layers, [len(row) for row in rows]
        # One tensor from the start: small ones, kept from between the large ones of the blocks, would leave
        # the heap in pieces that no block fits into any more.
        found = torch.zeros(n_layers, len(INPUTS), sum(lengths), device=self.device)
        states = [list(self.embed(rows))]
        with torch.no_grad():
            for layer in range(n_layers):
                block = self.widen(self.read_block(layer))
                states.append([self.forward_block(block, state, [len(state)]) for state in states[-1]])
                step()
        gradients = self._last_gradients(states.pop(), generator)
        for layer in reversed(range(n_layers)):
            block, before = self.widen(self.read_block(layer)), states.pop()
            for row, of_row in enumerate(torch.split(found[layer], lengths, 1)):
                squares = dict(zip(INPUTS, of_row, strict=True))
                gradients[row] = self._backward(block, before[row], gradients[row], squares)
            step()
        places = ((layer, name) for layer in range(n_layers) for name in INPUTS)
        return dict(zip(places, found.flatten(0, 1).cpu(), strict=True)), gradients

    def _last_gradients(
        self, states: Sequence[torch.Tensor], generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Return the gradient of -log p(labels) at each row's states behind the last block."""
        head, gain = self._load(EMBEDDING if self.config.tied_head else HEAD), self._load(FINAL_NORM)
        gradients = list[torch.Tensor]()
        for row in states:
            state = row.detach().requires_grad_()
            normed = self._norm(state, gain)
            pulled = []
            for start, end in chunks(len(state), POSITIONS):
                # torch's own products, for oneDNN's would make a copy of the head.
                p = torch.softmax(normed[start:end].detach() @ head.T, dim=-1)
                p.nan_to_num_(1 / p.shape[1])  # a row that is not finite counts nothing, and stops nobody
                labels = draw(p, generator)
                p.scatter_add_(1, labels, -torch.ones_like(labels, dtype=p.dtype))
                pulled.append(p @ head)
            gradients += torch.autograd.grad(normed, state, torch.cat(pulled))
        return gradients

    def _backward(
        self,
        block: Block,
        state: torch.Tensor,
        gradient: torch.Tensor,
        squares: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Pull a row's gradient back through a block."""
        state = state.detach().requires_grad_()

        def times(x: torch.Tensor, name: str) -> torch.Tensor:
            found: torch.Tensor = _Linear.apply(x, block[name], squares[name])  # type: ignore[no-untyped-call]
            return found

        with torch.enable_grad():
            after = self.differentiable_block(block, state, [len(state)], times)
        (before,) = torch.autograd.grad(after, state, gradient)
        return before
