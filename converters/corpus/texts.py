"""What a source gives, whatever its form: documents, conversations, and a record of every file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

LANGUAGES: Final[Mapping[str, str]] = {
    **dict.fromkeys((".py", ".pyi"), "python"),
    **dict.fromkeys((".js", ".mjs", ".cjs", ".jsx"), "javascript"),
    **dict.fromkeys((".ts", ".tsx", ".mts"), "typescript"),
    ".java": "java",
    **dict.fromkeys((".c", ".h"), "c"),
    **dict.fromkeys((".cc", ".cpp", ".cxx", ".hpp", ".hh"), "cpp"),
    **dict.fromkeys((".cu", ".cuh"), "cuda"),
    ".go": "go",
    ".rs": "rust",
    ".cs": "csharp",
    ".php": "php",
    ".rb": "ruby",
    **dict.fromkeys((".sh", ".bash", ".zsh"), "shell"),
    ".sql": "sql",
    **dict.fromkeys((".html", ".htm", ".vue"), "html"),
    **dict.fromkeys((".css", ".scss", ".less"), "css"),
    **dict.fromkeys((".kt", ".kts"), "kotlin"),
    ".swift": "swift",
    ".lua": "lua",
    ".scala": "scala",
    ".hs": "haskell",
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml"), "config"),
    **dict.fromkeys((".md", ".rst", ".txt"), "prose"),
}
"""Suffix of a file -> its language."""


def language_of(path: str) -> str:
    """The language that a path's suffix tells; for an unknown suffix the suffix itself, or "other"."""
    suffix = PurePosixPath(path).suffix.lower()
    return LANGUAGES.get(suffix, suffix.lstrip(".") or "other")


@dataclass(frozen=True)
class FileRecord:
    """A file that text was taken from: its name, the SHA-256 of its bytes, its licence."""

    name: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Document:
    """One text: `path` within its `project` ("" for none); `file` is the name of its record.

    `whole_project` says that the project's other files are there as well, so that they make a repository.
    """

    text: str
    path: str
    language: str
    file: str
    project: str = ""
    whole_project: bool = False

    @property
    def name(self) -> str:
        """Project and path, to be read and to be hashed."""
        return f"{self.project}/{self.path}" if self.project else self.path


@dataclass(frozen=True)
class Conversation:
    """Messages with "role" and "content", in order; `file` names the record that they are from."""

    messages: tuple[Mapping[str, Any], ...]
    name: str
    file: str


@dataclass(frozen=True)
class Texts:
    """Everything that the sources gave. `files` maps a file's name to its record."""

    name: str
    documents: tuple[Document, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
