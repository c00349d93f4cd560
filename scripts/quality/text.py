"""Rows of the benchmark text: one half to calibrate on, the other to measure on, by project disjoint.

The folder is made by `shared/benchtext/make_benchtext.py`: `calibration/LANGUAGE.txt` and
`heldout/LANGUAGE.txt`, in which the projects of a language take turns. Every language gives the same number
of rows; a row is BOS, where the tokenizer has one, and the tokens of consecutive text.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from converters.corpus.chat import chat_ids, chat_template, render
from converters.tokenizer import CheckpointTokenizer


def languages(half: Path) -> list[str]:
    """Return the names of a half's languages, sorted."""
    return sorted(path.stem for path in half.glob("*.txt"))


def joined_text(half: Path, characters: int, names: Iterable[str] = ()) -> str:
    """Return the first `characters` of every language, cut at a line end, one after the other."""
    parts = []
    for name in names or languages(half):
        text = (half / f"{name}.txt").read_text("utf-8")[:characters]
        parts.append(text[: text.rfind("\n") + 1])
    return "".join(parts)


def language_rows(path: Path, tokenizer: CheckpointTokenizer, n_rows: int, length: int) -> list[torch.Tensor]:
    """Return the first `n_rows` rows, int64 (length,), of one language's text."""
    ids = tokenizer.encode(path.read_text("utf-8"))
    bos = ids[: len(tokenizer.encode(""))]
    text, step = ids[len(bos) :], length - len(bos)
    pieces = [text[start : start + step] for start in range(0, n_rows * step, step)]
    return [torch.tensor([*bos, *piece], dtype=torch.int64) for piece in pieces if len(piece) == step]


def spread_rows(
    half: Path, tokenizer: CheckpointTokenizer, n_tokens: int, length: int, names: Sequence[str] = ()
) -> list[torch.Tensor]:
    """Return rows of the languages alike, all if none is named, together at least `n_tokens`.

    Raises ValueError for more than a language has.
    """
    names = names or languages(half)
    n_rows = -(-n_tokens // (length * len(names)))
    parts = {name: language_rows(half / f"{name}.txt", tokenizer, n_rows, length) for name in names}
    if short := [f"{name} {len(part)}" for name, part in parts.items() if len(part) < n_rows]:
        raise ValueError(f"{n_rows} rows of {length} tokens are wanted, there are: {', '.join(short)}")
    return [row for part in parts.values() for row in part]


_QUESTION = "What does this do, and how does it go on?"
_FAR = 24_000  # characters: beyond what spread_rows takes of a language for 36,864 tokens in all


def _excerpts(half: Path, n_rows: int, *lengths: int) -> Iterator[tuple[str, ...]]:
    """Yield `n_rows` excerpts, spread over the languages, each cut into parts of these lengths.

    Raises ValueError for more than the text has.
    """
    names = languages(half)
    for number in range(n_rows):
        name = names[number * len(names) // n_rows if n_rows < len(names) else number % len(names)]
        text, first = (half / f"{name}.txt").read_text("utf-8"), _FAR + number // len(names) * sum(lengths)
        if first + sum(lengths) > len(text):
            raise ValueError(f"{name}.txt: no text for {n_rows} rows")
        ends = [first, *(first + sum(lengths[: i + 1]) for i in range(len(lengths)))]
        yield tuple(text[start:end] for start, end in itertools.pairwise(ends))


def chat_rows(half: Path, tokenizer: CheckpointTokenizer, n_rows: int, length: int) -> list[torch.Tensor]:
    """Return conversations about text of all languages, as the model's template writes them, int64 (length,).

    Raises ValueError for a tokenizer without a template.
    """
    template = chat_template(tokenizer.vocabulary)
    if template is None:
        raise ValueError("the tokenizer has no chat template")
    rows = []
    for code, answer in _excerpts(half, n_rows, 2 * length, 4 * length):
        messages = [
            {"role": "user", "content": f"{_QUESTION}\n```\n{code}\n```"},
            {"role": "assistant", "content": answer},
        ]
        rows.append(chat_ids(tokenizer, render(template, tokenizer.vocabulary, messages))[:length])
    return _whole(rows, length)


def infill_rows(half: Path, tokenizer: CheckpointTokenizer, n_rows: int, length: int) -> list[torch.Tensor]:
    """Return text of all languages with the middle moved to the end, int64 (length,).

    The marks are DeepSeek Coder's; a tokenizer that lacks them spells them out.
    """
    begin, hole, end = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    rows = []
    for before, middle, after in _excerpts(half, n_rows, 2 * length, 3 * length, length):
        rows.append(tokenizer.encode(f"{begin}{before}{hole}{after}{end}{middle}")[:length])
    return _whole(rows, length)


def _whole(rows: Sequence[list[int]], length: int) -> list[torch.Tensor]:
    if any(len(row) < length for row in rows):
        raise ValueError(f"an excerpt has fewer than {length} tokens")
    return [torch.tensor(row, dtype=torch.int64) for row in rows]
