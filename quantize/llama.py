"""The numbers that define a Llama model, and the tensors that such a model must have.

DeepSeek Coder is a Llama: RMSNorm, rotary positions with a *linear* scaling factor (positions are
divided by it), grouped-query attention, SwiGLU. Nothing but these figures tells two members of the
family apart, so they are one frozen record that every reader of a config fills in and every writer
writes out.
"""

import math
from dataclasses import dataclass

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
MOST_LAYERS = 1000
"""More than any Llama has: a config or a file that says more is damaged."""


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama model.

    `rope_factor` is the linear scaling factor (1.0: none, DeepSeek Coder: 4.0); `context_length` is in
    tokens; `tied_head` means that the output matrix is the embedding.
    """

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float = 1.0
    tied_head: bool = False

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor that the checkpoint must have, in the model's order."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.n_layers):
            shapes |= {block_tensor(layer, name): shape for name, shape in self.block_shapes().items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tied_head:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        return shapes

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name within the block -> shape for one decoder block."""
        q_rows, kv_rows = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def n_parameters(self) -> int:
        """Number of weights of the whole model."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def block_tensor(layer: int, name: str) -> str:
    """Return the checkpoint's name of a block's tensor: `block_tensor(3, "mlp.up_proj")`."""
    return f"model.layers.{layer}.{name}.weight"
