"""From source text to rows of token ids.

Four kinds of document, each opened by the begin-of-sentence token, are mixed by their share of the tokens:

| kind     | share | after the begin token                                                                  |
|----------|-------|----------------------------------------------------------------------------------------|
| file     | 48 %  | a whole module, then end of sentence                                                   |
| fill     | 33 %  | fim-begin, prefix, fim-hole, suffix, fim-end, middle, end of sentence                  |
| function | 12 %  | one function or class at column 0, then end of sentence                                |
| chat     | 7 %   | the chat template around a docstring and its function, ending in the turn's end        |

Documents are laid end to end and cut into rows, so a row may begin inside a document. The middle to be filled
in is a run of whole lines, the rest of a line from its first word on (with or without further lines), or any
span of characters: the three places where an editor's cursor stands.

A prompt often ends behind an indentation. The pre-tokenizer gives the last space of an indentation to the
word after it, so text encoded as a whole never shows what may follow such a prompt. Every tenth indented line
of the plain documents is therefore encoded in two pieces, indentation and rest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2.sandbox
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import bpe
from .corpus import Corpus, Function, SourceFile, read_functions

SHARES = {"file": 0.48, "fill": 0.33, "function": 0.12, "chat": 0.07}
FILL_CHARS = (80, 3000)
CHAT_CHARS = (60, 1500)
FUNCTION_CHARS = (40, 6000)
CUT_LINES = 0.1


@dataclass(frozen=True)
class Hole:
    """A text cut in three for fill-in-the-middle."""

    prefix: str
    middle: str
    suffix: str


class DocumentStream:
    """An endless, seeded stream of documents (lists of token ids) in the shares of `SHARES`."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, chat_template: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokenizer = tokenizer
        self._ids = bpe.special_ids(tokenizer)
        self._template = _compile_template(chat_template)
        self._files = corpus.train
        self._shuffled: list[SourceFile] = []
        functions = read_functions(corpus.train)
        self._functions = [f for f in functions if _within(f.source, FUNCTION_CHARS)]
        self._chats = [f for f in functions if f.summary and _within(f.source, CHAT_CHARS)]
        self._spent = dict.fromkeys(SHARES, 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield documents, always of the kind that is furthest behind its share."""
        while True:
            kind = min(SHARES, key=lambda name: self._spent[name] / SHARES[name])
            document = getattr(self, f"_{kind}")()
            self._spent[kind] += len(document)
            yield document

    def _file(self) -> list[int]:
        if not self._shuffled:
            self._shuffled = self._random.sample(self._files, len(self._files))
        return self._plain(self._shuffled.pop().text)

    def _function(self) -> list[int]:
        return self._plain(self._random.choice(self._functions).source)

    def _chat(self) -> list[int]:
        return self._encode(render_chat(self._template, self._random.choice(self._chats)))

    def _fill(self) -> list[int]:
        hole = cut_hole(self._random, self._excerpt())
        prefix, middle, suffix = (self._encode(part) for part in (hole.prefix, hole.middle, hole.suffix))
        ids = self._ids
        opening = [ids.begin, ids.fim_begin, *prefix, ids.fim_hole, *suffix, ids.fim_end]
        return [*opening, *middle, ids.end]

    def _excerpt(self) -> str:
        """A whole function, or a run of whole lines of a file, of log-uniformly distributed length."""
        if self._random.random() < 0.4:
            return self._random.choice(self._functions).source[: FILL_CHARS[1]]
        low, high = FILL_CHARS
        n_chars = int(low * (high / low) ** self._random.random())
        text = self._random.choices(self._files, weights=[len(f.text) for f in self._files])[0].text
        start = text.rfind("\n", 0, self._random.randrange(len(text))) + 1
        end = text.find("\n", start + n_chars)
        return text[start : end + 1 if end >= 0 else len(text)]

    def _plain(self, text: str) -> list[int]:
        cuts = cursor_cuts(self._random, text)
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [self._ids.begin, *(i for piece in pieces for i in self._encode(piece)), self._ids.end]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def pack(documents: Iterator[list[int]], n_tokens: int, n_rows: int) -> Iterator[Tensor]:
    """Cut the documents into batches [n_rows, n_tokens + 1] (int64); no token is dropped between batches."""
    pending: list[int] = []
    size = n_tokens + 1
    while True:
        while len(pending) < n_rows * size:
            pending.extend(next(documents))
        batch, pending = pending[: n_rows * size], pending[n_rows * size :]
        yield torch.tensor(batch).view(n_rows, size)


def held_out_rows(corpus: Corpus, tokenizer: Tokenizer, n_tokens: int) -> Tensor:
    """The held-out modules laid end to end, as whole rows [rows, n_tokens + 1]."""
    ids = bpe.special_ids(tokenizer)
    stream = [i for f in corpus.held_out for i in (ids.begin, *tokenizer.encode(f.text).ids, ids.end)]
    n_rows = len(stream) // (n_tokens + 1)
    return torch.tensor(stream[: n_rows * (n_tokens + 1)]).view(n_rows, n_tokens + 1)


def cursor_cuts(rng: random.Random, text: str) -> list[int]:
    """Choose a share `CUT_LINES` of the lines; return the offsets behind their indentations, ascending."""
    ends = [match.end() for match in re.finditer(r"^[ \t]+(?=\S)", text, re.MULTILINE)]
    return [end for end in ends if rng.random() < CUT_LINES]


def cut_hole(rng: random.Random, text: str) -> Hole:
    """Choose a middle: whole lines (30 %), from a line's first word on (40 %), or any span (30 %)."""
    draw = rng.random()
    if draw < 0.7:
        start, end = _line_span(rng, text, from_first_word=draw >= 0.3)
    else:
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.randint(1, max(1, min(400, len(text) // 2))))
    return Hole(text[:start], text[start:end], text[end:])


def _line_span(rng: random.Random, text: str, from_first_word: bool) -> tuple[int, int]:
    lines = text.splitlines(keepends=True)
    first = rng.randrange(len(lines))
    n_lines = min(1 + int(rng.expovariate(0.5)), max(1, len(lines) // 2), len(lines) - first)
    start = sum(map(len, lines[:first]))
    end = start + sum(map(len, lines[first : first + n_lines]))
    if not from_first_word:
        return start, end
    start += len(lines[first]) - len(lines[first].lstrip(" \t"))
    return min(start, end), max(start, end - 1)


def render_chat(template: jinja2.Template, function: Function) -> str:
    """One exchange: the docstring's first paragraph as the wish, the source as the answer."""
    answer = f"```python\n{function.source}```"
    wish = f"Write a Python definition of `{function.name}`: {function.summary}"
    turns = [{"role": "user", "content": wish}, {"role": "assistant", "content": answer}]
    return template.render(messages=turns, bos_token=bpe.BEGIN, add_generation_prompt=False)


def _compile_template(source: str) -> jinja2.Template:
    # The settings under which Hugging Face renders chat templates.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _within(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]
