"""A tokenizer's files for a Hugging Face folder, written so that every version of transformers obeys them.

DeepSeek Coder's own files name `LlamaTokenizerFast` and leave BOS to that class. Readers make of it:

    transformers 4               right: the class puts BOS before a text, by `add_bos_token`
    transformers 5.10, 5.15      the class replaces the byte-level pre-tokenizer by SentencePiece's Metaspace
                                 and says nothing: all spaces are lost ("int x;" becomes "intx;")
    transformers 5.0, 5.23       the class is replaced by the general one, and with it BOS is lost
    tokenizers alone             right but for BOS

So nothing is left to a class here. `tokenizer_class` is `PreTrainedTokenizerFast`, the general class that
runs tokenizer.json as it stands (transformers 5 knows it under its old name), and tokenizer.json itself
says that BOS is added: its post-processor gets a `TemplateProcessing`. `add_bos_token` repeats it for those
that look there.

The chat template stays in tokenizer_config.json, the one place that transformers 4 and 5 both read. It
writes BOS by itself: text that was rendered from it is to be tokenized with `add_special_tokens=False`, as
`apply_chat_template(tokenize=True)` and the chat servers do; with `True` BOS would be there twice.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import Vocabulary

TOKENIZER_CLASS: Final = "PreTrainedTokenizerFast"


def tokenizer_json(tokenizer: CheckpointTokenizer) -> str:
    """Return the content of tokenizer.json: the checkpoint's own, with the rule for BOS and EOS in it."""
    content = json.loads(tokenizer.json_text)
    content["post_processor"] = _post_processor(content.get("post_processor"), tokenizer.vocabulary)
    return json.dumps(content, ensure_ascii=False)


def tokenizer_config(vocabulary: Vocabulary, context_length: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; roles without a token are left out."""
    config: dict[str, Any] = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": TOKENIZER_CLASS,
    }
    roles = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    config |= {f"{role}_token": vocabulary.tokens[i] for role, i in roles.items() if i is not None}
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config


def _post_processor(stated: Mapping[str, Any] | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What ran after BPE, its template replaced by the vocabulary's rule: BOS text EOS."""
    processors = [*_without_templates(stated), *_template(vocabulary)]
    if len(processors) < 2:
        return next(iter(processors), None)
    return {"type": "Sequence", "processors": processors}


def _without_templates(processor: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None or processor.get("type") == "TemplateProcessing":
        return []
    if processor.get("type") == "Sequence":
        return [inner for part in processor["processors"] for inner in _without_templates(part)]
    return [dict(processor)]


def _template(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return the template, or nothing where no token is added. Each text of a pair gets its own."""
    front = vocabulary.bos_id if vocabulary.add_bos else None
    back = vocabulary.eos_id if vocabulary.add_eos else None
    used = {vocabulary.tokens[i]: i for i in (front, back) if i is not None}
    if not used:
        return []

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        parts = [("SpecialToken", front), ("Sequence", text), ("SpecialToken", back)]
        named = ((kind, vocabulary.tokens[i] if isinstance(i, int) else i) for kind, i in parts)
        return [{kind: {"id": name, "type_id": type_id}} for kind, name in named if name is not None]

    tokens = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in used.items()}
    single, pair = around("A", 0), [*around("A", 0), *around("B", 1)]
    return [{"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}]
