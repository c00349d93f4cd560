"""`--tensor-type`: what is read, for which format, and what is refused."""

import pytest

from converters.targets.gguf_types import written_type
from converters.targets.overrides import parse_overrides
from quantize.errors import UsageError

BOTH = {"gguf", "gptq"}


def test_overrides_are_read() -> None:
    texts = ["ffn_down=q6_k", r"blk\.(?P<a>[0-3])=x= F16", "down_proj=8bit-32g", "v_proj=8BIT"]
    assert parse_overrides(texts, BOTH) == (
        (("ffn_down", "Q6_K"), (r"blk\.(?P<a>[0-3])=x", "F16")),
        (("down_proj", "8bit-32g"), ("v_proj", "8bit-128g")),
    )
    assert written_type("iq4_nl", "--output-tensor-type") == "IQ4_NL"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "--tensor-type ffn_down: expected PATTERN=TYPE"),
        ("=Q6_K", "--tensor-type =Q6_K: expected PATTERN=TYPE"),
        ("ffn_(=Q6_K", r"--tensor-type ffn_(=Q6_K: 'ffn_(' is no regular expression: "),
        ("ffn=Q4_K_M", "--tensor-type ffn=Q4_K_M: 'Q4_K_M' is no quant type\nknown: F32, "),
        ("ffn=", "--tensor-type ffn=: '' is no quant type\nknown: F32, "),
        ("ffn=TQ1_0", "--tensor-type ffn=TQ1_0: 'TQ1_0' is read but not written\nknown: F32, "),
        ("ffn=5bit-32g", "gptq:5bit-32g: expected BITSbit-GROUPg, as 4bit-128g\nknown: 2, 3, 4, 8 bits"),
    ],
)
def test_overrides_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_overrides([text], BOTH)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("text", "format"), [("up=Q6_K", "gptq"), ("up=8bit-32g", "gguf")])
def test_an_override_of_a_format_that_is_not_asked_for_is_refused(text: str, format: str) -> None:
    with pytest.raises(UsageError, match="which is not asked for"):
        parse_overrides([text], {format})
