"""`config.json` of a Llama checkpoint -> `LlamaConfig`.

A Llama's files all look alike, and the dangerous differences hide in the config: a wrong rope factor or
theta loads everywhere without a word and ruins the model. So nothing is guessed here. What the file
says in two places must agree, what it does not say and cannot be defaulted safely is missing, what the
reference forward does not compute is refused; and all of it is reported in one go.

Rope scaling lives in `converters.rope`, because it alone has three spellings.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.rope import read_rope
from quantize.errors import CheckpointError
from quantize.llama import MOST_LAYERS, LlamaConfig

ARCHITECTURE = "LlamaForCausalLM"

# Keys that every writer of a Llama config writes; a silent default for any of them could be wrong.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
_LARGEST_SIZE = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises CheckpointError naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_config(config: Mapping[str, Any], *, quantized: bool = False) -> LlamaConfig:
    """Return the record of a Llama from the content of its `config.json`.

    `context_length` is `max_position_embeddings`, the trained length (the tokenizer's `model_max_length`
    is a note for users and often wrong). Keys that transformers defaults without danger are optional:
    `num_key_value_heads` (as many as heads), `head_dim` (hidden size / heads), `rope_theta` (10000),
    `tie_word_embeddings` (false). With `quantized` a `quantization_config` is no reason against it: whoever
    asks has read that.
    Raises CheckpointError with every reason why the model is not supported.
    """
    rope, rope_reasons = read_rope(config)
    reasons = [
        *_kind_reasons(config, quantized),
        *_size_reasons(config),
        *_tying_reasons(config),
        *rope_reasons,
    ]
    if not reasons:
        reasons = list(_head_reasons(config))
    if reasons:
        raise CheckpointError("config.json describes a model that is not supported", reasons=reasons)
    heads = config["num_attention_heads"]
    return LlamaConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=_optional(config, "num_key_value_heads", heads),
        head_dim=_optional(config, "head_dim", config["hidden_size"] // heads),
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope.theta,
        rope_factor=rope.factor,
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _optional(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else int(value)


def _kind_reasons(config: Mapping[str, Any], quantized: bool) -> Iterator[str]:
    """Yield what makes the model another one than the plain Llama."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if not architectures and model_type != "llama":
        yield f"architectures: missing, and model_type is {model_type!r}; supported: ['{ARCHITECTURE}']"
    elif architectures and architectures != [ARCHITECTURE]:
        yield f"architectures: found {architectures}; supported: ['{ARCHITECTURE}']"
    elif model_type not in (None, "llama"):
        yield f"model_type: found {model_type!r}; supported: 'llama'"
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        yield f"hidden_act: found {activation!r}; supported: 'silu'"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key}: found {config[key]!r}; supported: false (matrices without bias)"
    yield from _foreign_reasons(config, quantized)


def _foreign_reasons(config: Mapping[str, Any], quantized: bool) -> Iterator[str]:
    quantization = config.get("quantization_config")
    if quantization and not quantized:
        method = (
            quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        )
        yield (
            f"quantization_config: the weights are quantized already (method: {method}); "
            "supported: the original bf16, f16 or f32 weights"
        )
    remote = config.get("auto_map")
    code = remote.get("AutoModelForCausalLM") if isinstance(remote, dict) else None
    if code:
        yield f"auto_map: the model is defined by code of its own ({code}), which is never run"


def _size_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _SIZES:
        if config.get(key) is None:
            yield f"{key}: missing"
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(key)
        if value is not None and (type(value) is not int or value <= 0):
            yield f"{key}: found {value!r}; expected a positive integer"
        elif key == "num_hidden_layers" and value is not None and value > MOST_LAYERS:
            # A table of so many tensors' names would be made before anybody saw that they are not there.
            yield f"{key}: found {value}; expected at most {MOST_LAYERS}"
        elif value is not None and value > _LARGEST_SIZE:
            yield f"{key}: found {value}; expected at most {_LARGEST_SIZE}"
    epsilon = config.get("rms_norm_eps")
    if epsilon is None:
        yield "rms_norm_eps: missing"
    elif type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        yield f"rms_norm_eps: found {epsilon!r}; expected a small positive number"


def _tying_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    tied = config.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        yield f"tie_word_embeddings: found {tied!r}; expected true or false"


def _head_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between sizes that are each right by themselves."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = _optional(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        yield f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
    if config.get("head_dim") is None and hidden % heads:
        yield f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), and no head_dim"
    elif _optional(config, "head_dim", hidden // heads) % 2:
        yield "head_dim is odd; rotary positions turn pairs of dimensions"
