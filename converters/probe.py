"""The text that every exported file is proven on, bundled so that the proof needs no network.

Fourteen texts written for this project lie in `data/probe/`: a long Python program, eight further languages
of code and markup, English and Chinese prose, accents and emoji, an infill and a chat. A row is the ids of
one text, cut, with BOS in front as at inference.

One row passes position 4096. DeepSeek Coder was trained there by stretching its positions four times, so a
file whose rope scale was lost still looks fine at the start of a text and falls apart behind it. Where the
context or the number of tokens asked for leaves no room for that row, `ProbeRows.note` says so.
"""

from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import Vocabulary
from quantize.errors import UsageError

LONG_ROW: Final = 4352  # 256 positions behind 4096
ORDINARY_ROW: Final = 512
TYPICAL_ROW: Final = 256  # rows are this long before another text is taken in
SMALLEST: Final = 64
DEFAULT_TOKENS: Final = 6144

_LONG: Final = "long"
# In the order of use: a small probe still has code, prose, a chat and an infill.
_ORDINARY: Final = (
    *("c", "chat", "english", "infill", "chinese", "javascript", "accents"),
    *("java", "sql", "go", "shell", "rust", "html"),
)
_FIM_MARKS: Final = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@dataclass(frozen=True)
class ProbeRow:
    """The ids of one text, BOS included where the model has it."""

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ProbeRows:
    """The rows of a probe. `note` is what could not be had and why, "" when everything could."""

    rows: tuple[ProbeRow, ...]
    note: str = ""

    @property
    def n_tokens(self) -> int:
        """Positions in all rows together."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(len(row.ids) for row in self.rows)


def probe_text(name: str) -> str:
    """Return one of the bundled texts by its name, for example "c"."""
    return files("converters").joinpath("data", "probe", f"{name}.txt").read_text(encoding="utf-8")


def probe_rows(
    tokenizer: CheckpointTokenizer, *, n_tokens: int = DEFAULT_TOKENS, context_length: int
) -> ProbeRows:
    """Return rows of about `n_tokens` ids in all, none longer than `context_length`.

    The long row comes first, when it fits twice over: into the context, and into `n_tokens` with a quarter
    of it to spare for other rows. What is left is shared among the ordinary texts, 256 to 512 ids each.
    Equal arguments give equal rows. Raises UsageError for fewer than 64 tokens or positions.
    """
    if min(n_tokens, context_length) < SMALLEST:
        raise UsageError(
            f"{n_tokens} tokens in a context of {context_length} are too few: {SMALLEST} of both at least"
        )
    shortfalls = [_shortfall(n_tokens, context_length)]
    first = [] if shortfalls[0] else [_row(tokenizer, _LONG, LONG_ROW)]
    if first and len(first[0].ids) < LONG_ROW:
        shortfalls = [f"no row passes position 4096: the text has {len(first[0].ids)} tokens"]
    rest = _ordinary(tokenizer, n_tokens - sum(len(row.ids) for row in first), context_length)
    probe = ProbeRows((*first, *rest))
    if probe.n_tokens < n_tokens * 9 // 10:
        shortfalls.append(f"the bundled text gives {probe.n_tokens} of the {n_tokens} tokens asked for")
    return ProbeRows(probe.rows, "; ".join(filter(None, shortfalls)))


def _shortfall(n_tokens: int, context_length: int) -> str:
    """Why there can be no row past position 4096, or ""."""
    if context_length < LONG_ROW:
        return f"no row passes position 4096: the context has {context_length} positions, it takes {LONG_ROW}"
    if n_tokens < LONG_ROW * 5 // 4:
        return f"no row passes position 4096: {n_tokens} tokens asked for, it takes {LONG_ROW * 5 // 4}"
    return ""


def _ordinary(tokenizer: CheckpointTokenizer, budget: int, context_length: int) -> list[ProbeRow]:
    """Rows of equal length over as many texts as the budget has room for; short texts pass theirs on."""
    names = _ORDINARY[: max(1, budget // min(TYPICAL_ROW, context_length))]
    rows = []
    for i, name in enumerate(names):
        share = -(-budget // (len(names) - i))
        row = _row(tokenizer, name, min(share, ORDINARY_ROW, context_length))
        rows.append(row)
        budget -= len(row.ids)
    return rows


def _row(tokenizer: CheckpointTokenizer, name: str, length: int) -> ProbeRow:
    text = _with_fim_of(tokenizer.vocabulary, probe_text(name))
    return ProbeRow(name, tuple(tokenizer.encode(text)[:length]))


def _with_fim_of(vocabulary: Vocabulary, text: str) -> str:
    """Put the model's own infill tokens in place of DeepSeek's; without such tokens the text stays plain."""
    ids = (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle)
    for mark, token_id in zip(_FIM_MARKS, ids, strict=True):
        text = text.replace(mark, "" if token_id is None else vocabulary.tokens[token_id])
    return text
