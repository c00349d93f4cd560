"""What a GGUF's metadata says of a model, read as llama.cpp reads it.

Two keys decide whether a DeepSeek Coder file works beyond a few tokens, and a file without them loads
everywhere without a word: `llama.rope.freq_base` (absent: 10000) and `llama.rope.scaling.factor`
(absent: 1, every position four times too far). Two more decide what the model is fed:
`tokenizer.ggml.add_bos_token` (absent: false for BPE) and `tokenizer.ggml.pre`. So absent keys get the
runtime's defaults here, right or wrong: the proof must see what the runtime will see.

`targets/gguf_fields.py` writes what is read here.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.vocabulary import TokenType, Vocabulary
from quantize.errors import CheckpointError, TokenizerError
from quantize.llama import MOST_LAYERS, LlamaConfig

TOKENS = "tokenizer.ggml.tokens"
_COUNTS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "feed_forward_length",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)
_EPSILON = "attention.layer_norm_rms_epsilon"
_SINGLES = (_EPSILON, "rope.freq_base", "rope.scaling.factor", "rope.scale_linear")
_REQUIRED = (*_COUNTS[:4], _EPSILON)
_ROLE = re.compile(r"tokenizer\.ggml\.\w+_token_id")
_DEFAULTED = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
_LISTS = {
    TOKENS: (str, "strings"),
    "tokenizer.ggml.merges": (str, "strings"),
    "tokenizer.ggml.token_type": (int, "whole numbers"),
}
_SETTINGS = {
    "tokenizer.ggml.add_bos_token": (bool, "true or false"),
    "tokenizer.ggml.add_eos_token": (bool, "true or false"),
    "tokenizer.ggml.pre": (str, "a string"),
    "tokenizer.chat_template": (str, "a string"),
}
_BPE_DEFAULT_ID = 11  # llama.cpp's bos and eos of a BPE vocabulary that states none
# Our field -> the key's middle today, the middle that older files have, the text that llama.cpp looks for.
_FIM = {
    "fim_prefix": ("fim_pre", "prefix", "<｜fim▁begin｜>"),
    "fim_suffix": ("fim_suf", "suffix", "<｜fim▁hole｜>"),
    "fim_middle": ("fim_mid", "middle", "<｜fim▁end｜>"),
}


def read_llama_config(metadata: Mapping[str, Any], *, tied_head: bool) -> LlamaConfig:
    """Return the model's figures from the `llama.*` fields, with llama.cpp's defaults for absent ones.

    Raises CheckpointError with every reason: another architecture, an absent or ill-typed field, a
    rope scaling other than linear.
    """
    if reasons := _config_faults(metadata):
        raise CheckpointError("the metadata is not that of a supported Llama", reasons=reasons)
    hidden, n_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", hidden // n_heads)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=metadata.get("llama.feed_forward_length", 0),
        n_layers=metadata["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=len(metadata[TOKENS]),
        context_length=metadata["llama.context_length"],
        rms_norm_eps=_decimal(metadata[f"llama.{_EPSILON}"]),
        rope_theta=_decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        rope_factor=_rope_factor(metadata),
        tied_head=tied_head,
    )


def _rope_factor(metadata: Mapping[str, Any]) -> float:
    if metadata.get("llama.rope.scaling.type") == "none":
        return 1.0
    old = metadata.get("llama.rope.scale_linear", 1.0)
    return _decimal(metadata.get("llama.rope.scaling.factor", old)) or 1.0


def _decimal(single: float) -> float:
    """Return the shortest decimal that means this float32: 1e-06, not 9.99999997e-07."""
    return float(str(np.float32(single)))


def _config_faults(metadata: Mapping[str, Any]) -> list[str]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        return [f"general.architecture is {architecture!r}, expected 'llama'"]
    required = [f"llama.{key}" for key in _REQUIRED] + [TOKENS]
    faults = [f"{key} is missing" for key in required if key not in metadata]
    counts = {f"llama.{key}": _count_fault(metadata.get(f"llama.{key}", 1)) for key in _COUNTS}
    faults += [f"{key} {fault}" for key, fault in counts.items() if fault]
    layers = metadata.get("llama.block_count")
    if type(layers) is int and layers > MOST_LAYERS:
        faults.append(f"llama.block_count is {layers}, expected at most {MOST_LAYERS}")
    for key in _SINGLES:
        if not isinstance(value := metadata.get(f"llama.{key}", 1.0), float) or not math.isfinite(value):
            faults.append(f"llama.{key} is {value!r}, expected a float32")
    scaling = metadata.get("llama.rope.scaling.type", "linear")
    if scaling not in ("linear", "none"):
        faults.append(f"llama.rope.scaling.type is {scaling!r}; 'linear' and 'none' are supported")
    if not isinstance(metadata.get(TOKENS, []), list):
        faults.append(f"{TOKENS} is no array")
    return faults or _head_faults(metadata)


def _count_fault(value: object) -> str:
    if isinstance(value, list):
        return "differs from layer to layer, which no Llama does"
    return "" if type(value) is int and value > 0 else f"is {value!r}, expected a positive whole number"


def _head_faults(metadata: Mapping[str, Any]) -> list[str]:
    hidden, n_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", hidden // n_heads)
    dimensions = {
        key: metadata.get(f"llama.{key}", head_dim)
        for key in ("attention.value_length", "rope.dimension_count")
    }
    return [
        f"llama.{key} is {value}, expected the {head_dim} of a head"
        for key, value in dimensions.items()
        if value != head_dim
    ]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary of the `tokenizer.*` fields, with llama.cpp's defaults for absent ones.

    Raises TokenizerError for a tokenizer other than byte-level BPE, or one without tokens or merges.
    """
    model = metadata.get("tokenizer.ggml.model")
    absent = [key for key in (TOKENS, "tokenizer.ggml.merges") if key not in metadata]
    if model != "gpt2" or absent:
        reasons = [f"{key} is missing" for key in absent]
        raise TokenizerError(f"tokenizer.ggml.model is {model!r}, expected 'gpt2' (BPE)", reasons=reasons)
    if faults := _ill_typed(metadata):
        raise TokenizerError("the tokenizer's metadata is damaged", reasons=faults)
    tokens = tuple(metadata[TOKENS])
    types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens) or (unknown := set(types) - set(TokenType)):
        fault = f"unknown numbers {sorted(unknown)}" if len(types) == len(tokens) else f"{len(types)} entries"
        raise TokenizerError(f"tokenizer.ggml.token_type has {fault} for {len(tokens)} tokens")
    return Vocabulary(
        tokens=tokens,
        token_types=tuple(TokenType(number) for number in types),
        merges=tuple(metadata["tokenizer.ggml.merges"]),
        pre=metadata.get("tokenizer.ggml.pre", "default"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", _BPE_DEFAULT_ID),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id", _BPE_DEFAULT_ID),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", False),
        add_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        eot_id=metadata.get("tokenizer.ggml.eot_token_id"),
        **{field: _fim_id(metadata, tokens, *names) for field, names in _FIM.items()},
    )


def _ill_typed(metadata: Mapping[str, Any]) -> list[str]:
    """Say which fields of the tokenizer are not of their type, or name a token that there is none of."""
    faults = []
    for key, (kind, items) in _LISTS.items():
        value = metadata.get(key, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            faults.append(f"{key} is no array of {items}")
    for key, (kind, expected) in _SETTINGS.items():
        if key in metadata and type(metadata[key]) is not kind:
            faults.append(f"{key} is {metadata[key]!r}, expected {expected}")
    return faults + _role_faults(metadata)


def _role_faults(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata[TOKENS]
    if not isinstance(tokens, list):
        return []
    roles = dict.fromkeys(_DEFAULTED, _BPE_DEFAULT_ID) | {
        k: v for k, v in metadata.items() if _ROLE.fullmatch(k)
    }
    return [
        f"{key} is {value!r}{'' if key in metadata else ' by default'}, "
        f"expected the number of one of {len(tokens)} tokens"
        for key, value in roles.items()
        if type(value) is not int or not 0 <= value < len(tokens)
    ]


def _fim_id(
    metadata: Mapping[str, Any], tokens: tuple[str, ...], key: str, old: str, text: str
) -> int | None:
    by_text = tokens.index(text) if text in tokens else None
    by_old_key = metadata.get(f"tokenizer.ggml.{old}_token_id", by_text)
    found: int | None = metadata.get(f"tokenizer.ggml.{key}_token_id", by_old_key)
    return found
