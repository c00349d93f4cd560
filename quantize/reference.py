"""The reference: a Llama forward that is plain enough to be believed, one decoder block at a time.

Everything is measured against this forward: a written file's weights against the checkpoint's, a runtime's
logits against both. So it computes what the model *means*: weights widened to f32, f32 arithmetic, no
TF32, no cache. (bf16 arithmetic alone costs a KL divergence of 1e-3, five hundred times the loss of an F16
file; a reference in bf16 could not tell the two apart.)

All rows are pushed through block 0, then through block 1, and so on, so that one block's weights are in
memory however large the model is. Rows keep their own lengths: there is no padding, and so no mask but
the causal one.

        ids -> embedding -> [ norm -> attention -> + -> norm -> SwiGLU -> + ] x n_layers -> norm -> head
                            '-------------- one block, loaded and dropped --------'

An observer sees the input of every linear on its way, under the names of `INPUTS`: q, k and v share one,
gate and up share one. Several rows may go through a block as one *pack*, one after the other in one tensor:
only attention, which must not look from one row into another, takes them apart.

Rotary positions follow transformers' Llama: frequencies theta^(-2i/d), divided by the linear scaling
factor (which is the same as dividing the positions), rotation of the two halves of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional

from quantize.errors import UsageError
from quantize.llama import EMBEDDING, FINAL_NORM, HEAD, LlamaConfig, block_tensor
from quantize.products import linear
from quantize.weights import Weights

Block = dict[str, torch.Tensor]
Tables = tuple[torch.Tensor, torch.Tensor]
OnBlock = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

Observe = Callable[[str, torch.Tensor, int], None]
"""Called with (name of an input, f32 (n, K), the place of its first token in the pack)."""

Times = Callable[[torch.Tensor, str], torch.Tensor]
"""A linear, by its name within the block: f32 (n, K) to f32 (n, N)."""

ATTENTION_INPUT, ATTENTION_MIXED = "attention_input", "attention_mixed"
MLP_INPUT, MLP_INNER, HEAD_INPUT = "mlp_input", "mlp_inner", "head_input"
INPUTS = {
    "self_attn.q_proj": ATTENTION_INPUT,
    "self_attn.k_proj": ATTENTION_INPUT,
    "self_attn.v_proj": ATTENTION_INPUT,
    "self_attn.o_proj": ATTENTION_MIXED,
    "mlp.gate_proj": MLP_INPUT,
    "mlp.up_proj": MLP_INPUT,
    "mlp.down_proj": MLP_INNER,
}
"""The input that each linear of a block multiplies."""

MLP_TOKENS = 1024  # of a long row at a time: the inner activations would be its largest tensors


class ReferenceModel:
    """A Llama over any `Weights`, in f32 on `device`. Holds no weights until the head is asked for."""

    def __init__(self, config: LlamaConfig, weights: Weights, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.weights = weights
        self.device = torch.device(device)
        self._head: torch.Tensor | None = None

    @torch.inference_mode()
    def hidden(self, rows: Sequence[torch.Tensor], on_block: OnBlock | None = None) -> list[torch.Tensor]:
        """Return the final-normed hidden states of every row: f32 (n, hidden_size) on the device.

        `rows` are token ids, int64 (n,), each row a text of its own that starts at position 0. Memory:
        one block in f32, the hidden states of all rows, the activations of one row.
        """
        with full_f32():
            states = list(self.embed(rows))
            for layer in range(self.config.n_layers):
                block = self.widen(self.read_block(layer))
                for index, state in enumerate(states):
                    states[index] = self.forward_block(block, state, [len(state)])
                if on_block is not None:
                    on_block(layer + 1, self.config.n_layers)
            gain = self._load(FINAL_NORM)
            return [self._norm(state, gain) for state in states]

    def embed(self, rows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the embedded rows of ids (n,): f32 (n, hidden_size) on the device."""
        # Only the rows in use are widened: the table itself is as large as several blocks.
        table = self.weights.load(EMBEDDING)
        for row in rows:
            yield table[row.cpu()].to(self.device).float()

    def read_block(self, layer: int) -> Block:
        """Return a decoder block's tensors as stored, by their names within the block."""
        return {name: self.weights.load(block_tensor(layer, name)) for name in self.config.block_shapes()}

    def widen(self, block: Block) -> Block:
        """Return a block in f32 on the device."""
        # Widened there: else twice the bytes would travel, and the CPU would widen them.
        return {name: tensor.to(self.device).float() for name, tensor in block.items()}

    def forward_block(
        self, block: Block, state: torch.Tensor, lengths: Sequence[int], observe: Observe | None = None
    ) -> torch.Tensor:
        """Push a pack through a block: f32 (n, hidden_size) to the same.

        The pack is rows of `lengths` tokens, one after the other, n in all; `observe` is called with
        every input of the block's linears, the MLP's at most MLP_TOKENS at a time. To be called under
        `full_f32` and without gradients.
        """
        seen = observe if observe is not None else _unobserved
        state = self._attention_residual(block, state, lengths, seen)
        starts = range(0, len(state), MLP_TOKENS)
        parts = zip(starts, torch.split(state, MLP_TOKENS), strict=True)
        return torch.cat([self._mlp_residual(block, part, start, seen) for start, part in parts])

    def differentiable_block(
        self, block: Block, state: torch.Tensor, lengths: Sequence[int], times: Times
    ) -> torch.Tensor:
        """Push a pack through a block as `forward_block` does, by operations that torch differentiates.

        `times(x, name)` is what stands for the linears: x W^T, W the block's of that name.
        """
        normed = self._norm(state, block["input_layernorm"])
        tables = rotary_tables(self.config, max(lengths), self.device)
        heads = (torch.split(times(normed, f"self_attn.{name}_proj"), list(lengths)) for name in "qkv")
        by_row = zip(*heads, strict=True)
        mixed = torch.cat([self._mix(query, key, value, tables) for query, key, value in by_row])
        state = state + times(mixed, "self_attn.o_proj")
        normed = self._norm(state, block["post_attention_layernorm"])
        inner = functional.silu(times(normed, "mlp.gate_proj")) * times(normed, "mlp.up_proj")
        return state + times(inner, "mlp.down_proj")

    def final_norm(self, state: torch.Tensor) -> torch.Tensor:
        """Return the output matrix's input, f32 (n, hidden_size), for states behind the last block."""
        return self._norm(state, self._load(FINAL_NORM))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return f32 (n, vocab_size) for final-normed states (n, hidden_size): give it chunks of positions.

        The head is loaded at the first call and kept until `drop_head`, since a comparison asks for
        many chunks: vocab_size x hidden_size x 4 bytes, 0.5 GB for a 6.7B model.
        """
        if self._head is None:
            self._head = self._load(EMBEDDING if self.config.tied_head else HEAD)
        with full_f32():
            return linear(hidden.to(self.device), self._head)

    def drop_head(self) -> None:
        """Free the head that `logits` keeps."""
        self._head = None

    def _load(self, name: str) -> torch.Tensor:
        return self.weights.load(name).to(self.device).float()

    def _norm(self, state: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        variance = state.square().mean(-1, keepdim=True)
        return gain * (state * torch.rsqrt(variance + self.config.rms_norm_eps))

    def _attention_residual(
        self, block: Block, state: torch.Tensor, lengths: Sequence[int], observe: Observe
    ) -> torch.Tensor:
        normed = self._norm(state, block["input_layernorm"])
        observe(ATTENTION_INPUT, normed, 0)
        mixed = self._attention(block, normed, lengths)
        observe(ATTENTION_MIXED, mixed, 0)
        return state + linear(mixed, block["self_attn.o_proj"])

    def _mlp_residual(self, block: Block, state: torch.Tensor, start: int, observe: Observe) -> torch.Tensor:
        normed = self._norm(state, block["post_attention_layernorm"])
        observe(MLP_INPUT, normed, start)
        inner = functional.silu(linear(normed, block["mlp.gate_proj"]))
        inner *= linear(normed, block["mlp.up_proj"])
        observe(MLP_INNER, inner, start)
        return state + linear(inner, block["mlp.down_proj"])

    def _attention(self, block: Block, normed: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return what o_proj multiplies, f32 (n, n_heads * head_dim)."""
        tables = rotary_tables(self.config, max(lengths), self.device)
        projected = (linear(normed, block[f"self_attn.{name}_proj"]) for name in "qkv")
        by_row = zip(*(torch.split(heads, list(lengths)) for heads in projected), strict=True)
        return torch.cat([self._mix(query, key, value, tables) for query, key, value in by_row])

    def _mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """Attend within one row: (n, heads * head_dim) of q, k and v to (n, n_heads * head_dim)."""
        config, n_tokens = self.config, query.shape[0]
        cos, sin = (table[:n_tokens] for table in tables)
        query, key, value = (
            heads.reshape(n_tokens, -1, config.head_dim).transpose(0, 1) for heads in (query, key, value)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = config.n_heads // config.n_kv_heads
        key, value = (heads.repeat_interleave(groups, dim=0) for heads in (key, value))
        mixed = functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[
            0
        ]
        return mixed.transpose(0, 1).reshape(n_tokens, -1)


def _unobserved(name: str, inputs: torch.Tensor, start: int) -> None:
    """Look at nothing."""


def rotary_tables(
    config: LlamaConfig, n_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, f32 (n_tokens, head_dim), of every position's rotation angles."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents) / config.rope_factor
    positions = torch.arange(n_tokens, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate f32 (n_heads, n_tokens, head_dim): element i pairs with element i + head_dim/2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def usable_device(name: str) -> torch.device:
    """Return the torch device of that name; raises UsageError if this machine has none such."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def full_f32() -> Iterator[None]:
    """Keep a GPU from rounding f32 products to TF32's ten bits, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
