"""Conversations as the model's own chat template writes them.

The template runs in jinja2's sandbox under the settings of Hugging Face (`trim_blocks`, `lstrip_blocks`, loop
controls, `raise_exception`, a `tojson` that leaves HTML alone). A template writes BOS itself where it wants
one; the tokenizer's rule must then not put a second in front.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import Vocabulary
from quantize.errors import CorpusError


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def chat_template(vocabulary: Vocabulary) -> jinja2.Template | None:
    """Compile the model's template; None where it has none. Raises CorpusError if it is wrong."""
    if vocabulary.chat_template is None:
        return None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(vocabulary.chat_template)
    except jinja2.TemplateError as error:
        raise CorpusError(f"the model's chat template cannot be read: {error}") from None


def render(template: jinja2.Template, vocabulary: Vocabulary, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a whole conversation as text, the last answer included.

    Raises CorpusError for a template that fails on it.
    """
    special = {
        name: "" if token_id is None else vocabulary.tokens[token_id]
        for name, token_id in (
            ("bos_token", vocabulary.bos_id),
            ("eos_token", vocabulary.eos_id),
            ("pad_token", vocabulary.pad_id),
        )
    }
    try:
        return template.render(messages=messages, add_generation_prompt=False, **special)
    # A template may fail in any way that Python can: it is the model's code, within the sandbox.
    except Exception as error:
        raise CorpusError(f"the model's chat template fails: {type(error).__name__}: {error}") from None


def chat_ids(tokenizer: CheckpointTokenizer, text: str) -> list[int]:
    """Return the ids of a rendered conversation, with one BOS at most."""
    v = tokenizer.vocabulary
    begins = v.bos_id is not None and text.startswith(v.tokens[v.bos_id])
    ids = tokenizer.encode(text, add_bos=False)
    return ids if begins or not v.add_bos or v.bos_id is None else [v.bos_id, *ids]
