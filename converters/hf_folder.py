"""The small files of a quantized Hugging Face folder: everything but the tensors.

One folder is read by transformers 4 and 5, exllamav2, vLLM and llama.cpp's converter, and each looks for
the same fact in another place. Where they differ, the spelling that all of them read is written:

| fact        | written as                                     | because                                     |
|-------------|------------------------------------------------|---------------------------------------------|
| rope        | `rope_theta`, `rope_scaling: {type, factor}`   | exllamav2 knows no `rope_parameters`, and   |
|             | and no other spelling                          | stops where `type` meets `rope_type`        |
| number type | `torch_dtype`                                  | transformers 4 does not know `dtype`        |
| stop tokens | one in config.json, all in generation_config   | exllamav2 takes the first id of a config    |
| padding     | generation_config.json, tokenizer_config.json  | a `pad_token_id` in config.json keeps that  |
|             |                                                | row (EOS in base models) from being trained |
| tokenizer   | a general class, BOS in tokenizer.json         | see `converters.hf_tokenizer`               |

transformers 5 turns the rope back into `rope_parameters` with theta and factor in it. Nothing here depends
on the time, the machine or a path, so the same checkpoint gives the same bytes.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from converters.checkpoint import Checkpoint
from converters.config import ARCHITECTURE
from converters.disk import readable
from converters.hf_tokenizer import tokenizer_config, tokenizer_json
from converters.vocabulary import Vocabulary
from quantize.llama import LlamaConfig

# Of the checkpoint's generation_config.json: who wrote it, and that it was made up from config.json.
_BOOKKEEPING: Final = ("_from_model_config", "transformers_version")
_ROLES: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def folder_files(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], *, torch_dtype: str = "float16"
) -> dict[str, bytes]:
    """Return name -> content of every file of the folder that holds no tensors.

    `quantization` becomes `quantization_config` and, for GPTQ, quantize_config.json as well, where AutoGPTQ
    looks; `torch_dtype` is that of the tensors that are not quantized. Licence, notices and README travel
    along. Raises CheckpointError when one of those cannot be read.
    """
    vocabulary = checkpoint.tokenizer.vocabulary
    objects = {
        "config.json": model_config(checkpoint.config, vocabulary, quantization, torch_dtype),
        "generation_config.json": generation_config(checkpoint.tokenizer.generation, vocabulary),
        "tokenizer_config.json": tokenizer_config(vocabulary, checkpoint.config.context_length),
    }
    if quantization.get("quant_method") == "gptq":
        objects["quantize_config.json"] = dict(quantization)
    files = {name: _json(content) for name, content in objects.items()}
    files["tokenizer.json"] = tokenizer_json(checkpoint.tokenizer).encode()
    for path in checkpoint.provenance.travelling:
        with readable(path):
            files[path.name] = path.read_bytes()
    return dict(sorted(files.items()))


def hf_faults(checkpoint: Checkpoint) -> list[str]:
    """Return every reason why this checkpoint cannot become a Hugging Face folder, whatever its weights.

    A GGUF source is no reason: tokenizer.json is rebuilt from its vocabulary.
    """
    if checkpoint.tokenizer.vocabulary.eos_id is None:
        return ["the tokenizer names no EOS token; generation from the folder would never stop"]
    return []


def model_config(
    config: LlamaConfig, vocabulary: Vocabulary, quantization: Mapping[str, Any], torch_dtype: str
) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        **_present({"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "quantization_config": dict(quantization),
        "rms_norm_eps": config.rms_norm_eps,
        **_rope(config),
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": torch_dtype,
        "vocab_size": config.vocab_size,
    }


def generation_config(stated: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of generation_config.json: the checkpoint's settings, with the vocabulary's roles.

    Both ids that end generation are named, so an instruct model stops at its end of turn and at the end of
    sentence; `--eos completion` has left one.
    """
    stops = [i for i in (vocabulary.eos_id, vocabulary.eot_id) if i is not None]
    roles = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": vocabulary.pad_id,
    }
    settings = {key: value for key, value in stated.items() if key not in (*_BOOKKEEPING, *_ROLES)}
    return settings | _present(roles)


def _rope(config: LlamaConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope["rope_scaling"] = {"factor": config.rope_factor, "type": "linear"}
    return rope


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _json(content: Mapping[str, Any]) -> bytes:
    """As ASCII, which no reader's choice of an encoding can spoil."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")
