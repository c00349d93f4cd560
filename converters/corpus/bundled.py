"""The corpus that comes with dscq: source code in many languages, prose, and questions with answers.

`data/corpus/` holds whole files of permissively licensed projects, packed by `scripts/make_corpus` from
pinned packages, and conversations written for this project. `manifest.json` names every file's project,
licence and SHA-256, `LICENCES.txt` has the licences' texts.
"""

import hashlib
import json
import lzma
from functools import cache
from importlib.resources import files
from typing import Any, Final

from converters.corpus.records import read_records
from converters.corpus.texts import Document, FileRecord, Texts
from quantize.errors import CorpusError

_CONVERSATIONS: Final = "conversations.jsonl"
_OWN_LICENCE: Final = "Apache-2.0"


@cache
def bundled_texts() -> Texts:
    """Return the built-in corpus. Raises CorpusError when its files are not those of its manifest."""
    manifest = json.loads(_bytes("manifest.json"))
    documents = tuple(map(_document, lzma.decompress(_bytes("text.jsonl.xz")).decode("utf-8").splitlines()))
    digests = {_digest(document.text.encode()) for document in documents}
    if digests != {entry["sha256"] for entry in manifest["files"]}:
        raise CorpusError(
            "the built-in corpus is not the one that its manifest describes",
            hint="Install dscq again.",
        )
    records = read_records(_bytes(_CONVERSATIONS).decode("utf-8").splitlines(), _CONVERSATIONS)
    own = FileRecord(_CONVERSATIONS, _digest(_bytes(_CONVERSATIONS)), _OWN_LICENCE)
    return Texts(
        name=manifest["name"],
        documents=documents,
        conversations=records.conversations,
        files=_records(manifest) | {own.name: own},
    )


def _records(manifest: dict[str, Any]) -> dict[str, FileRecord]:
    projects = manifest["projects"]
    return {
        name: FileRecord(name, entry["sha256"], projects[entry["project"]]["licence"])
        for entry in manifest["files"]
        for name in [_file_name(entry, projects[entry["project"]]["version"])]
    }


def _document(line: str) -> Document:
    entry = json.loads(line)
    return Document(
        text=entry["text"],
        path=entry["path"],
        language=entry["language"],
        file=_file_name(entry, entry["version"]),
        project=entry["project"],
        whole_project=entry["repository"],
    )


def _file_name(entry: dict[str, Any], version: str) -> str:
    return f"{entry['project']} {version}: {entry['path']}"


def _bytes(name: str) -> bytes:
    return files("converters").joinpath("data", "corpus", name).read_bytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
