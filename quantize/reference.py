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

Rotary positions follow transformers' Llama: frequencies theta^(-2i/d), divided by the linear scaling
factor (which is the same as dividing the positions), rotation of the two halves of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional

from quantize.errors import UsageError
from quantize.llama import EMBEDDING, FINAL_NORM, HEAD, LlamaConfig, block_tensor
from quantize.weights import Weights

Block = dict[str, torch.Tensor]
OnBlock = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

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
            states = self._embed(rows)
            for layer in range(self.config.n_layers):
                block = self._load_block(layer)
                for index, state in enumerate(states):
                    states[index] = self._forward_block(block, state)
                if on_block is not None:
                    on_block(layer + 1, self.config.n_layers)
            gain = self._load(FINAL_NORM)
            return [self._norm(state, gain) for state in states]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return f32 (n, vocab_size) for final-normed states (n, hidden_size): give it chunks of positions.

        The head is loaded at the first call and kept until `drop_head`, since a comparison asks for
        many chunks: vocab_size x hidden_size x 4 bytes, 0.5 GB for a 6.7B model.
        """
        if self._head is None:
            self._head = self._load(EMBEDDING if self.config.tied_head else HEAD)
        with full_f32():
            return functional.linear(hidden.to(self.device), self._head)

    def drop_head(self) -> None:
        """Free the head that `logits` keeps."""
        self._head = None

    def _load(self, name: str) -> torch.Tensor:
        return self.weights.load(name).to(device=self.device, dtype=torch.float32)

    def _load_block(self, layer: int) -> Block:
        return {name: self._load(block_tensor(layer, name)) for name in self.config.block_shapes()}

    def _embed(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Only the rows in use are widened: the table itself is as large as several blocks.
        table = self.weights.load(EMBEDDING)
        return [table[row.cpu()].to(device=self.device, dtype=torch.float32) for row in rows]

    def _norm(self, state: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        variance = state.square().mean(-1, keepdim=True)
        return gain * (state * torch.rsqrt(variance + self.config.rms_norm_eps))

    def _forward_block(self, block: Block, state: torch.Tensor) -> torch.Tensor:
        state = state + self._attention(block, self._norm(state, block["input_layernorm"]))
        return torch.cat([self._mlp_residual(block, part) for part in torch.split(state, MLP_TOKENS)])

    def _mlp_residual(self, block: Block, state: torch.Tensor) -> torch.Tensor:
        normed = self._norm(state, block["post_attention_layernorm"])
        gate = functional.silu(functional.linear(normed, block["mlp.gate_proj"]))
        inner = gate * functional.linear(normed, block["mlp.up_proj"])
        return state + functional.linear(inner, block["mlp.down_proj"])

    def _attention(self, block: Block, normed: torch.Tensor) -> torch.Tensor:
        config, n_tokens = self.config, normed.shape[0]
        cos, sin = rotary_tables(config, n_tokens, self.device)
        query, key, value = (
            functional.linear(normed, block[f"self_attn.{name}_proj"])
            .view(n_tokens, -1, config.head_dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = config.n_heads // config.n_kv_heads
        key, value = (heads.repeat_interleave(groups, dim=0) for heads in (key, value))
        mixed = functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[
            0
        ]
        return functional.linear(mixed.transpose(0, 1).reshape(n_tokens, -1), block["self_attn.o_proj"])


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
