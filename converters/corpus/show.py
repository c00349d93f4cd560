"""What the model will see, as lines of text: the rows decoded by dscq's own tokenizer."""

from collections.abc import Iterator

from converters.corpus.rows import KINDS, Corpus, TokenRow
from converters.tokenizer import CheckpointTokenizer


def show_rows(
    corpus: Corpus, tokenizer: CheckpointTokenizer, *, n_rows: int | None = None, with_ids: bool = False
) -> Iterator[str]:
    """Yield the lines for `n_rows` rows, the kinds in turns (None: all rows, in the corpus's order).

    Each row is a heading with number, kind, tokens and source, the ids if wanted, and the decoded text with
    special tokens as they are written. The heading's number is the row's place in the corpus, from 1.
    """
    numbered = list(enumerate(corpus.rows, 1))
    for number, row in numbered if n_rows is None else _in_turns(numbered)[:n_rows]:
        yield f"=== row {number} of {len(corpus.rows)}: {row.kind}, {len(row.ids)} tokens, {row.source}"
        ids = row.ids.tolist()
        if with_ids:
            yield " ".join(map(str, ids))
        yield from tokenizer.decode(ids).split("\n")


def _in_turns(numbered: list[tuple[int, TokenRow]]) -> list[tuple[int, TokenRow]]:
    """The first row of each kind, the second of each, and so on."""
    of_kind = [[pair for pair in numbered if pair[1].kind == kind] for kind in KINDS]
    longest = max(map(len, of_kind))
    return [rows[i] for i in range(longest) for rows in of_kind if i < len(rows)]
