"""Writes the model's folder as the published checkpoints look; every file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import bpe
from .chat_template import CHAT_TEMPLATE
from .model import Llama
from .shape import Shape


def write_folder(folder: Path, model: Llama, shape: Shape, tokenizer: Tokenizer) -> None:
    """Write weights (bfloat16), configuration and tokenizer of the instruct variant into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: bpe.token_id(tokenizer, name) for name in (bpe.BEGIN, bpe.END, bpe.END_OF_TURN)}
    _write_text(folder / "tokenizer.json", bpe.tokenizer_json(tokenizer))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    _write_json(folder / "config.json", _config(shape, ids))
    _write_json(folder / "generation_config.json", _generation_config(ids))
    _write_weights(folder / "model.safetensors", model)


def _write_weights(path: Path, model: Llama) -> None:
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


def _config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": ids[bpe.BEGIN],
        "eos_token_id": ids[bpe.END_OF_TURN],
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": shape.initializer_range,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": {"factor": shape.rope_factor, "type": "linear"},
        "rope_theta": int(shape.rope_theta),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": ids[bpe.BEGIN],
        "eos_token_id": ids[bpe.END_OF_TURN],
        "pad_token_id": ids[bpe.END],
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _token(bpe.BEGIN),
        "clean_up_tokenization_spaces": False,
        "eos_token": _token(bpe.END_OF_TURN),
        "legacy": True,
        "model_max_length": shape.max_position_embeddings,
        "pad_token": _token(bpe.END),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def _token(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
