"""Records of a JSONL or Parquet file, or of a dataset: each is a document or a conversation.

{"text": ...} or {"content": ...}                 a document; "path" names it where it is there
{"instruction": ..., "output": ...}               a conversation of one exchange, as the family is fine-tuned
{"messages": [{"role": ..., "content": ...}]}     a conversation
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.corpus.texts import Conversation, Document, language_of
from quantize.errors import CorpusError

_SHAPES: Final = "expected text, content, instruction with output, or messages"
_HALF: Final = "half of a surrogate pair, which is no text"
_MOST_REASONS: Final = 5
_ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True)
class Records:
    """What the records of one file gave."""

    documents: tuple[Document, ...]
    conversations: tuple[Conversation, ...]


def read_records(lines: Iterable[str], file: str) -> Records:
    """Read the lines of a JSONL file, blank ones passed over.

    Raises CorpusError with the first five lines that are no JSON object or have none of the known shapes.
    """
    return sort_records(_parsed(lines), file)


def sort_records(records: Iterable[tuple[int, Any]], file: str) -> Records:
    """Sort numbered records into documents and conversations; raises CorpusError as `read_records` does."""
    documents: list[Document] = []
    conversations: list[Conversation] = []
    reasons: list[str] = []
    for number, record in records:
        made = _made(record, number, file)
        if isinstance(made, Document):
            documents.append(made)
        elif isinstance(made, Conversation):
            conversations.append(made)
        else:
            reasons.append(f"record {number}: {made}")
        if len(reasons) == _MOST_REASONS:
            break
    if reasons:
        raise CorpusError(f"{file}: not all records can be read", reasons=reasons)
    return Records(tuple(documents), tuple(conversations))


def _parsed(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, error


def _made(record: Any, number: int, file: str) -> Document | Conversation | str:
    """The document or conversation of a record, or what is wrong with it."""
    if isinstance(record, ValueError):
        return f"not JSON: {record}"
    if not isinstance(record, Mapping):
        return f"a JSON {type(record).__name__}, expected an object"
    if record.get("messages") is not None:
        return _conversation(record["messages"], number, file)
    if "instruction" in record and "output" in record:
        parts = (record["instruction"], record.get("input") or "")
        if not all(isinstance(part, str) for part in parts):
            return "an instruction or input that is not text"
        wish = "\n".join(part for part in parts if part)
        turns = [{"role": "user", "content": wish}, {"role": "assistant", "content": record["output"]}]
        return _conversation(turns, number, file)
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        return f"found {', '.join(map(str, record)) or 'nothing'}; {_SHAPES}"
    if not _is_unicode(text):
        return _HALF
    path = record.get("path") if isinstance(record.get("path"), str) else f"record {number}"
    return Document(text, str(path), language_of(str(record.get("path") or "")), file)


def _conversation(messages: Any, number: int, file: str) -> Conversation | str:
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of messages"
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            return f"a message without a role of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return "a message whose content is not text"
        if not _is_unicode(message["content"]):
            return _HALF
    return Conversation(tuple(messages), f"{file}: record {number}", file)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
