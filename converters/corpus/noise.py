"""Rows of tokens drawn at random: what the text does not have.

A Hessian knows the inputs of the text that it was gathered on. In directions that this text never took, a
solver may leave any error; the first text of another kind then finds it. A few rows of tokens that mean
nothing, all of the vocabulary alike, put something into every direction. `docs/calibration.md` says what that
costs on text like the calibration's, and gains on other text.
"""

from collections.abc import Iterator

import torch

from converters.corpus.order import Draws
from converters.corpus.rows import TokenRow
from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import TokenType

LONGEST = 256
"""Tokens of a row: many short rows rather than a few long ones, since there is no context to follow."""


def noise_rows(tokenizer: CheckpointTokenizer, length: int, n_tokens: float, seed: int) -> Iterator[TokenRow]:
    """Yield rows of `length` tokens, at most 256, of about `n_tokens` in all.

    Each is BOS, where the model has one, and ordinary tokens of the vocabulary, all as likely. Equal
    arguments give equal rows.
    """
    length = min(length, LONGEST)
    bos, kinds = tokenizer.encode(""), tokenizer.vocabulary.token_types
    ordinary = [number for number, kind in enumerate(kinds) if kind is TokenType.NORMAL]
    draws = Draws(seed, "noise")
    for _ in range(round(n_tokens / length)):
        drawn = [ordinary[draws.below(len(ordinary))] for _ in range(length - len(bos))]
        yield TokenRow(torch.tensor([*bos, *drawn], dtype=torch.int64), "noise", "random tokens")
