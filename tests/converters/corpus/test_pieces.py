"""Cutting text to tokens, orders, and the rows as text."""

from collections import Counter

import pytest

from converters.corpus.order import Draws, in_turns
from converters.corpus.pieces import head_of
from converters.corpus.rows import Corpus
from converters.corpus.show import show_rows
from converters.corpus.texts import Document
from converters.tokenizer import CheckpointTokenizer
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]

TEXT = "".join(f"value_{i} = compute({i}, '数据')\n" for i in range(200))


@pytest.mark.parametrize("limit", [1, 5, 30, 31, 100, 999, 10_000])
def test_a_head_is_the_most_whole_lines_that_fit(demo: Model, limit: int) -> None:
    def count(text: str) -> int:
        return len(demo[0].encode(text, add_bos=False))

    head = head_of(demo[0], TEXT, limit)
    assert TEXT.startswith(head) and count(head) <= limit
    if head.endswith("\n") and head != TEXT:
        longer = TEXT[: TEXT.index("\n", len(head)) + 1]
        assert count(longer) > limit
    assert head


def test_no_room_is_no_text(demo: Model) -> None:
    assert head_of(demo[0], TEXT, 0) == head_of(demo[0], TEXT, -3) == ""


def test_draws_are_pinned() -> None:
    draws = Draws(0, "name")
    assert [draws.below(1000) for _ in range(4)] == [514, 687, 613, 490]
    assert {Draws(1, str(i)).between(2, 4) for i in range(50)} == {2, 3, 4}


def test_every_prefix_has_the_languages_in_their_shares() -> None:
    texts = [Document("x" * 100, f"{i}.py", "python", f"{i}.py") for i in range(60)]
    texts += [Document("x" * 100, f"{i}.go", "go", f"{i}.go") for i in range(20)]
    order = in_turns(texts, seed=0)
    assert sorted(d.name for d in order) == sorted(d.name for d in texts)
    for n in (4, 12, 40):
        counts = Counter(d.language for d in order[:n])
        assert counts["go"] == n // 4


def test_shown_rows_are_the_decoded_rows(demo: Model, demo_corpus: Corpus) -> None:
    lines = list(show_rows(demo_corpus, demo[0], n_rows=5, with_ids=True))
    headings = [line for line in lines if line.startswith("=== row ")]
    assert [line.split(": ")[1].split(",")[0] for line in headings] == [
        "completion",
        "infill",
        "repository",
        "chat",
        "completion",
    ]
    number = int(headings[1].split()[2])
    row = demo_corpus.rows[number - 1]
    n_rows = len(demo_corpus.rows)
    assert headings[1] == f"=== row {number} of {n_rows}: infill, {len(row.ids)} tokens, {row.source}"
    start = lines.index(headings[1])
    assert lines[start + 1] == " ".join(map(str, row.ids.tolist()))
    shown = "\n".join(lines[start + 2 : lines.index(headings[2])])
    assert shown.startswith("<｜begin▁of▁sentence｜><｜fim▁begin｜>")
    assert demo[0].encode(shown, add_bos=False) == row.ids.tolist()


def test_all_rows_are_shown_in_order(demo: Model, demo_corpus: Corpus) -> None:
    headings = [line for line in show_rows(demo_corpus, demo[0]) if line.startswith("=== row ")]
    assert [int(line.split()[2]) for line in headings] == list(range(1, len(demo_corpus.rows) + 1))
