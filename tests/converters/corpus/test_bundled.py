"""The corpus that comes with dscq: its parts, its licences, and what it must not hold."""

import ast
import hashlib
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from converters.corpus import bundled
from converters.corpus.bundled import bundled_texts
from converters.corpus.dependencies import dependency_order
from converters.corpus.repository import projects_of
from quantize.errors import CorpusError

DATA = files("converters").joinpath("data", "corpus")
PERMISSIVE = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", "Zlib", "PSF-2.0", "0BSD"}
PROSE = ("english", "chinese")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DATA.joinpath("manifest.json").read_text("utf-8"))
    return content


def test_it_is_pinned() -> None:
    pinned = {
        "text.jsonl.xz": "32559c4f0d0360474c6bd8df129d33917988dff199cc65bf08e68f1be44759b8",
        "conversations.jsonl": "a9de9ccb155bf07008aec18ce15ec0e49a7a7a9c4389d94826cd33e35209233b",
    }
    found = {name: hashlib.sha256(DATA.joinpath(name).read_bytes()).hexdigest() for name in pinned}
    assert found == pinned


def test_every_file_is_the_manifests(manifest: dict[str, Any]) -> None:
    texts = bundled_texts()
    assert len(texts.documents) == len(manifest["files"])
    for document in texts.documents:
        assert texts.files[document.file].sha256 == hashlib.sha256(document.text.encode()).hexdigest()


def test_another_text_than_the_manifests_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bundled._bytes
    changed = {"manifest.json": whole("manifest.json").replace(b'"sha256": "', b'"sha256": "0', 1)}
    monkeypatch.setattr(bundled, "_bytes", lambda name: changed.get(name) or whole(name))
    with pytest.raises(CorpusError, match="not the one that its manifest describes"):
        bundled.bundled_texts.__wrapped__()


def test_languages_have_their_shares() -> None:
    sizes: Counter[str] = Counter()
    for document in bundled_texts().documents:
        sizes[document.language] += len(document.text.encode())
    total = sum(sizes.values())
    assert 2_000_000 < total < 3_500_000
    assert 0.84 < sum(n for name, n in sizes.items() if name not in PROSE) / total < 0.92
    assert len(sizes) >= 20 and set(PROSE) < set(sizes)
    assert max(sizes.values()) == sizes["python"] < total / 5
    assert min(sizes.values()) > 25_000


def test_the_texts_are_clean() -> None:
    for document in bundled_texts().documents:
        assert document.text.endswith("\n") and len(document.text) <= 36_000, document.name
        longest = max(map(len, document.text.split("\n")))
        assert longest <= (1500 if document.language in PROSE else 400), document.name
        assert not re.search(r"[\0-\x08\x0b\x0e-\x1f\ufffd\r]", document.text), document.name


def test_every_project_is_permissive_and_its_licence_is_there(manifest: dict[str, Any]) -> None:
    text = DATA.joinpath("LICENCES.txt").read_text("utf-8")
    assert {entry["project"] for entry in manifest["files"]} == set(manifest["projects"])
    for name, project in manifest["projects"].items():
        assert set(re.split(r" (?:AND|OR) ", project["licence"])) <= PERMISSIVE, name
        assert project["texts"], name
        for path in project["texts"]:
            assert f"{name} {project['version']}: {path}\n" in text


def test_no_project_is_one_that_quality_is_measured_on(shared: Path, manifest: dict[str, Any]) -> None:
    script = shared / "benchtext" / "make_benchtext.py"
    if not script.is_file():
        pytest.skip("the shared folder has no benchtext/make_benchtext.py")
    tables = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(script.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
        if target.id in ("PYPI", "NPM")
    }
    measured = {plain(name) for table in tables.values() for name in table}
    assert len(measured) > 50
    assert not measured & {plain(name) for name in manifest["projects"]}


def plain(name: str) -> str:
    return re.sub(r"[-_./@]+", "", name).lower()


def test_conversations_are_plural_and_their_python_parses() -> None:
    conversations = bundled_texts().conversations
    answers = [m["content"] for c in conversations for m in c.messages if m["role"] == "assistant"]
    assert 60 <= len(conversations) <= 100
    assert sum(bool(re.search("[\u4e00-\u9fff]", c.messages[0]["content"])) for c in conversations) >= 12
    languages = {name for answer in answers for name in re.findall(r"^```(\w+)$", answer, re.MULTILINE)}
    assert len(languages) >= 18
    # One answer shows a changed line alone, which is no program.
    blocks = [
        b for a in answers for b in re.findall(r"```python\n(.*?)```", a, re.DOTALL) if b.count("\n") > 1
    ]
    assert len(blocks) > 20
    for block in blocks:
        ast.parse(block)


def test_whole_projects_hang_together() -> None:
    """At least ten of the projects have files that need one another."""
    projects = projects_of(bundled_texts().documents)
    largest = {
        name: max(map(len, dependency_order({d.path: d.text for d in documents})))
        for name, documents in projects.items()
    }
    assert sum(size > 2 for size in largest.values()) >= 10, largest
