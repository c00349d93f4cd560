"""Fill-in-the-middle: the order of the marks, the cut, the parts put together again."""

import pytest

from converters.corpus.infill import Hole, cut_hole, end_of_text, infill_ids, infill_row
from converters.corpus.order import Draws
from converters.corpus.rows import Corpus
from converters.tokenizer import CheckpointTokenizer
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(60))


def test_the_real_ids_in_the_trained_order(real: Model) -> None:
    tokenizer, _ = real
    hole = Hole("def f(", "x", "):\n    return x\n")
    inner = [tokenizer.encode(part, add_bos=False) for part in (hole.prefix, hole.suffix, hole.middle)]
    ids = infill_ids(tokenizer, hole)
    assert ids == [32013, 32016, *inner[0], 32015, *inner[1], 32017, *inner[2], 32014]


def test_the_ids_are_those_of_the_prompt_as_text(real: Model) -> None:
    """As a runtime that parses special tokens reads the prompt of an editor."""
    tokenizer, _ = real
    hole = Hole("def f(", "x", "):\n    return x\n")
    prompt = f"<｜fim▁begin｜>{hole.prefix}<｜fim▁hole｜>{hole.suffix}<｜fim▁end｜>"
    ids = infill_ids(tokenizer, hole)
    assert ids[: ids.index(32017) + 1] == tokenizer.encode(prompt)


def test_the_end_is_the_base_models_in_instruct_models_too(real: Model, demo: Model) -> None:
    for tokenizer in (real[0], demo[0]):
        v = tokenizer.vocabulary
        assert v.tokens[end_of_text(v) or 0] == "<｜end▁of▁sentence｜>"
    assert demo[0].vocabulary.tokens[demo[0].vocabulary.eos_id or 0] == "<|EOT|>"


@pytest.mark.parametrize("name", [f"file{i}" for i in range(40)])
def test_a_cut_loses_nothing(name: str) -> None:
    hole = cut_hole(TEXT, Draws(0, name))
    assert hole.prefix + hole.middle + hole.suffix == TEXT
    assert 0 < len(hole.middle) <= 1000


def test_cuts_are_of_all_ways() -> None:
    holes = [cut_hole(TEXT, Draws(0, f"file{i}")) for i in range(200)]
    whole = sum(h.prefix.endswith("\n") and h.middle.endswith("\n") for h in holes)
    to_end = sum(not h.prefix.endswith("\n") and h.suffix.startswith("\n") for h in holes)
    inside = sum(h.suffix[:1] not in ("", "\n") and not h.middle.endswith("\n") for h in holes)
    assert min(whole, to_end, inside) > 10, (whole, to_end, inside)


def test_rows_hold_the_text_of_their_file(demo: Model, demo_corpus: Corpus) -> None:
    v = demo[0].vocabulary
    rows = [row.ids.tolist() for row in demo_corpus.rows if row.kind == "infill"]
    assert len(rows) > 20
    for ids in rows:
        assert ids[:2] == [v.bos_id, v.fim_prefix] and ids[-1] == end_of_text(v)
        hole, middle = ids.index(v.fim_suffix), ids.index(v.fim_middle)
        assert [ids.count(mark) for mark in (v.fim_prefix, v.fim_suffix, v.fim_middle)] == [1, 1, 1]
        assert 1 < hole < middle < len(ids) - 1


def test_a_row_is_at_most_the_limit(demo: Model) -> None:
    for limit in (64, 100, 333):
        made = [infill_row(demo[0], TEXT, limit, Draws(0, str(i))) for i in range(20)]
        lengths = [len(infill.ids) for infill in made if infill is not None]
        assert len(lengths) >= 15 and min(lengths) >= 32 and max(lengths) <= limit


def test_a_tiny_text_makes_no_row(demo: Model) -> None:
    assert infill_row(demo[0], "x\n", 2048, Draws(0, "x")) is None
