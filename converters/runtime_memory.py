"""What llama.cpp needs in memory beside a file's weights, for a context of a given length.

    KV cache    K and V of every layer: n_kv_heads * head_dim numbers a token, in the cache's type; llama.cpp
                rounds the context up to a multiple of 256
    buffers     activations of one batch of 512 tokens in f32: the logits with the states they are made of, or
                an MLP's three inner matrices with the states, whichever is larger; and the attention mask

The scores of attention are not in memory as long as it is flash attention, llama.cpp's default where the
device can.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.codecs import codec
from quantize.llama import LlamaConfig

CACHES: Mapping[str, str] = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Types of a cache by llama.cpp's names, and the quant types that they are."""
BATCH = 512
CONTEXT_STEP = 256


@dataclass(frozen=True)
class Runtime:
    """How a file will be run: tokens of context, type of the KV cache, bytes to leave to others."""

    context: int = 4096
    cache: str = "f16"
    reserve: int = 0


def cache_bytes(config: LlamaConfig, runtime: Runtime) -> int:
    """Return the size of the KV cache."""
    kind = codec(CACHES[runtime.cache])
    tokens = -(-runtime.context // CONTEXT_STEP) * CONTEXT_STEP
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim * tokens
    return numbers * kind.block_bytes // kind.block_size


def buffer_bytes(config: LlamaConfig, runtime: Runtime) -> int:
    """Return the size of the buffers for one batch."""
    head = config.vocab_size + config.hidden_size
    mlp = 3 * config.intermediate_size + 2 * config.hidden_size
    return 4 * BATCH * (max(head, mlp) + runtime.context)


def beside_weights(config: LlamaConfig, runtime: Runtime) -> int:
    """Return all that is not weights, what is reserved included."""
    return cache_bytes(config, runtime) + buffer_bytes(config, runtime) + runtime.reserve
