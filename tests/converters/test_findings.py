"""Every known fault of DeepSeek Coder files in circulation is found, and a good file has none."""

from dataclasses import replace

import pytest

from converters.findings import CONTROLS, gguf_findings
from converters.vocabulary import TokenType, Vocabulary
from quantize.llama import LlamaConfig

CONFIG = LlamaConfig(64, 96, 2, 4, 2, 16, 8, 16384, 1e-6, 100000.0, 4.0)
METADATA = {f"tokenizer.ggml.fim_{role}_token_id": 1 for role in ("pre", "suf", "mid")}
TOKENS = ("a", "ü", *CONTROLS)
GOOD = Vocabulary(
    tokens=TOKENS,
    token_types=(TokenType.NORMAL, TokenType.USER_DEFINED, *[TokenType.CONTROL] * len(CONTROLS)),
    merges=(),
    pre="deepseek-coder",
    bos_id=2,
    eos_id=TOKENS.index("<|EOT|>"),
    pad_id=3,
    add_bos=True,
    add_eos=False,
    chat_template="... <|EOT|> ...",
)


def test_a_good_file_has_no_findings() -> None:
    assert gguf_findings(CONFIG, GOOD, METADATA) == ()


@pytest.mark.parametrize(
    ("config", "vocabulary", "metadata", "finding"),
    [
        (replace(CONFIG, rope_factor=1.0), GOOD, METADATA, "four times too far"),
        (replace(CONFIG, rope_factor=2.0), GOOD, METADATA, "RoPE scaling factor is 2"),
        (replace(CONFIG, rope_theta=10000.0), GOOD, METADATA, "RoPE base is 10000"),
        (CONFIG, replace(GOOD, pre="default"), METADATA, "tokenizer.ggml.pre is 'default'"),
        (CONFIG, replace(GOOD, add_bos=False), METADATA, "add_bos_token is false"),
        (CONFIG, replace(GOOD, token_types=(TokenType.NORMAL,) * 8), METADATA, "not typed CONTROL"),
        (
            CONFIG,
            replace(GOOD, token_types=(TokenType.NORMAL,) * 8),
            METADATA,
            "the letters that spell bytes",
        ),
        (CONFIG, replace(GOOD, eos_id=3), METADATA, "chat may not stop"),
        (CONFIG, GOOD, {}, "fill-in-the-middle ids are not written"),
    ],
)
def test_each_fault_is_found(
    config: LlamaConfig, vocabulary: Vocabulary, metadata: dict[str, int], finding: str
) -> None:
    assert any(finding in text for text in gguf_findings(config, vocabulary, metadata))


def test_a_file_made_for_completion_is_none_that_stops_late() -> None:
    assert gguf_findings(CONFIG, replace(GOOD, eos_id=3), {**METADATA, "dscq.eos": "completion"}) == ()


def test_another_familys_file_is_left_alone() -> None:
    other = replace(GOOD, tokens=tuple("abcdefgh"), pre="llama-bpe", add_bos=False)
    assert gguf_findings(replace(CONFIG, rope_factor=1.0), other, {}) == ()
