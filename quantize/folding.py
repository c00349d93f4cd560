"""Folding: inner channels scaled where nothing sees it, so that they are easier to round.

Between two matrices a channel's scale is free: what the rows of the first are divided by, the columns of the
second are multiplied by, and the model computes what it did.

    rows divided by s    columns multiplied by s    one s for each
    v                    o                          channel of a KV head, which its query heads share
    up                   down                       inner channel of the MLP (SiLU is on gate's side)

The rows of v and up have steps of their own, which take a row's scale. A block of o or down has
one step for its 32 (or 16) columns, which goes with the largest of them: the error in each costs its D_j
times the same step squared. With w_j^2 the mean square of column j, the cost of a block goes as

    sum_j D_j / s_j^2  x  sum_j w_j^2 s_j^2,      least (Cauchy and Schwarz) at     s_j = (D_j / w_j^2)^(1/4)

D_j is what remains of E[x_j^2] when the other columns make up for the error. It spans far fewer powers of
two than E[x_j^2] does: about as many as its root, h_j = E[x_j^2]^(1/2), which is taken here. On a real model
this does as well as the D of a factored H, and E[x_j^2] itself worse; the channels of norms, whose factors
would be free too, are better left alone (docs/fidelity.md).

Statistics need no second calibration: a channel's scale changes the diagonal of H and leaves all
correlations as they are. Factors are powers of 2^(1/8), each kept as its exponent in a byte: the step costs
the product above a quarter of a percent, and an exporter can write the bytes down, by which a reader takes
the factors back exactly.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from quantize.first_tokens import FirstTokens
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import ATTENTION_MIXED, MLP_INNER
from quantize.statistics import PackedStatistics
from quantize.weights import TensorSpec, Weights

STEPS = 8
"""Steps of a factor of two."""
MOST = 3 * STEPS
"""Exponents further from their mean than that are cut: a factor of 8. Blocks of rows that are divided by much
more could need a `d` that f16 holds with few bits."""

PAIRS = {
    ATTENTION_MIXED: ("self_attn.v_proj", "self_attn.o_proj"),
    MLP_INNER: ("mlp.up_proj", "mlp.down_proj"),
}
"""Which matrix's rows are divided, and whose columns are multiplied, by the input between them."""

Place = tuple[int, str]
"""A layer and an input of PAIRS."""


@dataclass(frozen=True)
class Fold:
    """What the inner channels of a model are multiplied by, as exponents of 2^(1/STEPS).

    `exponents` are int8, (n_kv_heads * head_dim,) or (intermediate_size,), by place: all of them.
    """

    config: LlamaConfig
    exponents: Mapping[Place, torch.Tensor]

    def multiplied(self, name: str) -> torch.Tensor | None:
        """Return the factors of a matrix's columns, f32 (K,), by its tensor's name; None if it has none."""
        place = _columns(self.config).get(name)
        return None if place is None else self._multipliers(place)

    def divided(self, name: str) -> torch.Tensor | None:
        """Return the divisors of a matrix's rows, f32 (N,), by its tensor's name; None if it has none."""
        place = _rows(self.config).get(name)
        return None if place is None else self._factors(place)

    def applied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a tensor becomes: in f32 if it has factors, else as it is."""
        if (factors := self.multiplied(name)) is not None:
            return tensor.float() * factors
        divisors = self.divided(name)
        return tensor if divisors is None else tensor.float() / divisors[:, None]

    def statistics(self, name: str, packed: PackedStatistics) -> PackedStatistics:
        """Return what the statistics of a matrix's input become: x_j / s_j has the correlations of x_j."""
        factors = self.multiplied(name)
        return packed if factors is None else replace(packed, diagonal=packed.diagonal / factors.square())

    def first_tokens(self, first: FirstTokens) -> FirstTokens:
        """Return what rows' first tokens become."""
        inputs = dict(first.inputs)
        for place in places(self.config):
            inputs[place] = inputs[place] / self._multipliers(place).to(inputs[place].device)
        return replace(first, inputs=inputs)

    def _multipliers(self, place: Place) -> torch.Tensor:
        factors = self._factors(place)
        return of_query_heads(self.config, factors) if place[1] == ATTENTION_MIXED else factors

    def _factors(self, place: Place) -> torch.Tensor:
        return torch.exp2(self.exponents[place].double() / STEPS).float()


@dataclass(frozen=True)
class FoldedWeights:
    """Weights with a fold applied as they are loaded."""

    weights: Weights
    fold: Fold

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's spec by name; those that have factors are f32."""
        folded = _columns(self.fold.config).keys() | _rows(self.fold.config).keys()
        return {
            name: replace(spec, dtype=torch.float32) if name in folded else spec
            for name, spec in self.weights.specs().items()
        }

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self.fold.applied(name, self.weights.load(name))


@dataclass(frozen=True)
class Channels:
    """What decides the factors between two matrices, each f32 (K,): by channel of the input between them.

    `power` is E[x_j^2]; `weight` the mean square of the second matrix's columns; `output` E[y_j^2] of the
    first matrix's output.
    """

    power: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor


def exponents_of(channels: Channels) -> torch.Tensor:
    """Return the exponents of s_j = (h_j / w_j^2)^(1/4), h_j^2 = E[x_j^2], int8 (K,).

    A common factor of all is free: it is chosen so that the sum of the first matrix's E[y_j^2] stays what it
    was, and with it what is known of the cost of errors there. No exponent is further than MOST from the mean
    of the channels that are alive; those that are always zero, or no number, on either side, have the mean.
    """
    parts = channels.power, channels.weight, channels.output
    alive = torch.stack([(part > 0) & part.isfinite() for part in parts]).all(0)
    exponents = torch.zeros(len(alive))
    if alive.any():
        power, weight, output = (part[alive].double() for part in parts)
        wanted = (power.sqrt() / weight).log2() * STEPS / 4
        exponents[alive] = (wanted - wanted.mean()).round().clamp(-MOST, MOST).float()
        left = (output * torch.exp2(-2 * exponents[alive].double() / STEPS)).sum() / output.sum()
        exponents += float((left.log2() / 2 * STEPS).round())
    return exponents.to(torch.int8)


def of_query_heads(config: LlamaConfig, channels: torch.Tensor) -> torch.Tensor:
    """Return the KV heads' channels once for each query head that attends by them."""
    heads = channels.reshape(config.n_kv_heads, config.head_dim)
    return heads.repeat_interleave(config.n_heads // config.n_kv_heads, dim=0).flatten()


def of_kv_heads(config: LlamaConfig, channels: torch.Tensor) -> torch.Tensor:
    """Return the means of the query heads' channels over those that share a KV head."""
    return channels.reshape(config.n_kv_heads, -1, config.head_dim).mean(1).flatten()


def places(config: LlamaConfig) -> Iterator[Place]:
    """Yield every place, in the model's order."""
    for layer in range(config.n_layers):
        for name in PAIRS:
            yield layer, name


def n_channels(config: LlamaConfig, name: str) -> int:
    """Return how many factors an input of PAIRS has in a layer."""
    return config.n_kv_heads * config.head_dim if name == ATTENTION_MIXED else config.intermediate_size


@cache
def _columns(config: LlamaConfig) -> Mapping[str, Place]:
    return {block_tensor(layer, PAIRS[name][1]): (layer, name) for layer, name in places(config)}


@cache
def _rows(config: LlamaConfig) -> Mapping[str, Place]:
    return {block_tensor(layer, PAIRS[name][0]): (layer, name) for layer, name in places(config)}
