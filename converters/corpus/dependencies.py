"""Which files of a project a file needs, and an order in which what is needed comes first.

The statements that import are found with one expression per language, and what they name is looked up among
the project's own files; anything else is no dependency. Where files see each other without a statement (one
package of Java, one module of Swift, Kotlin or C#), a file needs those whose names it mentions. That is as
much as the repository-level training data of DeepSeek Coder rests on (arXiv 2401.14196, section 2.2).
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Final

_PYTHON: Final = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+\(?([\w, \t*]*)|import[ \t]+([\w., \t]+))", re.M
)
_SCRIPT: Final = re.compile(r"""(?:\bfrom|\bimport|\brequire\(|\bimport\()\s*["'](\.[^"']*)["']""")
_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]+"([^"]+)"', re.M)
_RUST: Final = re.compile(
    r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:mod[ \t]+(\w+);|use[ \t]+(?:crate|super|self)::(\w+(?:::\w+)*))",
    re.M,
)
_GO: Final = re.compile(r'^[ \t]*(?:import[ \t]+)?(?:[\w.]+[ \t]+)?"([\w./-]+)"[ \t]*$', re.M)
_QUOTED: Final = re.compile(
    r"""(?<!\w)(?:require|require_relative|require_once|include|include_once|source|@import|@use)\b[^"'\n]*["']([^"'\n]+)["']"""
)
_WORD: Final = re.compile(r"\b[A-Z]\w+")
_SCRIPT_ENDS: Final = (
    "",
    ".ts",
    ".tsx",
    ".js",
    ".jsx",
    ".mjs",
    ".vue",
    "/index.ts",
    "/index.tsx",
    "/index.js",
)


class ProjectFiles:
    """A project's files (path -> text), findable by name, stem and folder."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts
        self.by_name = _grouped((posixpath.basename(path), path) for path in texts)
        self.by_stem = _grouped((posixpath.splitext(posixpath.basename(path))[0], path) for path in texts)
        self.by_folder = _grouped((posixpath.basename(posixpath.dirname(path)), path) for path in texts)


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, path in pairs:
        groups.setdefault(key, []).append(path)
    return groups


def needed_by(path: str, files: ProjectFiles) -> list[str]:
    """Return the paths of the project's files that `path` needs, sorted."""
    finder = _FINDERS.get(posixpath.splitext(path)[1].lower())
    found = set(finder(path, files.texts[path], files)) if finder else set()
    return sorted(found - {path})


def dependency_order(texts: Mapping[str, str]) -> list[list[str]]:
    """Return the groups of files that hang together, each with what is needed before what needs it.

    `texts` maps path to text. Again and again the file with the fewest needs that are still open comes next,
    so a circle is cut at its least bound file (the paper's algorithm). Ties go by path; groups by their first
    path.
    """
    files = ProjectFiles(texts)
    needs = {path: set(needed_by(path, files)) for path in sorted(texts)}
    return [_ordered(group, needs) for group in _groups(needs)]


def _groups(needs: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield the connected parts of the graph, arrows taken both ways."""
    linked: dict[str, set[str]] = {path: set(found) for path, found in needs.items()}
    for path, found in needs.items():
        for other in found:
            linked[other].add(path)
    seen: set[str] = set()
    for path in linked:
        group, waiting = [], [path]
        while waiting:
            if (current := waiting.pop()) not in seen:
                seen.add(current)
                group.append(current)
                waiting += linked[current]
        if group:
            yield sorted(group)


def _ordered(group: Sequence[str], needs: Mapping[str, set[str]]) -> list[str]:
    wanted_by = _grouped((needed, path) for path in group for needed in needs[path])
    n_open = {path: len(needs[path]) for path in group}
    heap = [(count, path) for path, count in n_open.items()]
    heapify(heap)
    order = list[str]()
    while heap:
        count, path = heappop(heap)
        if n_open.get(path) != count:
            continue  # an older entry, or a file that stands already
        order.append(path)
        del n_open[path]
        for other in wanted_by.get(path, ()):
            if other in n_open:
                n_open[other] -= 1
                heappush(heap, (n_open[other], other))
    return order


def _python(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    folder = posixpath.dirname(path)
    for base, names, plain in _PYTHON.findall(text):
        modules = [module.split()[0] for module in plain.split(",") if module.split()] if plain else [base]
        for module in modules:
            dots = len(module) - len(module.lstrip("."))
            home = folder
            for _ in range(dots - 1):
                home = posixpath.dirname(home)
            inner = module.lstrip(".").replace(".", "/")
            parts = [n.split()[0] for n in names.split(",") if n.split()]
            stems = [inner, *(f"{inner}/{part}".lstrip("/") for part in parts)]
            for stem in filter(None, stems):
                ends = (f"{stem}.py", f"{stem}/__init__.py")
                yield from _at(home, ends, files) if dots else _ending(ends, files)


def _script(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    for target in _SCRIPT.findall(text):
        stem = posixpath.splitext(target)[0] if target.endswith((".js", ".mjs")) else target
        names = [name + end for name in (target, stem) for end in _SCRIPT_ENDS]
        yield from list(_at(posixpath.dirname(path), names, files))[:1]


def _include(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    for target in _INCLUDE.findall(text):
        beside = list(_at(posixpath.dirname(path), (target,), files))
        yield from beside or _ending((target,), files)


def _rust(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    folder, stem = posixpath.split(posixpath.splitext(path)[0])
    home = folder if stem in ("mod", "lib", "main") else posixpath.join(folder, stem)
    for module, used in _RUST.findall(text):
        if module:
            yield from _at(home, (f"{module}.rs", f"{module}/mod.rs"), files)
        parts = used.split("::") if used else []
        for n in range(len(parts), 0, -1):
            stem_path = "/".join(parts[:n])
            yield from _ending((f"{stem_path}.rs", f"{stem_path}/mod.rs"), files)


def _go(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    """Go imports folders: every file of the folder is needed."""
    for target in _GO.findall(text):
        beside = files.by_folder.get(posixpath.basename(target), ())
        yield from (other for other in beside if other.endswith(".go"))


def _quoted(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    suffix = posixpath.splitext(path)[1]
    for target in _QUOTED.findall(text):
        folder, name = posixpath.split(target)
        names = (target, target + suffix, posixpath.join(folder, f"_{name}{suffix}"))
        yield from _at(posixpath.dirname(path), names, files)


def _named(path: str, text: str, files: ProjectFiles) -> Iterator[str]:
    suffix = posixpath.splitext(path)[1]
    for word in set(_WORD.findall(text)):
        yield from (other for other in files.by_stem.get(word, ()) if other.endswith(suffix))


def _at(folder: str, names: Sequence[str], files: ProjectFiles) -> Iterator[str]:
    """Yield those of the names, taken from the folder on, that are files of the project."""
    for name in names:
        path = posixpath.normpath(posixpath.join(folder, name))
        if path in files.texts:
            yield path


def _ending(names: Sequence[str], files: ProjectFiles) -> Iterator[str]:
    """Yield the files whose paths end with one of the names."""
    for name in names:
        candidates = files.by_name.get(posixpath.basename(name), ())
        yield from (path for path in candidates if path == name or path.endswith(f"/{name}"))


_FINDERS: Final[Mapping[str, Callable[[str, str, ProjectFiles], Iterator[str]]]] = {
    **dict.fromkeys((".py", ".pyi"), _python),
    **dict.fromkeys((".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".mts", ".vue"), _script),
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".m", ".mm"), _include),
    **dict.fromkeys((".java", ".kt", ".cs", ".swift", ".scala"), _named),
    **dict.fromkeys((".rb", ".sh", ".css", ".scss", ".less", ".lua"), _quoted),
    ".php": _named,
    ".go": _go,
    ".rs": _rust,
}
