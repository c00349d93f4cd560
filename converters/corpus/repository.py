"""Rows of several files of one project, as an editor fills the context around the file being written.

Before each file stands its path, `#path/to/file`, the form that DeepSeek Coder's README shows and its
repository-level training used; what a file needs stands before it. The last file is cut where the row ends.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from converters.corpus.dependencies import dependency_order
from converters.corpus.pieces import head_of
from converters.corpus.texts import Document
from converters.tokenizer import CheckpointTokenizer


@dataclass(frozen=True)
class Assembled:
    """A row's ids, and the documents that they are from."""

    ids: list[int]
    documents: tuple[Document, ...]


def projects_of(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Return project -> its documents in the order of need, for projects that are there as a whole."""
    grouped: dict[str, dict[str, Document]] = {}
    for document in documents:
        if document.whole_project:
            grouped.setdefault(document.project, {})[document.path] = document
    return {name: _in_order(files) for name, files in sorted(grouped.items()) if len(files) > 1}


def _in_order(files: Mapping[str, Document]) -> list[Document]:
    """Groups that hang together one after the other, the largest first; lone files come last."""
    groups = dependency_order({path: document.text for path, document in files.items()})
    return [files[path] for group in sorted(groups, key=lambda g: (-len(g), g)) for path in group]


def with_path(document: Document) -> str:
    """The document under its path."""
    return f"#{document.path}\n{document.text.rstrip()}\n"


def repository_rows(
    tokenizer: CheckpointTokenizer, ordered: Sequence[Document], limit: int
) -> Iterator[Assembled]:
    """Yield rows of at least two files and at most `limit` ids from a project's files in order.

    A file that would leave less than a quarter of the row for the next one is passed over as a row's first.
    """
    text, taken = "", list[Document]()
    for document in ordered:
        whole = text + with_path(document)
        ids = tokenizer.encode(whole)
        if len(ids) <= (limit if taken else limit * 3 // 4):
            text, taken = whole, [*taken, document]
        elif taken:
            yield Assembled(_cut(tokenizer, whole, limit), (*taken, document))
            text, taken = "", []
    if len(taken) > 1:
        yield Assembled(tokenizer.encode(text), tuple(taken))


def _cut(tokenizer: CheckpointTokenizer, text: str, limit: int) -> list[int]:
    n_added = len(tokenizer.encode(""))
    return tokenizer.encode(head_of(tokenizer, text, limit - n_added))
