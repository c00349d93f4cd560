"""Fill-in-the-middle as DeepSeek Coder was trained on it and as editors ask for it.

    BOS <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle EOS

The order is prefix, suffix, middle (PSM; arXiv 2401.14196, section 3.1.2). The ids are the vocabulary's, so a
model with other marks gets its own. EOS here is the end of sentence that ended the base model's documents,
also in the instruct models, whose own EOS is `<|EOT|>`.
"""

from dataclasses import dataclass

from converters.corpus.order import Draws
from converters.corpus.pieces import head_of
from converters.corpus.rows import SHORTEST
from converters.token_roles import DEEPSEEK_END
from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import Vocabulary

_MOST_MIDDLE = 800  # characters: about twenty lines, more than editors take over at once
_WHOLE_LINES, _TO_LINE_END = (0, 1), (2, 3)  # of five ways to cut
_MARKS = 8  # room for BOS, the marks, EOS, and a token more at each cut


@dataclass(frozen=True)
class Hole:
    """A text in three parts; the model sees the outer two and writes the middle."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True)
class Infill:
    """The ids of an infill, and where its window ends in the text: what is behind is still unused."""

    ids: list[int]
    end: int


def has_marks(vocabulary: Vocabulary) -> bool:
    """Whether the model has all three marks of an infill."""
    return None not in (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle)


def cut_hole(text: str, draws: Draws) -> Hole:
    """Cut a middle out: from a cursor to a line's end (2 of 5), whole lines (2 of 5), any span (1 of 5).

    The cursor stands at a random character or, for whole lines, at a line's beginning.
    """
    way = draws.below(5)
    start = draws.below(len(text))
    end = min(len(text), start + draws.between(1, min(_MOST_MIDDLE, max(len(text) // 3, 1))))
    if way in _WHOLE_LINES:
        start = text.rfind("\n", 0, start) + 1
        end = _line_end(text, end - 1) + 1
    elif way in _TO_LINE_END:
        end = _line_end(text, start + 1)
    return Hole(text[:start], text[start:end], text[end:])


def _line_end(text: str, start: int) -> int:
    """Where the line that holds `start` ends: at its line break, or at the text's end."""
    found = text.find("\n", start)
    return len(text) if found < 0 else found


def infill_ids(tokenizer: CheckpointTokenizer, hole: Hole) -> list[int]:
    """Return the ids of an infill and its answer; each part is encoded by itself, as runtimes do it."""
    v = tokenizer.vocabulary
    prefix, suffix, middle = (
        tokenizer.encode(t, add_bos=False) for t in (hole.prefix, hole.suffix, hole.middle)
    )
    opening = [v.bos_id] if v.add_bos else []
    ids = [*opening, v.fim_prefix, *prefix, v.fim_suffix, *suffix, v.fim_middle, *middle, end_of_text(v)]
    return [token_id for token_id in ids if token_id is not None]


def end_of_text(vocabulary: Vocabulary) -> int | None:
    """The token that ended the documents in training: the family's end of sentence, else EOS."""
    for token_id in (vocabulary.eos_id, vocabulary.eot_id):
        if token_id is not None and vocabulary.tokens[token_id] == DEEPSEEK_END:
            return token_id
    return vocabulary.eos_id


def infill_row(tokenizer: CheckpointTokenizer, text: str, limit: int, draws: Draws) -> Infill | None:
    """Return an infill of a window of `text`, at most `limit` ids; None for a text too short.

    The window begins at a line's beginning and is between a quarter of the limit and the limit long.
    """
    wanted = draws.between(max(limit // 4, min(SHORTEST + _MARKS, limit)), limit) - _MARKS
    start = text.rfind("\n", 0, draws.below(max(len(text) - 3 * wanted, 1))) + 1
    for room in (wanted, wanted - _MARKS, wanted // 2):
        window = head_of(tokenizer, text[start:], room)
        if not window:
            return None
        ids = infill_ids(tokenizer, cut_hole(window, draws))
        if SHORTEST <= len(ids) <= limit:
            return Infill(ids, start + len(window))
    return None
