"""A checkpoint's tokenizer, read from `tokenizer.json` alone and never through `AutoTokenizer`.

The file is run by the `tokenizers` library as it stands. Around it lies what that file leaves out: the
rule for BOS, the kind of each token, the rows of the embedding that no token uses.

Three things to know of byte-level BPE as DeepSeek Coder has it:

*   A token's text spells bytes: each of the 256 bytes is written as one printable character ("Ġ" is the
    space), so the 32,000 BPE tokens are byte strings in disguise.
*   Thirteen bytes never occur in UTF-8. The characters that would spell them ("õ", "ü", ...) are *added*
    tokens, 32000 to 32012: the letter "ü" in a text is cut out before BPE and becomes 32009. Such a token
    stands for its letter, not for the byte that the letter spells. `tokenizers` decodes it as the byte;
    `CheckpointTokenizer.decode` writes the letter.
*   The embedding has more rows than there are tokens (32,256 to 32,022). GGUF wants one distinct text per
    row: `[PAD32022]` and so on, of type UNUSED.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from converters.pretokenizers import KNOWN, recognise, steps_json
from converters.token_roles import EosRule, TokenRoles, find_roles, looks_special, read_files
from converters.tokenizer_checks import bpe_model, conflicts, refuse_damaged
from converters.vocabulary import TokenType, Vocabulary
from quantize.errors import TokenizerError

_NFC: Final = (
    "this tokenizer puts text into the normal form NFC, llama.cpp does not: other text gets other ids"
)


def _byte_spelling() -> dict[str, int]:
    """Map the character that spells a byte to the byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF_CHARACTER: Final = _byte_spelling()
_NEVER_IN_UTF8: Final = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


@dataclass(frozen=True, eq=False)
class CheckpointTokenizer:
    """Text to ids as at inference, ids to text, and the vocabulary that an export writes.

    `json_text` is the tokenizer.json it runs on, `n_tokens` counts the rows that have a token, `notes` is
    what the user should hear (a rule that was inferred, files that disagree). `generation` is the content of
    generation_config.json, {} where there is none (as in a GGUF).
    """

    vocabulary: Vocabulary
    n_tokens: int
    json_text: str
    notes: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written in it are taken as such.

        BOS is put first when `add_bos` and when it is the model's own rule (and likewise EOS last).
        """
        ids: list[int] = self.running.encode(text, add_special_tokens=False).ids
        v = self.vocabulary
        front = [v.bos_id] if add_bos and v.add_bos and v.bos_id is not None else []
        back = [v.eos_id] if add_bos and v.add_eos and v.eos_id is not None else []
        return [*front, *ids, *back]

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        """Return the text of `ids`, added tokens as they are written; bytes that are not UTF-8 become U+FFFD.

        `skip_control` leaves BOS, EOS and the other CONTROL tokens out. Raises IndexError for an id that is
        no row of the vocabulary.
        """
        kinds = self.vocabulary.token_types
        kept = (i for i in ids if not (skip_control and kinds[i] is TokenType.CONTROL))
        return b"".join(self._pieces[i] for i in kept).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the vocabulary, for reports: equal exactly when all fields are equal."""
        content = json.dumps(asdict(self.vocabulary), ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes of UTF-8 text that have no token, as in vocabularies cut down to the bytes of their corpus.

        `tokenizers` puts the unknown token there (or nothing), llama.cpp nothing: ids differ on such text.
        """
        rows = zip(self.vocabulary.tokens, self.vocabulary.token_types, strict=True)
        spelt = {BYTE_OF_CHARACTER.get(text) for text, kind in rows if kind is TokenType.NORMAL}
        return frozenset(range(256)) - _NEVER_IN_UTF8 - spelt

    def can_spell(self, text: str) -> bool:
        """Whether every byte of `text` has a token: False where `missing_bytes` are needed."""
        return self.missing_bytes.isdisjoint(text.encode("utf-8"))

    @cached_property
    def running(self) -> Tokenizer:
        """The `tokenizers` object; its own post-processor is not used, BOS is `encode`'s business."""
        return _load(self.json_text)

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        v = self.vocabulary
        return tuple(_piece(text, kind) for text, kind in zip(v.tokens, v.token_types, strict=True))


def _piece(text: str, kind: TokenType) -> bytes:
    """The bytes of a token: by the byte spelling for a BPE token, as written for an added one."""
    if kind is TokenType.NORMAL and all(character in BYTE_OF_CHARACTER for character in text):
        return bytes(BYTE_OF_CHARACTER[character] for character in text)
    return text.encode("utf-8")


def read_tokenizer(folder: Path, n_rows: int, *, eos: EosRule = "model") -> CheckpointTokenizer:
    """Read the tokenizer of a checkpoint folder for an embedding of `n_rows` rows.

    `eos="completion"` makes the end-of-sentence token the only one that stops generation, as the model's
    README advises for completing code with an instruct model. Raises TokenizerError with everything that
    is missing, damaged or not supported.
    """
    files = read_files(folder)
    refuse_damaged(files, folder)
    # The library aborts the process on some of what is refused here, so this comes before it.
    model = bpe_model(files.tokenizer, folder)
    _load(files.tokenizer_json)  # what the library takes has the form that is relied on from here on
    added = {token["content"]: token for token in files.tokenizer.get("added_tokens") or ()}
    pre = recognise(files.tokenizer.get("pre_tokenizer"), added)
    ids = dict(model["vocab"]) | {content: token["id"] for content, token in added.items()}
    roles = find_roles(files, ids, pre, eos)
    if reasons := [*conflicts(files, ids, pre, n_rows), *roles.reasons]:
        raise TokenizerError(f"the tokenizer in {folder} cannot be exported", reasons=reasons)
    tokens, types = _rows(ids, added, roles, n_rows)
    vocabulary = _vocabulary(tokens, types, _merges(model), pre, roles)
    notes = (
        roles.notes if not files.tokenizer.get("normalizer") or not KNOWN[pre].nfc else (*roles.notes, _NFC)
    )
    return _running(vocabulary, files.tokenizer_json, notes, files.generation_config)


def _vocabulary(
    tokens: tuple[str, ...],
    types: tuple[TokenType, ...],
    merges: tuple[str, ...],
    pre: str,
    roles: TokenRoles,
) -> Vocabulary:
    return Vocabulary(
        tokens=tokens,
        token_types=types,
        merges=merges,
        pre=pre,
        bos_id=roles.bos_id,
        eos_id=roles.eos_id,
        pad_id=roles.pad_id,
        add_bos=roles.add_bos,
        add_eos=roles.add_eos,
        fim_prefix=roles.fim[0],
        fim_suffix=roles.fim[1],
        fim_middle=roles.fim[2],
        chat_template=roles.chat_template,
        eot_id=roles.eot_id,
    )


def tokenizer_from_vocabulary(vocabulary: Vocabulary) -> CheckpointTokenizer:
    """Rebuild a running tokenizer from what a GGUF file says; it gives the ids of the original.

    The pre-tokenizer comes from its name, the added tokens from the token types. Raises TokenizerError for
    a pre-tokenizer that is not known.
    """
    steps = steps_json(vocabulary.pre)
    rule = KNOWN[vocabulary.pre]
    rows = list(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    used = {text: i for i, (text, kind) in enumerate(rows) if kind is not TokenType.UNUSED}
    content = {
        "version": "1.0",
        "added_tokens": [_added_token(i, *row) for i, row in enumerate(rows) if row[1] in _ADDED_TYPES],
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": steps,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": rule.ignore_merges,
            # Added tokens stand in the model's list too: only so do they keep ids below the last BPE token.
            "vocab": used,
            "merges": list(vocabulary.merges),
        },
    }
    return _running(vocabulary, json.dumps(content, ensure_ascii=False), (), {})


_ADDED_TYPES: Final = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def _added_token(token_id: int, text: str, kind: TokenType) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": kind is not TokenType.USER_DEFINED}


def _running(
    vocabulary: Vocabulary, json_text: str, notes: tuple[str, ...], generation: Mapping[str, Any]
) -> CheckpointTokenizer:
    """Start the tokenizer, and make sure that every added token got the id that the file says."""
    n_tokens = sum(1 for kind in vocabulary.token_types if kind is not TokenType.UNUSED)
    tokenizer = CheckpointTokenizer(vocabulary, n_tokens, json_text, notes, generation)
    running = tokenizer.running
    rows = enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    moved = [text for i, (text, kind) in rows if kind in _ADDED_TYPES and running.token_to_id(text) != i]
    if moved:
        raise TokenizerError(
            "tokenizer.json gives added tokens ids that the tokenizers library does not keep",
            reasons=[f"{text!r} becomes {running.token_to_id(text)}" for text in moved[:5]],
        )
    return tokenizer


def _load(json_text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json_text)
    # The library raises a bare Exception for everything that it cannot read.
    except Exception as error:
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _merges(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Merges as GGUF has them, "left right"; newer files list pairs."""
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])


def _rows(
    ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], roles: TokenRoles, n_rows: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """The text and the type of every row of the embedding; rows without a token are `[PAD<id>]`."""
    tokens = [f"[PAD{i}]" for i in range(n_rows)]
    types = [TokenType.UNUSED] * n_rows
    for text, i in ids.items():
        tokens[i] = text
        types[i] = _type(text, added.get(text), i in roles.fim)
    return tuple(tokens), tuple(types)


def _type(text: str, added: Mapping[str, Any] | None, marks_hole: bool) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    control = added.get("special") or marks_hole or looks_special(text)
    return TokenType.CONTROL if control else TokenType.USER_DEFINED
