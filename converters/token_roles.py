"""The tokens with a role: which begins a text, which ends it, which fills, which mark the hole of an infill.

A checkpoint says this in up to six files, and they may disagree after a fine-tune. Who is believed:

| what        | first                        | then                                            |
|-------------|------------------------------|-------------------------------------------------|
| BOS, pad    | tokenizer_config.json        | special_tokens_map, generation_config, config   |
| EOS         | generation_config.json       | config, tokenizer_config, special_tokens_map    |
| adding BOS  | the class's own flag (Llama) | tokenizer.json's template; the DeepSeek family  |
| chat        | chat_template.jinja          | tokenizer_config.json                           |

EOS follows what generation really stops at. Where the files name several, the first becomes `eos`, the
next `eot` (a runtime stops at both), and a note says so.

Adding BOS has a trap: DeepSeek's `tokenizer.json` holds no template for it. The rule is `add_bos_token:
true` in tokenizer_config.json, which transformers 5 drops when it saves a tokenizer again. The model was
trained with BOS, so where that key is missing the family's rule still holds: BOS is added.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from converters.disk import readable
from quantize.errors import TokenizerError

EosRule = Literal["model", "completion"]

DEEPSEEK_BEGIN: Final = "<｜begin▁of▁sentence｜>"
DEEPSEEK_END: Final = "<｜end▁of▁sentence｜>"
# Before the prefix, before the suffix, before the middle.
FIM_TOKENS: Final = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
# These classes ignore tokenizer.json's template and add BOS by their own flag, which is on by default.
_LLAMA_CLASSES: Final = ("LlamaTokenizer", "CodeLlamaTokenizer")
_LOOKS_SPECIAL: Final = re.compile(r"<\|.+\|>|<｜.+｜>|<pad>", re.DOTALL)


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files of a tokenizer; `{}` for one that is absent. `template` is chat_template.jinja."""

    tokenizer_json: str
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None


@dataclass(frozen=True)
class TokenRoles:
    """Ids of the tokens with a role (None: there is no such token) and what the user should hear of them."""

    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    fim: tuple[int | None, int | None, int | None]
    chat_template: str | None
    notes: tuple[str, ...]
    reasons: tuple[str, ...]


def read_files(folder: Path) -> TokenizerFiles:
    """Read a checkpoint folder's tokenizer files; raises TokenizerError when tokenizer.json is missing.

    Raises CheckpointError for a file that is there and cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{folder} has no tokenizer.json",
            reasons=["it is the only form of a tokenizer that is read: no tokenizer.model, no vocab.json"],
            hint="Take tokenizer.json from the original model's repository.",
        )
    template = folder / "chat_template.jinja"
    return TokenizerFiles(
        tokenizer_json=_text(path),
        tokenizer=_object(path),
        tokenizer_config=_object(folder / "tokenizer_config.json"),
        special_tokens_map=_object(folder / "special_tokens_map.json"),
        generation_config=_object(folder / "generation_config.json"),
        config=_object(folder / "config.json"),
        template=_text(template) if template.is_file() else None,
    )


def looks_special(text: str) -> bool:
    """Whether a token's spelling marks it as one that steers the model rather than one that is text."""
    return _LOOKS_SPECIAL.fullmatch(text) is not None


def find_roles(files: TokenizerFiles, ids: Mapping[str, int], pre: str, eos: EosRule) -> TokenRoles:
    """Find every role. `ids` maps token texts to ids, `pre` is the pre-tokenizer's name.

    Raises TokenizerError for `eos="completion"` without an end-of-sentence token; everything that is
    wrong in the files is returned in `reasons`, so that the caller can report all of it at once.
    """
    names = _NamedIds(files, ids)
    add_bos, add_eos, bos_note = _adding_rule(files, pre)
    opening, closing = _template_tokens(files, names.reasons)
    bos_id = names.first("bos", ("tokenizer_config", "special_tokens_map", "generation_config", "config"))
    bos_id = ids.get(opening, bos_id) if opening and add_bos else bos_id
    eos_id, eot_id, eos_note = _stop_ids(names, ids, eos)
    if add_bos and bos_id is None:
        names.reasons.append("the tokenizer adds BOS, but no file names a BOS token")
    if closing and add_eos and ids.get(closing) != eos_id:
        names.reasons.append(f"tokenizer.json appends {closing!r}, which is not the EOS token (id {eos_id})")
    template, template_note = _chat_template(files)
    return TokenRoles(
        bos_id=bos_id,
        eos_id=eos_id,
        eot_id=eot_id,
        pad_id=names.first("pad", ("tokenizer_config", "special_tokens_map", "generation_config", "config")),
        add_bos=add_bos,
        add_eos=add_eos,
        fim=_fim_ids(ids),
        chat_template=template,
        notes=tuple(note for note in (bos_note, eos_note, template_note) if note),
        reasons=tuple(names.reasons),
    )


class _NamedIds:
    """Looks a role's ids up in each file, and collects what is wrong with them."""

    def __init__(self, files: TokenizerFiles, ids: Mapping[str, int]) -> None:
        self._files = files
        self._ids = ids
        self._n_tokens = max(ids.values()) + 1
        self.reasons: list[str] = []

    def first(self, role: str, files: tuple[str, ...]) -> int | None:
        """The first id that the files name for the role."""
        return next((token_id for file in files for token_id in self.of(role, file)), None)

    def of(self, role: str, file: str) -> list[int]:
        """The ids that one file names: by text (`eos_token`) or by number (`eos_token_id`, maybe a list)."""
        content = getattr(self._files, file)
        if file in ("tokenizer_config", "special_tokens_map"):
            return list(self._by_text(f"{file}.json: {role}_token", content.get(f"{role}_token")))
        value = content.get(f"{role}_token_id")
        values = value if isinstance(value, list) else [value]
        return list(self._by_number(f"{file}.json: {role}_token_id", [v for v in values if v is not None]))

    def _by_text(self, where: str, token: Any) -> Iterator[int]:
        text = token.get("content") if isinstance(token, dict) else token
        if not text:
            return
        if isinstance(text, str) and text in self._ids:
            yield self._ids[text]
        else:
            self._complain(f"{where} is {text!r}, which is not in tokenizer.json")

    def _by_number(self, where: str, values: list[Any]) -> Iterator[int]:
        for value in values:
            if isinstance(value, int) and 0 <= value < self._n_tokens:
                yield value
            # -1 is how several trainers write "none".
            elif value != -1:
                self._complain(f"{where} is {value!r}, but the tokenizer has {self._n_tokens} tokens")

    def _complain(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def _adding_rule(files: TokenizerFiles, pre: str) -> tuple[bool, bool, str]:
    """Whether BOS and EOS are added to a text, and a note when the rule is the family's."""
    config = files.tokenizer_config
    stated = config.get("add_bos_token")
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") in _LLAMA_CLASSES:
        return (True if stated is None else bool(stated)), bool(config.get("add_eos_token")), ""
    opening, closing = _template_tokens(files, [])
    if opening or closing:
        return bool(opening), bool(closing), ""
    if pre.startswith("deepseek-") and _adds_token(files, DEEPSEEK_BEGIN):
        note = (
            "tokenizer_config.json says nothing of add_bos_token; BOS is added, as the DeepSeek family does"
        )
        return (True, False, note) if stated is None else (bool(stated), False, "")
    return False, False, ""


def _adds_token(files: TokenizerFiles, text: str) -> bool:
    return any(token.get("content") == text for token in files.tokenizer.get("added_tokens") or ())


def _template_tokens(files: TokenizerFiles, reasons: list[str]) -> tuple[str, str]:
    """The tokens that tokenizer.json's post-processor puts before and after a text ("" for none)."""
    opening, closing = "", ""
    for processor in _processors(files.tokenizer.get("post_processor")):
        if processor.get("type") == "TemplateProcessing":
            # The text itself is the part without a token: "".
            parts = [part.get("SpecialToken", {}).get("id", "") for part in processor.get("single", ())] or [
                ""
            ]
            opening, closing = parts[0], parts[-1]
            if parts not in ([""], [opening, ""], ["", closing], [opening, "", closing]):
                reasons.append("tokenizer.json's template adds more than one token before or after a text")
        elif processor.get("type") != "ByteLevel":
            reasons.append(f"tokenizer.json's post-processor {processor.get('type')} is not supported")
    return opening, closing


def _processors(processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if processor is None:
        return []
    if processor.get("type") == "Sequence":
        return [inner for part in processor["processors"] for inner in _processors(part)]
    return [processor]


def _stop_ids(names: _NamedIds, ids: Mapping[str, int], eos: EosRule) -> tuple[int | None, int | None, str]:
    """eos, eot and a note. With `eos="completion"` the end of sentence is the only one."""
    if eos == "completion":
        if DEEPSEEK_END not in ids:
            raise TokenizerError(f"--eos completion needs a tokenizer with {DEEPSEEK_END}; this one has none")
        return ids[DEEPSEEK_END], None, ""
    files = ("generation_config", "config", "tokenizer_config", "special_tokens_map")
    named = {file: found for file in files if (found := names.of("eos", file))}
    order = [token_id for found in named.values() for token_id in found]
    if not order:
        names.reasons.append(f"no EOS token: neither {', '.join(f'{file}.json' for file in files)} names one")
        return None, None, ""
    # A list in generation_config.json has no order of rank; the tokenizer's own EOS leads if it is in it.
    spoken = next(iter(named.get("tokenizer_config", ())), None)
    leading = next(iter(named.values()))
    chosen = spoken if spoken in leading else leading[0]
    others = [i for i in dict.fromkeys(order) if i != chosen]
    note = _disagreement(named, chosen, others) if others else ""
    family = ids.get(DEEPSEEK_END, chosen)
    eot = others[0] if others else (family if family != chosen else None)
    return chosen, eot, note


def _disagreement(named: Mapping[str, list[int]], eos: int | None, others: list[int]) -> str:
    said = "; ".join(f"{file}.json says {', '.join(map(str, found))}" for file, found in named.items())
    dropped = f"; {', '.join(map(str, others[1:]))} cannot be written" if others[1:] else ""
    return f"several EOS ids: {said}. Generation stops at {eos} (eos) and {others[0]} (eot){dropped}"


def _fim_ids(ids: Mapping[str, int]) -> tuple[int | None, int | None, int | None]:
    for prefix, suffix, middle in FIM_TOKENS:
        if prefix in ids and suffix in ids and middle in ids:
            return ids[prefix], ids[suffix], ids[middle]
    return None, None, None


def _chat_template(files: TokenizerFiles) -> tuple[str | None, str]:
    """The template, byte for byte, and a note where two files hold different ones."""
    stated = files.tokenizer_config.get("chat_template")
    if isinstance(stated, list):
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    stated = stated if isinstance(stated, str) else None
    if files.template is None:
        return stated, ""
    differs = stated is not None and stated != files.template
    return (
        files.template,
        "chat_template.jinja differs from tokenizer_config.json and wins" if differs else "",
    )


def _text(path: Path) -> str:
    """The file's text with its line ends as they are."""
    with readable(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {error}") from None


def _object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
