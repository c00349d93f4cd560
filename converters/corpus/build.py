"""`build_corpus`: which text becomes which row, until the budget of tokens is used up.

The kinds are served in the order of how choosy they are: long rows, repository, infill, chat, and completion.
That takes any text, and so takes over what the others could not use. No text is in two rows of whatever kind.
Noise comes last, in its share of what there is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from converters.corpus.bundled import bundled_texts
from converters.corpus.chat import chat_ids, chat_template, render
from converters.corpus.infill import has_marks, infill_row
from converters.corpus.noise import noise_rows
from converters.corpus.order import Draws, in_turns, shuffled
from converters.corpus.pieces import head_of
from converters.corpus.repository import projects_of, repository_rows
from converters.corpus.rows import (
    DEFAULT_LENGTH,
    NOISE,
    SHORTEST,
    TRAINED_REACH,
    Corpus,
    CorpusOptions,
    Kind,
    TokenRow,
    count_by_kind,
    ids_digest,
)
from converters.corpus.sources import read_sources
from converters.corpus.texts import Document, Texts
from converters.tokenizer import CheckpointTokenizer
from quantize.errors import CorpusError, UsageError
from quantize.llama import LlamaConfig


def build_corpus(tokenizer: CheckpointTokenizer, config: LlamaConfig, options: CorpusOptions) -> Corpus:
    """Return the calibration rows for a model; equal arguments and equal files give equal rows.

    Raises UsageError for options that cannot be met (all at once), CorpusError for text that cannot be read
    or is too little for a single row. Where there is less text than the budget asks for, the rows are fewer
    and a note says so.
    """
    length = _checked_length(options, config)
    texts = bundled_texts() if options.sources is None else read_sources(options.sources)
    builder = _Builder(tokenizer, config, options, texts, length)
    rows = tuple(builder.rows())
    if not rows:
        raise CorpusError(builder.too_little(), reasons=builder.notes)
    if builder.made < builder.budget * 9 // 10:
        builder.notes.append(
            f"the text gives {builder.made:,} of the {builder.budget:,} tokens asked for: fewer rows are used"
        )
    notes = (*texts.notes, *builder.notes)
    return Corpus(rows, _identity(rows, builder, length, notes), notes)


def _checked_length(options: CorpusOptions, config: LlamaConfig) -> int:
    """The length of ordinary rows; raises UsageError with all that is wrong in the options."""
    length = min(DEFAULT_LENGTH, config.context_length) if options.length is None else options.length
    shares = asdict(options.shares)
    reasons = []
    if options.n_rows < 1:
        reasons.append(f"rows: found {options.n_rows}, expected 1 or more")
    if not SHORTEST <= length <= config.context_length:
        reasons.append(
            f"length: found {length}, expected {SHORTEST} to the model's context of {config.context_length}"
        )
    if options.n_long < 0:
        reasons.append(f"long rows: found {options.n_long}, expected 0 or more")
    if options.n_long and options.long_length <= TRAINED_REACH:
        reasons.append(f"long length: found {options.long_length}, expected more than {TRAINED_REACH}")
    if min(shares.values()) < 0 or not options.shares.text:
        told = ", ".join(f"{kind} {share:g}" for kind, share in shares.items())
        reasons.append(f"shares: found {told}; expected 0 or more, and some text")
    if options.sources is not None and not options.sources:
        reasons.append("sources: none given")
    if reasons:
        raise UsageError("the calibration rows cannot be made as asked", reasons=reasons)
    return length


def _identity(
    rows: Sequence[TokenRow], builder: "_Builder", length: int, notes: Sequence[str]
) -> dict[str, object]:
    """Everything that the rows follow from, and their digest; JSON-able."""
    records = (builder.texts.files[name] for name in sorted(builder.used_files))
    return {
        "name": builder.texts.name,
        "tokenizer": builder.tokenizer.fingerprint,
        "options": _told(builder.options) | {"length": length},
        "files": [asdict(record) for record in records],
        "n_rows": len(rows),
        "n_tokens": sum(len(row.ids) for row in rows),
        "longest": max(len(row.ids) for row in rows),
        "kinds": count_by_kind(rows),
        "ids_sha256": ids_digest(rows),
        "notes": list(notes),
    }


def _told(options: CorpusOptions) -> dict[str, Any]:
    """The options as JSON has them; no noise is not told, as in corpora from before there was any."""
    told = asdict(options) | {"sources": None if options.sources is None else list(options.sources)}
    if not options.shares.noise:
        del told["shares"][NOISE]
    return told


@dataclass
class _Builder:
    """The text that is still unused, the tokens of text asked for, and how many are left to make."""

    tokenizer: CheckpointTokenizer
    config: LlamaConfig
    options: CorpusOptions
    texts: Texts
    length: int
    notes: list[str] = field(default_factory=list)
    used_files: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.template = chat_template(self.tokenizer.vocabulary)
        self.projects = projects_of(self.texts.documents)
        self.queue = in_turns(self.texts.documents, self.options.seed)
        self.used: set[int] = set()
        self.leftovers: list[tuple[Document, str]] = []
        asked = self.options.n_rows * self.length
        self.budget = self.left = round(asked * (1 - self.options.shares.of("noise")))

    @property
    def made(self) -> int:
        """Tokens of text in the rows made so far."""
        return self.budget - self.left

    def rows(self) -> Iterator[TokenRow]:
        """Yield the rows of every kind, long ones first."""
        shares, asked = self.options.shares, self.options.n_rows * self.length
        yield from self._charged(self._long())
        makers: dict[Kind, Callable[[], Iterator[TokenRow]]] = {
            "repository": self._repository,
            "infill": self._infill,
            "chat": self._chat,
        }
        for kind, make in makers.items():
            yield from self._filled(make(), round(asked * shares.of(kind)))
        rest = self.left if shares.completion else 0
        yield from self._filled(self._completion(), rest)
        n_noise = self.made * shares.noise / shares.text
        yield from noise_rows(self.tokenizer, self.length, n_noise, self.options.seed)

    def too_little(self) -> str:
        """The message of a corpus without a row."""
        if not self.texts.documents:
            return (
                "the text is conversations only, and no row can be made of them: give it source code as well"
            )
        # A count of the first documents is enough: had they held a row, there would be one.
        n_tokens = sum(len(self.tokenizer.encode(d.text, add_bos=False)) for d in self.texts.documents[:64])
        return f"no row can be made of the text: found {n_tokens} tokens, a row has {SHORTEST} at least"

    def _without(self, kind: Kind, cause: str) -> None:
        """Note that there are no rows of a kind, and who gets their share."""
        heir = "completion" if self.options.shares.completion else "nobody, as completion has none"
        self.notes.append(f"no {kind} rows: {cause}; their share goes to {heir}")

    def _filled(self, rows: Iterator[TokenRow], share: int) -> Iterator[TokenRow]:
        """Yield rows until a share is used up; the last may pass it by less than half of itself."""
        share = min(share, self.left)
        while share > 0 and (row := next(rows, None)) is not None:
            if len(row.ids) > 2 * share:
                break
            share -= len(row.ids)
            yield from self._charged(iter((row,)))

    def _charged(self, rows: Iterator[TokenRow]) -> Iterator[TokenRow]:
        for row in rows:
            self.left -= len(row.ids)
            yield row

    def _row(self, ids: Sequence[int], kind: Kind, documents: Sequence[Document]) -> TokenRow:
        """Make a row, and count its documents as used."""
        self.used.update(map(id, documents))
        self.used_files.update(document.file for document in documents)
        source = (
            documents[0].name if len(documents) == 1 else f"{documents[0].name} and {len(documents) - 1} more"
        )
        return TokenRow(torch.tensor(ids, dtype=torch.int64), kind, source)

    def _unused(self) -> Iterator[Document]:
        return (d for d in self.queue if id(d) not in self.used)

    def _long(self) -> Iterator[TokenRow]:
        """Rows past position 4096: of a project's files and of a long document, in turns."""
        limit = min(self.options.long_length, self.config.context_length)
        wanted = min(self.options.n_long, self.left // (2 * limit))
        if not self.options.n_long:
            return
        if limit <= TRAINED_REACH:
            self.notes.append(f"no row passes position {TRAINED_REACH}: the context has {limit} positions")
            return
        if not wanted:
            self.notes.append(
                f"no row passes position {TRAINED_REACH}: too few tokens asked for, it takes {2 * limit:,}"
            )
            return
        makers = [self._long_repository(limit), self._long_document(limit)]
        n_made = 0
        while makers and n_made < wanted:
            maker = makers.pop(0)
            if (row := next(maker, None)) is not None:
                makers.append(maker)
                n_made += 1
                yield row
        if n_made < wanted:
            self.notes.append(
                f"{n_made} of {wanted} rows pass position {TRAINED_REACH}: no more text is long enough"
            )

    def _long_repository(self, limit: int) -> Iterator[TokenRow]:
        if not self.options.shares.repository:
            return
        for name in shuffled(self.projects, self.options.seed):
            for row in repository_rows(self.tokenizer, self._open(name), limit):
                if len(row.ids) > TRAINED_REACH:
                    yield self._row(row.ids, "repository", row.documents)
                    break

    def _long_document(self, limit: int) -> Iterator[TokenRow]:
        if not self.options.shares.completion:
            return
        for document in sorted(self._unused(), key=lambda d: -len(d.text)):
            if id(document) in self.used:  # by a repository row that was made meanwhile
                continue
            ids = self._whole(document.text, limit)
            if len(ids) <= TRAINED_REACH:
                return
            yield self._row(ids, "completion", (document,))

    def _repository(self) -> Iterator[TokenRow]:
        """Rows of the projects in turns, so that every prefix is plural."""
        open_projects = [
            repository_rows(self.tokenizer, self._open(name), self.length)
            for name in shuffled(self.projects, self.options.seed)
        ]
        if not open_projects and self.options.shares.repository:
            self._without("repository", "no source is a folder of several files")
        while open_projects:
            maker = open_projects.pop(0)
            if (row := next(maker, None)) is not None:
                open_projects.append(maker)
                yield self._row(row.ids, "repository", row.documents)

    def _open(self, name: str) -> list[Document]:
        return [d for d in self.projects[name] if id(d) not in self.used]

    def _infill(self) -> Iterator[TokenRow]:
        if not self.options.shares.infill:
            return
        if not has_marks(self.tokenizer.vocabulary):
            self._without("infill", "the model has no marks for them")
            return
        for document in list(self._unused()):
            draws = Draws(self.options.seed, f"infill/{document.name}")
            infill = infill_row(self.tokenizer, document.text, self.length, draws)
            if infill is not None:
                self.leftovers.append((document, document.text[infill.end :]))
                yield self._row(infill.ids, "infill", (document,))

    def _chat(self) -> Iterator[TokenRow]:
        if not self.options.shares.chat:
            return
        if self.template is None or not self.texts.conversations:
            cause = (
                "the model has no chat template" if self.template is None else "the text has no conversations"
            )
            self._without("chat", cause)
            return
        by_name = {conversation.name: conversation for conversation in self.texts.conversations}
        for name in shuffled(by_name, self.options.seed):
            text = render(self.template, self.tokenizer.vocabulary, by_name[name].messages)
            ids = chat_ids(self.tokenizer, text)
            if len(ids) >= SHORTEST:
                self.used_files.add(by_name[name].file)
                yield TokenRow(torch.tensor(ids[: self.length], dtype=torch.int64), "chat", name)

    def _completion(self) -> Iterator[TokenRow]:
        """The first piece of every unused document, then second pieces and what infill left, and so on."""
        pieces = [(document, document.text) for document in self._unused()]
        leftovers = self.leftovers
        while pieces or leftovers:
            rest, leftovers = leftovers, []
            for document, text in pieces:
                head = head_of(self.tokenizer, text, self.length - len(self.tokenizer.encode("")))
                ids = self.tokenizer.encode(head)
                if len(ids) >= SHORTEST:
                    yield self._row(ids, "completion", (document,))
                if head and len(head) < len(text):
                    rest.append((document, text[len(head) :]))
            pieces = rest

    def _whole(self, text: str, limit: int) -> list[int]:
        return self.tokenizer.encode(head_of(self.tokenizer, text, limit - len(self.tokenizer.encode(""))))
