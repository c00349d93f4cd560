"""What ExLlamaV2 needs on a card beside the linears of the decoder blocks, for a context of a given length.

Read off the sources of 0.3.2 for one card, one sequence, its defaults, and attention without flash-attn, the
kind that needs most; nothing of it was measured on a GPU. T is the context, n the 2048 tokens of a prompt
that go through the model at once (`config.py: max_input_len`).

    KV cache      K and V of every layer: n_kv_heads * head_dim numbers a token; quantized, a scale in halves
                  for every 32, and one layer more in halves, all T tokens of it; a page of 256 tokens for
                  tidying up. T is a multiple of 256 (`cache.py`, `generator/dynamic.py`)
    scratch       once for all modules, the largest: an MLP's state, two inner states and largest linear, in
                  halves; an attention's state and linear; the head in halves; of a linear at most 2^29
                  weights at once (`scratch_space_fixed` of `mlp.py`, `attn.py`, `linear.py`)
    activations   the state, with the larger of two: an attention's q, k, v and, twice, its output, its scores
                  twice (all heads, at most 2048^2 each, `attn.py: temp_attn_size`), the mask, and, where
                  heads share keys, K and V repeated for every head (`temp_kv_size`); or the normed state and
                  the logits of n tokens
    tables        sines and cosines of all positions (`device.py: prepare_sincos`); the map of groups, 4 bytes
                  for each input of each linear (`ext.py: make_q_matrix`)
    allocator     2 MiB for each linear: PyTorch rounds what has 10 MiB or more up to that (kRoundLarge of
                  c10's `AllocatorConfig.h`)

Not here: the embedding, which ExLlamaV2 keeps in main memory and looks up there (`model.py:
set_device_map`); CUDA's own memory and cuBLAS's workspace; the ends of the blocks of 20 MiB in which PyTorch
places tensors of 1 to 10 MiB. What is to be left to them is the user's `--reserve`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from converters.exl2_measurement import decoder_linears
from converters.runtime_memory import Runtime
from quantize.llama import HEAD, LlamaConfig

PAGE = 256
"""Tokens of a page of the cache, of which its length is a multiple."""
CHUNK = 2048
MOST_DEQUANTIZED = 512 << 20
"""Weights of a linear that are turned into halves at once."""
SCORES = 2048**2
"""Attention scores of a head at once (`max_attention_size`)."""
SCALED = 32
"""Numbers of a quantized cache that share a scale."""
ROUNDING = 2 << 20
_HALF = 2


@dataclass(frozen=True)
class CacheType:
    """Bits of a number of K and of V in the cache; below 16 they are codes with scales."""

    key_bits: int
    value_bits: int

    @property
    def quantized(self) -> bool:
        """Whether numbers are codes."""
        return self.key_bits < 16


HALVES = "fp16"
CACHES: Mapping[str, CacheType] = {
    HALVES: CacheType(16, 16),
    "q8": CacheType(8, 8),
    "q6": CacheType(8, 4),
    "q4": CacheType(4, 4),
}
"""Types of a cache by ExLlamaV2's names."""


def cache_type(runtime: Runtime) -> CacheType:
    """Return the type of the KV cache: halves unless another was chosen."""
    return CACHES[runtime.cache or HALVES]


def context(runtime: Runtime) -> int:
    """Return the tokens that the cache is made for: whole pages."""
    return runtime.context + -runtime.context % PAGE


def cache_bytes(config: LlamaConfig, runtime: Runtime) -> int:
    """Return the size of the KV cache, with what it needs to work."""
    kind, numbers = cache_type(runtime), config.n_kv_heads * config.head_dim
    token = numbers * (kind.key_bits + kind.value_bits) // 8
    if kind.quantized:
        token += 2 * _HALF * (config.n_kv_heads * (config.head_dim // SCALED))
    in_halves = 2 * _HALF * numbers * context(runtime) if kind.quantized else 0
    return token * (config.n_layers * context(runtime) + PAGE) + in_halves


def cache_faults(config: LlamaConfig, runtime: Runtime) -> list[str]:
    """Return why the model cannot have this cache."""
    if not cache_type(runtime).quantized or config.head_dim % SCALED == 0:
        return []
    fault = f"a {runtime.cache} cache has a scale for {SCALED} numbers, the heads have {config.head_dim}"
    return [f"--cache {runtime.cache}: {fault}"]


def overhead(config: LlamaConfig, runtime: Runtime) -> dict[str, int]:
    """Return the bytes of all else by what they are for, at the most: see the module's table."""
    linears = {**decoder_linears(config), HEAD: (config.vocab_size, config.hidden_size)}
    angles = 2 * _HALF * config.head_dim * max(context(runtime), config.context_length)
    return {
        "scratch": scratch_bytes(config),
        "activations": _activations(config, context(runtime)),
        "tables": angles + 4 * sum(n_inputs for _, n_inputs in linears.values()),
        "allocator": ROUNDING * len(linears),
    }


def _padded(n_outputs: int) -> int:
    return n_outputs + -n_outputs % 32


def scratch_bytes(config: LlamaConfig) -> int:
    """Return the size of the memory that all modules use in turn."""
    hidden, inner, mixed = config.hidden_size, config.intermediate_size, config.n_heads * config.head_dim

    def in_halves(n_outputs: int, n_inputs: int) -> int:
        return _HALF * min(_padded(n_outputs) * n_inputs, MOST_DEQUANTIZED)

    def states(*widths: int) -> int:
        return sum(_HALF * CHUNK * width + 128 for width in widths)

    blocks = config.block_shapes()
    attention, mlp = (
        max(in_halves(*shape) for name, shape in blocks.items() if name.startswith(module))
        for module in ("self_attn.", "mlp.")
    )
    return max(
        states(max(mixed, hidden)) + attention,
        states(hidden, max(hidden, inner), max(hidden, inner)) + mlp,
        in_halves(config.vocab_size, hidden),
    )


def _activations(config: LlamaConfig, n_tokens: int) -> int:
    """Return the tensors that are there at once at the worst place, for a chunk of a prompt."""
    mixed, shared = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    scores = min(SCORES, n_tokens**2)
    attention = CHUNK * (3 * mixed + 2 * shared) + 2 * config.n_heads * scores + scores
    if config.n_heads != config.n_kv_heads:
        attention += 2 * mixed * n_tokens
    head = CHUNK * (config.hidden_size + _padded(config.vocab_size))
    return _HALF * (CHUNK * config.hidden_size + max(attention, head))


def norm_bytes(config: LlamaConfig) -> int:
    """Return the size of the norms' gains, in halves."""
    return _HALF * sum(math.prod(shape) for shape in config.tensor_shapes().values() if len(shape) == 1)
