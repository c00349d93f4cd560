"""The probe: rows as at inference, one of them past position 4096, and never a silent shortfall."""

import hashlib
from pathlib import Path

import pytest

from converters.probe import DEFAULT_TOKENS, LONG_ROW, probe_rows, probe_text
from converters.probe_strings import CLASSES, probe_strings, random_strings
from converters.tokenizer import CheckpointTokenizer, read_tokenizer, tokenizer_from_vocabulary
from converters.vocabulary import TokenType, Vocabulary
from quantize.errors import UsageError


@pytest.fixture(scope="session")
def tokenizer(demo_folder: Path) -> CheckpointTokenizer:
    return read_tokenizer(demo_folder, 2304)


def test_the_real_tokenizer_gets_the_long_row_from_one_text(shared: Path, tmp_path: Path) -> None:
    real = shared / "deepseek-coder"
    (tmp_path / "tokenizer.json").symlink_to(real / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").symlink_to(real / "tokenizer_config.base.json")
    (tmp_path / "config.json").symlink_to(real / "config.1.3b-base.json")
    tokenizer = read_tokenizer(tmp_path, 32256)
    probe = probe_rows(tokenizer, n_tokens=10_000, context_length=16384)
    assert (probe.longest, probe.note) == (LONG_ROW, "")
    assert 9_500 <= probe.n_tokens <= 10_000
    infill = next(row.ids for row in probe.rows if row.name == "infill")
    assert [i for i in infill if i in (32015, 32016, 32017)] == [32016, 32015, 32017]


def test_the_default_probe_has_one_row_past_4096_and_several_ordinary_ones(
    tokenizer: CheckpointTokenizer,
) -> None:
    probe = probe_rows(tokenizer, context_length=16384)
    lengths = [len(row.ids) for row in probe.rows]
    assert lengths[0] == LONG_ROW > 4096
    assert len(lengths) >= 6
    assert max(lengths[1:]) <= 512
    assert probe.n_tokens == sum(lengths) == pytest.approx(DEFAULT_TOKENS, rel=0.05)
    assert probe.note == ""


def test_rows_start_with_bos_and_are_the_ids_of_the_text(tokenizer: CheckpointTokenizer) -> None:
    for row in probe_rows(tokenizer, context_length=16384).rows:
        assert list(row.ids) == tokenizer.encode(probe_text(row.name))[: len(row.ids)]
        assert row.ids[0] == tokenizer.vocabulary.bos_id


def test_equal_arguments_give_equal_rows(tokenizer: CheckpointTokenizer) -> None:
    first = probe_rows(tokenizer, n_tokens=3000, context_length=4096)
    assert first == probe_rows(tokenizer, n_tokens=3000, context_length=4096)


@pytest.mark.parametrize(
    ("n_tokens", "context_length", "told"),
    [
        (6144, 2048, "the context has 2048 positions"),
        (6144, 4351, "the context has 4351 positions"),
        (1000, 16384, "1000 tokens asked for"),
        (64, 64, "the context has 64 positions"),
    ],
)
def test_no_room_for_the_long_row_is_said(
    tokenizer: CheckpointTokenizer, n_tokens: int, context_length: int, told: str
) -> None:
    probe = probe_rows(tokenizer, n_tokens=n_tokens, context_length=context_length)
    assert told in probe.note
    assert probe.longest <= min(512, context_length)
    assert 0 < probe.n_tokens <= n_tokens


def test_more_than_the_text_holds_is_said(tokenizer: CheckpointTokenizer) -> None:
    probe = probe_rows(tokenizer, n_tokens=50_000, context_length=16384)
    assert "of the 50000 tokens asked for" in probe.note


def test_too_small_a_probe_is_an_error(tokenizer: CheckpointTokenizer) -> None:
    with pytest.raises(UsageError, match="at least"):
        probe_rows(tokenizer, n_tokens=63, context_length=16384)


def _bytes_only(fim: tuple[int | None, int | None, int | None]) -> CheckpointTokenizer:
    """A vocabulary of single bytes and three infill tokens of another family."""
    spelling = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    tokens = (
        *spelling,
        *(chr(0x100 + i) for i in range(68)),
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
    )
    types = (*[TokenType.NORMAL] * 256, *[TokenType.CONTROL] * 3)
    vocabulary = Vocabulary(tokens, types, (), "gpt-2", None, 258, None, False, False, *fim)
    return tokenizer_from_vocabulary(vocabulary)


def test_another_familys_infill_tokens_take_the_place_of_deepseeks() -> None:
    rows = {
        row.name: row
        for row in probe_rows(_bytes_only((256, 257, 258)), n_tokens=6000, context_length=512).rows
    }
    assert rows["infill"].ids[0] == 256
    assert rows["infill"].ids.count(257) == 1


def test_without_infill_tokens_the_row_is_plain_text() -> None:
    tokenizer = _bytes_only((None, None, None))
    rows = {row.name: row for row in probe_rows(tokenizer, n_tokens=6000, context_length=512).rows}
    assert tokenizer.decode(rows["infill"].ids).startswith("from collections")
    assert max(rows["infill"].ids) < 256


# --- strings ----------------------------------------------------------------------------------------


def test_the_fixed_corpus_never_changes() -> None:
    """A proof made with one version must be repeatable with the next."""
    content = "\0".join(probe_strings()).encode("utf-8")
    assert (
        hashlib.sha256(content).hexdigest()
        == "3031d020f2613e8af2f32b38865761d965ba7c930a7861b659605eefb871f275"
    )


def test_the_fixed_corpus_has_every_kind() -> None:
    texts = probe_strings()
    assert len(texts) == len(set(texts)) > 300
    for needed in ("", "\r\n", "<|EOT|>", "<｜fim▁hole｜>", "Führer"):
        assert needed in texts
    assert any("\0" in text for text in texts)
    assert any(max(map(ord, text), default=0) > 0x100000 for text in texts)


def test_random_strings_are_repeatable_and_encodable() -> None:
    strings = random_strings(3 * len(CLASSES), seed=4)
    assert strings == random_strings(3 * len(CLASSES), seed=4)
    assert strings != random_strings(3 * len(CLASSES), seed=5)
    assert [kind for kind, _ in strings[: len(CLASSES)]] == list(CLASSES)
    assert all(text.encode("utf-8") for _, text in strings)
