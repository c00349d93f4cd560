r"""Which pre-tokenizer a `tokenizer.json` has, found by its structure and never by a model's name.

Byte-level BPE merges only inside the pieces that a pre-tokenizer cuts. GGUF stores no regexes: it stores
the *name* of a cutting rule that the runtime has compiled in (`tokenizer.ggml.pre`). A wrong name loads
without a word and gives other ids for digits, Chinese or white space. So the steps in `tokenizer.json` are
spelt out one line each and must equal one of these, line for line:

| name            | steps before the byte map                                               |
|-----------------|-------------------------------------------------------------------------|
| deepseek-coder  | line ends, `\s?\p{L}+`, `\s?\p{P}+`, CJK runs, digits one by one         |
| deepseek-llm    | line ends, cased letters, punctuation, trailing space, CJK runs, digits  |
| gpt-2           | the regex built into `ByteLevel`                                        |
| llama-bpe       | one regex, up to three digits together; whole pieces skip the merges    |
| qwen2           | the same regex with single digits; text is first normalised to NFC      |
| smollm          | digits one by one, then the regex built into `ByteLevel`                |
| starcoder       | the same steps as smollm; told apart by its fill-in-the-middle tokens   |

The way back, `steps_json`, rebuilds the JSON for a tokenizer that is read from a GGUF file.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantize.errors import TokenizerError

Json = Mapping[str, Any]

# Letters with case, as ranges of code points: the long character class of DeepSeek LLM.
_CASED: Final = """41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D
1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107
210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184
2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06
FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
1E900-1E943"""
_CASED_CLASS: Final = "".join(
    "-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED.split()
)
_CJK: Final = "[一-龥ࠀ-一가-퟿]+"
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS: Final = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class PreTokenizer:
    """A cutting rule that llama.cpp knows by `name`.

    `ignore_merges`: a piece that is a token as a whole is taken without merging. `nfc`: the family normalises
    text to NFC before cutting. `telling`: an added token that tells two families with equal steps apart.
    """

    name: str
    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    nfc: bool = False
    telling: str = ""


KNOWN: Final[Mapping[str, PreTokenizer]] = {
    known.name: known
    for known in (
        PreTokenizer(
            "deepseek-coder",
            (
                *(_split(regex) for regex in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)),
                _DIGITS,
                _byte_level(False),
            ),
        ),
        PreTokenizer(
            "deepseek-llm",
            (
                *(_split(regex) for regex in ("[\r\n]", rf"\s?[{_CASED_CLASS}]+")),
                *(_split(regex) for regex in (r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK)),
                _DIGITS,
                _byte_level(False),
            ),
        ),
        PreTokenizer("gpt-2", (_byte_level(True),)),
        PreTokenizer(
            "llama-bpe",
            (_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _byte_level(False)),
            ignore_merges=True,
        ),
        PreTokenizer(
            "qwen2", (_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _byte_level(False)), nfc=True
        ),
        PreTokenizer("starcoder", (_DIGITS, _byte_level(True)), telling="<fim_prefix>"),
        PreTokenizer("smollm", (_DIGITS, _byte_level(True))),
    )
}


def recognise(pre_tokenizer: Json | None, added: Collection[str] = ()) -> str:
    """Return llama.cpp's name of the pre-tokenizer, given `tokenizer.json`'s `pre_tokenizer` object.

    `added` are the texts of the added tokens; they only decide between families with equal steps. Raises
    TokenizerError when no known structure is equal, with what was found and how the nearest one differs.
    """
    found = describe(pre_tokenizer)
    for known in KNOWN.values():
        if found == _lines(known.steps) and (not known.telling or known.telling in added):
            return known.name
    raise _not_recognised(found)


def steps_json(name: str) -> dict[str, Any]:
    """Return the `pre_tokenizer` object of `tokenizer.json` that llama.cpp's `name` stands for.

    Raises TokenizerError for a name that is not in the table; the message lists the known ones.
    """
    if name not in KNOWN:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}, which is not one of those that are supported",
            reasons=[f"known: {', '.join(sorted(KNOWN))}"],
        )
    return {"type": "Sequence", "pretokenizers": [dict(step) for step in KNOWN[name].steps]}


def describe(pre_tokenizer: Json | None) -> list[str]:
    """Spell a `pre_tokenizer` object out, one line per step; nested sequences are flattened."""
    return _lines(_flatten(pre_tokenizer))


def _flatten(step: Any) -> tuple[Json, ...]:
    if not isinstance(step, Mapping):
        return ()
    if step.get("type") != "Sequence":
        return (step,)
    parts = step.get("pretokenizers")
    return tuple(inner for part in parts for inner in _flatten(part)) if isinstance(parts, list) else ()


def _lines(steps: tuple[Json, ...]) -> list[str]:
    return [_line(step) for step in steps]


def _line(step: Json) -> str:
    """One step in words. Only what changes the pieces is said: `trim_offsets` moves offsets, not cuts."""
    kind = step.get("type")
    if kind == "Split":
        inverted = ", inverted" if step.get("invert") else ""
        return f"Split {step.get('pattern')!r} {step.get('behavior')}{inverted}"
    if kind == "Digits":
        return "Digits one by one" if step.get("individual_digits") else "Digits in runs"
    if kind == "ByteLevel":
        prefix = ", a space put in front" if step.get("add_prefix_space", True) else ""
        return f"ByteLevel {'with' if step.get('use_regex', True) else 'without'} its regex{prefix}"
    settings = ", ".join(f"{key}={value!r}" for key, value in step.items() if key != "type")
    return f"{kind} {settings}".rstrip()


def _not_recognised(found: list[str]) -> TokenizerError:
    def likeness(known: PreTokenizer) -> float:
        return difflib.SequenceMatcher(None, "\n".join(found), "\n".join(_lines(known.steps))).ratio()

    nearest = max(KNOWN.values(), key=likeness)
    changes = difflib.ndiff(_lines(nearest.steps), found)
    differences = [line for line in changes if line[0] in "+-"]
    return TokenizerError(
        "the tokenizer's pre-tokenizer is none of those that are recognised",
        reasons=[
            f"known: {', '.join(sorted(KNOWN))}",
            f"found: {' | '.join(found) or 'none'}",
            f"the nearest is {nearest.name}; - is what it has, + is what was found:",
            *differences,
        ],
        hint="If this is a fine-tune, take tokenizer.json from the model that it was tuned from.",
    )
