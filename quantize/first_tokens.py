"""The first tokens of rows, and why they count more than one token.

A Llama's first position is where attention rests when it has nothing to look at, and its activations are
often a hundred times those of other tokens. An error there reaches every token behind it; yet in the mean
that H is, it counts as one token of thousands, and a solver spends it wherever that saves more elsewhere.
Weighing tokens by the gradient at a linear's output (GuidedQuant) finds this out the long way. Here first
tokens simply make up a fixed share of H:

    H'  =  H + (SHARE - n_rows / n_tokens) E[x₀ x₀ᵀ]        E over rows, x₀ a row's first input

Measured on a 135M Llama at 4 bits (scripts/bench/beyond_gptq), that lowers the KL divergence on held-out text
by more than a third. What a first token's inputs are depends on nothing but its id: with softmax over one
position, attention is the value itself. So no text is needed, one tensor is held at a time, and the archive
needs nothing new.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from quantize.llama import EMBEDDING, LlamaConfig, block_tensor
from quantize.products import linear
from quantize.reference import INPUTS, OnBlock
from quantize.weights import Weights

SHARE = 0.125


@dataclass(frozen=True)
class FirstTokens:
    """First tokens of rows.

    `counts`, f32 (u,), is how often each of u ids is one; `inputs` theirs, f32 (u, K), by layer and input.
    """

    counts: torch.Tensor
    inputs: Mapping[tuple[int, str], torch.Tensor]

    def strengthen(
        self, H: torch.Tensor, layer: int, name: str, n_tokens: int, share: float = SHARE
    ) -> tuple[torch.Tensor, float]:
        """Return H' for H, f32 (K, K), the mean over `n_tokens`, and a number for its damping.

        The number is the mean of H's diagonal over that of H': a damping that is a share of the mean diagonal
        stays what it was when multiplied with it. H' is H where first tokens have their share already.
        """
        added = share - float(self.counts.sum()) / n_tokens
        x = self.inputs[layer, name].to(H.device)
        # Weights that are not finite are refused by name, by whoever rounds them.
        if added <= 0 or not bool(x.isfinite().all()):
            return H, 1.0
        scaled = x * (self.counts.to(H.device) / self.counts.sum() * added).sqrt()[:, None]
        strengthened = torch.addmm(H, scaled.T, scaled)
        before, after = (float(matrix.diagonal().mean()) for matrix in (H, strengthened))
        return strengthened, before / after if after > 0 else 1.0


@dataclass(frozen=True)
class FirstShare:
    """The weights of rows' tokens, `weights` f32 (n_tokens,) at every input, with which first tokens have
    their share of the sum (quantize/shifted.py)."""

    weights: torch.Tensor

    def of(self, _layer: int, _name: str) -> torch.Tensor:
        """Return the weights."""
        return self.weights


def first_share(lengths: Sequence[int], share: float = SHARE) -> FirstShare:
    """Return the weights of the tokens of rows of these lengths: 1, and for first ones what H' gives them."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    weights, added = torch.ones(sum(lengths)), share - len(lengths) / sum(lengths)
    weights[starts] += max(added, 0.0) * sum(lengths) / len(lengths)
    return FirstShare(weights)


@torch.no_grad()
def first_tokens(
    config: LlamaConfig,
    weights: Weights,
    ids: Sequence[int],
    on_block: OnBlock = lambda done, total: None,
    device: str = "cpu",
) -> FirstTokens:
    """Push the ids that rows begin with through the model, each a row of its own, one tensor at a time."""
    found, counts = torch.unique(torch.tensor(ids), return_counts=True)
    state = weights.load(EMBEDDING)[found].to(device).float()
    inputs = dict[tuple[int, str], torch.Tensor]()

    def loaded(layer: int, name: str) -> torch.Tensor:
        return weights.load(block_tensor(layer, name)).to(device).float()

    def times(x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        inputs[layer, INPUTS[name]] = x
        return linear(x, loaded(layer, name))

    def normed(layer: int, name: str) -> torch.Tensor:
        scale = torch.rsqrt(state.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return loaded(layer, name) * (state * scale)

    for layer in range(config.n_layers):
        value = times(normed(layer, "input_layernorm"), layer, "self_attn.v_proj")
        heads = value.reshape(len(state), config.n_kv_heads, config.head_dim)
        mixed = heads.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1).flatten(1)
        state = state + times(mixed, layer, "self_attn.o_proj")
        x = normed(layer, "post_attention_layernorm")
        inner = functional.silu(times(x, layer, "mlp.gate_proj")) * times(x, layer, "mlp.up_proj")
        state = state + times(inner, layer, "mlp.down_proj")
        on_block(layer + 1, config.n_layers)
    return FirstTokens(counts.float(), inputs)
