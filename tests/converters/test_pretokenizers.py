"""The pre-tokenizer is recognised by its structure, and only when every step is equal."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from converters.pretokenizers import KNOWN, describe, recognise, steps_json
from quantize.errors import TokenizerError


def test_the_real_file_is_deepseek_coder(shared: Path) -> None:
    content = json.loads((shared / "deepseek-coder" / "tokenizer.json").read_text("utf-8"))
    assert recognise(content["pre_tokenizer"]) == "deepseek-coder"


def test_the_demo_file_is_deepseek_coder(demo_folder: Path) -> None:
    content = json.loads((demo_folder / "tokenizer.json").read_text("utf-8"))
    assert recognise(content["pre_tokenizer"]) == "deepseek-coder"


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_known_name_round_trips_through_json(name: str) -> None:
    added = [KNOWN[name].telling] if KNOWN[name].telling else []
    assert recognise(json.loads(json.dumps(steps_json(name))), added) == name


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_tokenizers_library_takes_every_structure(name: str) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": steps_json(name), "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    assert tokenizer.pre_tokenizer is not None
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 12你\n")]
    assert "".join(pieces) == "abĠ12ä½łĊ"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("deepseek-coder", ["ab", "Ġ", "1", "2", "ä½ł", "ĠĠ", "Ġx"]),
        ("gpt-2", ["ab", "Ġ12", "ä½ł", "ĠĠ", "Ġx"]),
        ("smollm", ["ab", "Ġ", "1", "2", "ä½ł", "ĠĠ", "Ġx"]),
        ("llama-bpe", ["ab", "Ġ", "12", "ä½ł", "ĠĠ", "Ġx"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "ä½ł", "ĠĠ", "Ġx"]),
    ],
)
def test_the_cuts_are_those_of_the_family(name: str, pieces: list[str]) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": steps_json(name), "model": model}
    cutter = Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    assert cutter is not None
    assert [piece for piece, _ in cutter.pre_tokenize_str("ab 12你   x")] == pieces


def test_equal_steps_are_told_apart_by_the_infill_tokens() -> None:
    steps = steps_json("smollm")
    assert recognise(steps) == "smollm"
    assert recognise(steps, ["<fim_prefix>"]) == "starcoder"


def test_what_moves_only_offsets_does_not_matter() -> None:
    steps = steps_json("deepseek-coder")
    steps["pretokenizers"][-1]["trim_offsets"] = False
    nested = {"type": "Sequence", "pretokenizers": [steps]}
    assert recognise(nested) == "deepseek-coder"


def _digits_in_runs(steps: list[dict[str, Any]]) -> None:
    steps[4]["individual_digits"] = False


def _space_in_front(steps: list[dict[str, Any]]) -> None:
    steps[5]["add_prefix_space"] = True


def _other_letters(steps: list[dict[str, Any]]) -> None:
    steps[1]["pattern"]["Regex"] = r"\s?\p{Lu}+"


def _merged(steps: list[dict[str, Any]]) -> None:
    steps[0]["behavior"] = "MergedWithNext"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_digits_in_runs, "+ Digits in runs"),
        (_space_in_front, "a space put in front"),
        (_other_letters, r"\\p{Lu}"),
        (_merged, "MergedWithNext"),
    ],
)
def test_any_other_step_is_refused_with_the_difference(change: Any, told: str) -> None:
    content = json.loads(json.dumps(steps_json("deepseek-coder")))
    change(content["pretokenizers"])
    with pytest.raises(TokenizerError) as caught:
        recognise(content)
    message = str(caught.value)
    assert "the nearest is deepseek-coder" in message
    assert told in message
    assert all(name in message for name in KNOWN)


def test_no_pre_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match="found: none"):
        recognise(None)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TokenizerError, match="llama-bpe, qwen2"):
        steps_json("falcon")


def test_steps_are_described_one_by_one() -> None:
    assert describe(steps_json("smollm")) == ["Digits one by one", "ByteLevel with its regex"]
