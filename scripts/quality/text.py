"""Rows of the benchmark text: one half to calibrate on, the other to measure on, by project disjoint.

The folder is made by `shared/benchtext/make_benchtext.py`: `calibration/LANGUAGE.txt` and
`heldout/LANGUAGE.txt`, in which the projects of a language take turns. Every language gives the same number
of rows; a row is BOS, where the tokenizer has one, and the tokens of consecutive text.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

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


def spread_rows(half: Path, tokenizer: CheckpointTokenizer, n_tokens: int, length: int) -> list[torch.Tensor]:
    """Return rows of all languages alike, together at least `n_tokens`."""
    names = languages(half)
    n_rows = -(-n_tokens // (length * len(names)))
    return [row for name in names for row in language_rows(half / f"{name}.txt", tokenizer, n_rows, length)]
