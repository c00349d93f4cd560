"""The demo model's tokenizer: DeepSeek Coder's pipeline around a small vocabulary of its own.

Byte-level BPE over 243 of the 256 bytes. The other 13 never occur in UTF-8; the original lists the characters
that *spell* those bytes ("õ", "÷", ...) as added tokens, so that the letter "ü" in a text becomes one added
token instead of two byte tokens. That quirk, the order and the flags of every added token, and the chain of
regexes that cuts text before merging are kept exactly: converters have to recognise and reproduce them.

| ids         | tokens                                                                   |
|-------------|--------------------------------------------------------------------------|
| 0 - 242     | single bytes                                                             |
| 243 - 2199  | merges                                                                   |
| 2200 - 2212 | 13 byte-spelling characters                                              |
| 2213, 2214  | begin and end of sentence: the only two that are `special`               |
| 2215 - 2217 | fill-in-the-middle hole, begin, end                                      |
| 2218 - 2221 | `<pad>`, `<|User|>`, `<|Assistant|>`, `<|EOT|>`                          |
| 2222 - 2303 | rows without a token: the matrices are padded                            |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BPE_SIZE = 2200
BYTE_SPELLINGS = tuple("õ÷ÁýÀÿøúþüùöû")
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
END_OF_TURN = "<|EOT|>"
SPECIAL = (BEGIN, END)
FIM = (FIM_HOLE, FIM_BEGIN, FIM_END)
ADDED = (*BYTE_SPELLINGS, *SPECIAL, *FIM, "<pad>", "<|User|>", "<|Assistant|>", END_OF_TURN)

PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        *(
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+")
        ),
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@dataclass(frozen=True)
class SpecialIds:
    """The ids that rows of training are built with."""

    begin: int
    end: int
    fim_hole: int
    fim_begin: int
    fim_end: int


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the texts and return the finished tokenizer (it adds no token by itself)."""
    learner = Tokenizer(models.BPE())
    # Reading the pipeline from its JSON form keeps learning and the published file from ever differing.
    learner.pre_tokenizer = Tokenizer.from_str(json.dumps(_description({}, []))).pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(BYTE_SPELLINGS))
    trainer = trainers.BpeTrainer(vocab_size=BPE_SIZE, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    return Tokenizer.from_str(json.dumps(_description(learned["vocab"], learned["merges"])))


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as `tokenizer.json`, merges in the one-string form of the original file."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: int(entry[1])))
    return json.dumps(_description(vocab, model["merges"]), ensure_ascii=False, indent=1)


def token_id(tokenizer: Tokenizer, content: str) -> int:
    """Look up an added token, which the tokenizer must have."""
    found = tokenizer.token_to_id(content)
    if found is None:
        raise ValueError(f"the tokenizer has no token {content}")
    return found


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Look up the ids of the sentence and fill-in-the-middle tokens."""
    return SpecialIds(*(token_id(tokenizer, t) for t in (BEGIN, END, FIM_HOLE, FIM_BEGIN, FIM_END)))


def _description(vocab: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(len(vocab) + i, content) for i, content in enumerate(ADDED)],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        },
    }


def _added_token(index: int, content: str) -> dict[str, Any]:
    special = content in SPECIAL
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": content, **flags, "normalized": not special, "special": special}
