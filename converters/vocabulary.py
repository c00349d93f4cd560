"""What a file must say of its tokenizer, whatever the format.

A `Vocabulary` is complete and plain: the text of every row of the embedding (padding rows included), the
kind of each token, the merges, and the ids with a role. It is read from a checkpoint's `tokenizer.json`
or from a GGUF's metadata, and the proof compares the two field by field.
"""

from dataclasses import dataclass
from enum import IntEnum


class TokenType(IntEnum):
    """Kind of a token, numbered as GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary, padded to the rows of the embedding.

    `pre` is llama.cpp's name of the pre-tokenizer. An id is None where the checkpoint has no such token.
    `fim_prefix`, `fim_suffix`, `fim_middle` are the ids that come before the prefix, the suffix and the
    middle: begin, hole and end in DeepSeek Coder's words. `eot_id` is a second id that ends generation: the
    instruct models stop at `<|EOT|>` (eos) and must stop at the end of sentence (eot) as well.
    """

    tokens: tuple[str, ...]
    token_types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    pre: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None
    chat_template: str | None = None
    eot_id: int | None = None
