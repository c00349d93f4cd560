"""The training text: the Python sources of the running interpreter's standard library.

Left out: the interpreter's own tests, bundled third-party packages, and generated tables (character maps, the
help topics, the build configuration), which would teach columns of numbers instead of code. A few modules are
held out of training entirely: they measure what the model learnt about Python, not about these files.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = ("calendar.py", "fractions.py", "heapq.py", "queue.py", "shlex.py", "textwrap.py")
SKIPPED_FOLDERS = frozenset(
    {"encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests", "turtledemo", "__pycache__"}
)
SKIPPED_FILES = frozenset({"html/entities.py", "msilib/schema.py"})
MIN_CHARS = 200


@dataclass(frozen=True)
class SourceFile:
    """One module of the standard library: its path below the library's root, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training files and held-out files, each in the order of their names."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Function:
    """A function or class, moved to column 0, with the first paragraph of its docstring ("" where none)."""

    name: str
    source: str
    summary: str


def read_corpus() -> Corpus:
    """Read the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [SourceFile(str(path.relative_to(root)), _read(path)) for path in sorted(root.rglob("*.py"))]
    files = [file for file in files if _is_wanted(file)]
    return Corpus(
        train=tuple(file for file in files if file.name not in HELD_OUT),
        held_out=tuple(file for file in files if file.name in HELD_OUT),
    )


def read_functions(files: tuple[SourceFile, ...]) -> tuple[Function, ...]:
    """Return every function, method and class of the files, dedented; unparsable files are passed over."""
    return tuple(function for file in files for function in _functions_of(file.text))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _is_wanted(file: SourceFile) -> bool:
    path = Path(file.name)
    generated = path.name.startswith("_sysconfigdata") or file.name in SKIPPED_FILES
    return not generated and SKIPPED_FOLDERS.isdisjoint(path.parts) and len(file.text) >= MIN_CHARS


def _functions_of(text: str) -> Iterator[Function]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).strip("\n") + "\n"
            yield Function(node.name, source, _summary(node))


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    return " ".join(docstring.split("\n\n")[0].split())
