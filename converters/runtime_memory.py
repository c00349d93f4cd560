"""What llama.cpp needs in memory beside a file's weights, for a context of a given length.

    KV cache    K and V of every layer: n_kv_heads * head_dim numbers a token, in the cache's type; llama.cpp
                rounds the context up to a multiple of 256
    buffers     activations of a batch of 512 tokens in f32: logits behind five vectors of a token's
                state, or an MLP's three inner matrices and four of these, if that is more; and the attention
                mask in halves

Compared with what llama.cpp logs on a CPU, the cache is exact and the buffers an upper bound: 107.51 MiB for
107.51 (30 layers 768 wide, 49152 tokens, 4096 of context), 107.0 for 100.5 (the 6.7B's shape), 7.5 for 6.26
(the embedded model). GPUs were not compared. The scores of attention are not in memory as long as it is flash
attention, llama.cpp's default where the device can.

With `gpu_layers` (llama.cpp's --n-gpu-layers) only a part counts, what is on the card: the first layer of
them is the output matrix with its norm, the others are the last blocks, each with its share of the cache;
the embedding stays in main memory, and so do the blocks before (`llama-model.cpp: load_tensors`). The buffers
are counted whole, since the device with the output matrix has the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.codecs import codec
from quantize.llama import EMBEDDING, LlamaConfig

HALVES = "f16"
CACHES: Mapping[str, str] = {HALVES: "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Types of a cache by llama.cpp's names, and the quant types that they are."""
BATCH = 512
CONTEXT_STEP = 256


@dataclass(frozen=True)
class Runtime:
    """How a file will be run: tokens of context, type of the KV cache, bytes to leave to others.

    `cache` is a name of the runtime's own; None stands for halves, which each runtime takes by itself.
    `gpu_layers` are those on the card, of llama.cpp alone; None counts the whole file as there.
    """

    context: int = 4096
    cache: str | None = None
    reserve: int = 0
    gpu_layers: int | None = None


def blocks_on_card(config: LlamaConfig, runtime: Runtime) -> range:
    """Return the numbers of the decoder blocks that count."""
    if runtime.gpu_layers is None:
        return range(config.n_layers)
    return range(max(0, config.n_layers + 1 - runtime.gpu_layers), config.n_layers)


def on_card(config: LlamaConfig, runtime: Runtime, name: str) -> bool:
    """Return whether a tensor counts, by the checkpoint's name of it."""
    if runtime.gpu_layers is None:
        return True
    if name == EMBEDDING:
        return config.tied_head
    away = range(blocks_on_card(config, runtime).start)
    return not any(name.startswith(f"model.layers.{layer}.") for layer in away)


def cache_bytes(config: LlamaConfig, runtime: Runtime) -> int:
    """Return the size of the KV cache."""
    kind = codec(CACHES[runtime.cache or HALVES])
    tokens = -(-runtime.context // CONTEXT_STEP) * CONTEXT_STEP
    numbers = 2 * len(blocks_on_card(config, runtime)) * config.n_kv_heads * config.head_dim * tokens
    return numbers * kind.block_bytes // kind.block_size


def buffer_bytes(config: LlamaConfig, runtime: Runtime) -> int:
    """Return the size of the buffers for one batch, at the most."""
    head = config.vocab_size + 5 * config.hidden_size
    mlp = 3 * config.intermediate_size + 4 * config.hidden_size
    return BATCH * (4 * max(head, mlp) + 2 * runtime.context)


def beside_weights(config: LlamaConfig, runtime: Runtime) -> int:
    """Return all that is not weights, what is reserved included."""
    return cache_bytes(config, runtime) + buffer_bytes(config, runtime) + runtime.reserve
