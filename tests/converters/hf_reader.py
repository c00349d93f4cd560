"""A program: what the transformers of this interpreter makes of a folder. Must run without dscq.

Reads {"folders": [...], "texts": [...], "messages": [...]} from the standard input, writes one record per
folder to the standard output.
"""

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

POSITIONS = (0, 1, 100, 4097)


def read(folder: str, texts: list[str], messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return ids, chat, rope and roles as a user of `from_pretrained` gets them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    rotary = LlamaRotaryEmbedding(config=config)
    cos, sin = rotary(torch.zeros(1, 1), torch.tensor([POSITIONS]))
    generation = GenerationConfig.from_pretrained(folder)
    return {
        "version": transformers.__version__,
        "kind": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "plain_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "pair": tokenizer("a", "b")["input_ids"],
        "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": None if tokenizer.chat_template is None else chat(tokenizer, messages),
        "cos": cos[0].tolist(),
        "sin": sin[0].tolist(),
        "config": {key: value for key, value in config.to_dict().items() if isinstance(value, int | float)},
        "dtype": str(config.torch_dtype if transformers.__version__ < "5" else config.dtype),
        "eos": generation.eos_token_id,
        "sampling": generation.temperature,
    }


def chat(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return a conversation's ids, its text and the ids of that text."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {
        "ids": ids if isinstance(ids, list) else ids["input_ids"],
        "text": text,
        "text_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
        "text_ids_with_bos": tokenizer(text)["input_ids"],
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answers = [read(folder, asked["texts"], asked["messages"]) for folder in asked["folders"]]
    json.dump(answers, sys.stdout)
