"""The shape of the demo model: DeepSeek Coder's architecture, small enough to live in a repository.

Every awkward property of the full-size models is kept on purpose: a converter must survive each of them.

| property         | DeepSeek Coder                  | demo model                             |
|------------------|---------------------------------|----------------------------------------|
| rotary positions | theta 100000, linear factor 4   | the same                               |
| context          | 16384                           | the same                               |
| head matrix      | separate from the embedding     | the same                               |
| MLP width        | 5504 = 21.5 x 256 (1.3B)        | 640 = 2.5 x 256: no whole super-blocks |
| key/value heads  | 8 for 56 heads (33B)            | 2 for 4 heads                          |
| vocabulary rows  | 32256 for 32022 tokens          | 2304 for 2222 tokens                   |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Dimensions of the Llama decoder; the names are those of the Hugging Face configuration."""

    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 2304
    rope_theta: float = 100000.0
    rope_factor: float = 4.0
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


DEMO_SHAPE = Shape()
