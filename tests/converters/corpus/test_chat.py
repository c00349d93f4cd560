"""Chat rows are what the model's own template writes, with one BOS."""

from dataclasses import replace

import jinja2
import pytest

from converters.corpus.chat import chat_ids, chat_template, render
from converters.corpus.rows import Corpus
from converters.tokenizer import CheckpointTokenizer
from quantize.errors import CorpusError
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]

TURNS = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "你好"}]
SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, "
    "and you only answer questions related to computer science. For politically sensitive questions, "
    "security and privacy issues, and other non-computer science questions, you will refuse to answer\n"
)


def with_template(tokenizer: CheckpointTokenizer, template: str) -> CheckpointTokenizer:
    return replace(tokenizer, vocabulary=replace(tokenizer.vocabulary, chat_template=template))


def rendered(tokenizer: CheckpointTokenizer) -> str:
    template = chat_template(tokenizer.vocabulary)
    assert template is not None
    return render(template, tokenizer.vocabulary, TURNS)


def test_the_real_template(real: Model) -> None:
    tokenizer = real[0]
    if tokenizer.vocabulary.chat_template is None:
        assert chat_template(tokenizer.vocabulary) is None
        return
    text = rendered(tokenizer)
    assert text == (
        f"<｜begin▁of▁sentence｜>{SYSTEM}### Instruction:\nHi <b>\n### Response:\n你好\n<|EOT|>\n"
    )
    ids = chat_ids(tokenizer, text)
    assert ids[0] == 32013 and ids.count(32013) == 1
    assert ids.count(32021) == 1 and tokenizer.decode(ids[-2:]) == "<|EOT|>\n"


def test_it_is_what_jinja_writes(demo: Model, demo_corpus: Corpus) -> None:
    """The rows of the corpus against a plain environment with the same two settings."""
    v = demo[0].vocabulary
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(v.chat_template or "")
    assert rendered(demo[0]) == plain.render(messages=TURNS, bos_token=v.tokens[v.bos_id or 0])
    rows = [row for row in demo_corpus.rows if row.kind == "chat"]
    assert len(rows) > 30
    assert all("### Response:\n" in demo[0].decode(row.ids.tolist()) for row in rows)


@pytest.mark.parametrize("opening", ["{{ bos_token }}", ""])
def test_bos_is_there_once_whoever_writes_it(demo: Model, opening: str) -> None:
    tokenizer = with_template(demo[0], opening + "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    ids = chat_ids(tokenizer, rendered(tokenizer))
    assert ids.count(tokenizer.vocabulary.bos_id or 0) == 1 and ids[0] == tokenizer.vocabulary.bos_id
    assert tokenizer.decode(ids, skip_control=True) == "Hi <b>\n你好\n"


def test_tojson_leaves_html_alone(demo: Model) -> None:
    tokenizer = with_template(demo[0], "{{ messages[0].content | tojson }}")
    assert rendered(tokenizer) == '"Hi <b>"'


def test_a_template_cannot_leave_its_sandbox(demo: Model) -> None:
    tokenizer = with_template(demo[0], "{{ messages.__class__.__mro__ }}")
    with pytest.raises(CorpusError, match="the model's chat template fails: SecurityError"):
        rendered(tokenizer)


def test_a_templates_own_complaint_is_told(demo: Model) -> None:
    tokenizer = with_template(demo[0], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        CorpusError, match=r"^the model's chat template fails: TemplateError: roles must alternate$"
    ):
        rendered(tokenizer)


def test_a_broken_template_is_refused(demo: Model) -> None:
    tokenizer = with_template(demo[0], "{% if %}")
    with pytest.raises(CorpusError, match=r"^the model's chat template cannot be read: "):
        chat_template(tokenizer.vocabulary)
