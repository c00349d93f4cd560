"""The user's own text: folders, files, records in three shapes, and what is said of what cannot be read."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from converters.corpus import sources
from converters.corpus.records import read_records
from converters.corpus.rows import Corpus
from converters.corpus.sources import read_sources
from quantize.errors import CorpusError, UsageError

Build = Callable[..., Corpus]

SHAPES = [
    {"text": "print(1)\n"},
    {"content": "int x;\n", "path": "src/x.c"},
    {"instruction": "Write it.", "output": "Done."},
    {"instruction": "Sum.", "input": "1 2", "output": "3"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def test_jsonl_in_all_shapes(tmp_path: Path) -> None:
    texts = read_sources([str(write_lines(tmp_path / "a.jsonl", SHAPES))])
    assert [(d.path, d.language, d.text) for d in texts.documents] == [
        ("record 1", "other", "print(1)\n"),
        ("src/x.c", "c", "int x;\n"),
    ]
    assert [[m["content"] for m in c.messages] for c in texts.conversations] == [
        ["Write it.", "Done."],
        ["Sum.\n1 2", "3"],
        ["a", "b"],
    ]


def test_a_line_separator_in_a_record_is_no_line_end(tmp_path: Path) -> None:
    (document,) = read_sources([str(write_lines(tmp_path / "a.jsonl", [{"text": "a\u2028b"}]))]).documents
    assert document.text == "a\u2028b"


def test_broken_records_are_told_with_their_numbers() -> None:
    lines = ["{", "[1]", '{"prompt": "x"}', '{"messages": [{"role": "tool"}]}', "", '{"messages": []}', "{"]
    with pytest.raises(CorpusError) as error:
        read_records(lines, "a.jsonl")
    assert str(error.value).splitlines() == [
        "a.jsonl: not all records can be read",
        "  - record 1: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "  - record 2: a JSON list, expected an object",
        "  - record 3: found prompt; expected text, content, instruction with output, or messages",
        "  - record 4: a message without a role of system, user, assistant",
        "  - record 6: messages is not a list of messages",
    ]


def test_records_that_are_no_text_are_told() -> None:
    lines = [
        '{"instruction": 5, "output": "x"}',
        '{"instruction": "a", "input": [1], "output": "x"}',
        '{"text": "half \\ud800"}',
        '{"messages": [{"role": "user", "content": "\\udfff"}]}',
    ]
    with pytest.raises(CorpusError) as error:
        read_records(lines, "a.jsonl")
    assert str(error.value).splitlines()[1:] == [
        "  - record 1: an instruction or input that is not text",
        "  - record 2: an instruction or input that is not text",
        "  - record 3: half of a surrogate pair, which is no text",
        "  - record 4: half of a surrogate pair, which is no text",
    ]


def test_files_whose_names_are_no_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / os.fsdecode(b"bad\xff.py")).write_text("y = 1\n")
    texts = read_sources([str(tmp_path)])
    assert [document.path for document in texts.documents] == ["good.py"]
    assert texts.notes == (f"{tmp_path}: files passed over: 1 with a name that is not text",)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with everything that is left out of one."""
    root = tmp_path / "project"
    for folder in ("src", ".git", "node_modules/x"):
        (root / folder).mkdir(parents=True)
    (root / "src" / "a.py").write_text("import b\n" * 20)
    (root / "src" / "b.py").write_bytes(b"x = 1\r\n" * 20)
    (root / ".git" / "config").write_text("[core]\n")
    (root / "node_modules" / "x" / "i.js").write_text("1;\n")
    (root / "logo.png").write_bytes(b"\x89PNG\0\1")
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "big.sql").write_text("-- x\n" * 300_000)
    (root / "app.min.js").write_text("a;" * 6000)
    (root / "empty.py").write_text("")
    (root / "link.py").symlink_to(root / "src" / "a.py")
    return root


def test_a_folder_is_a_project_without_what_is_not_source(tree: Path) -> None:
    texts = read_sources([str(tree)])
    assert [(d.path, d.project, d.whole_project) for d in texts.documents] == [
        ("src/a.py", "project", True),
        ("src/b.py", "project", True),
    ]
    assert texts.documents[1].text == "x = 1\n" * 20
    counts = "1 empty, 2 not UTF-8 text, 1 over 1 MiB, 1 with lines over 10,000 characters"
    assert texts.notes == (f"{tree}: files passed over: {counts}",)


def test_a_folder_makes_repository_rows(build: Build, tree: Path) -> None:
    corpus = build(tree, n_rows=4, n_long=0)
    (row,) = [row for row in corpus.rows if row.kind == "repository"]
    assert row.source == "project/src/b.py and 1 more"
    assert corpus.identity["name"] == "user"
    licences = {file["name"]: file["licence"] for file in corpus.identity["files"]}
    assert licences == {f"{tree}: src/a.py": "not stated", f"{tree}: src/b.py": "not stated"}


def test_chat_records_alone_need_a_chat_model(build: Build, tmp_path: Path) -> None:
    turns = [
        {"instruction": f"Write function number {i}. " * 5, "output": "def f(): ...\n" * 9} for i in range(9)
    ]
    corpus = build(write_lines(tmp_path / "a.jsonl", turns), n_rows=1)
    assert set(corpus.identity["kinds"]) == {"chat"}


def test_the_bound_on_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 100)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 60}] * 5)
    texts = read_sources([str(path)])
    assert len(texts.documents) == 2
    assert texts.notes == (f"{path}: only the first 2 records are used",)


def test_everything_that_is_missing_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.jsonl").write_text("{\n")
    names = [
        "no/such/folder",
        "x.txt",
        str(tmp_path / "bad.jsonl"),
        str(tmp_path / "a.parquet"),
        "owner/name",
    ]
    with pytest.raises(UsageError) as error:
        read_sources(names)
    assert str(error.value).splitlines() == [
        "not all calibration sources can be read",
        "  - no/such/folder: no such file or folder",
        "  - x.txt: no such file or folder",
        f"  - {tmp_path}/a.parquet: pyarrow is not installed",
        "  - owner/name: datasets is not installed",
        "pip install pyarrow datasets",
    ]


def test_faults_of_several_files_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    with pytest.raises(CorpusError) as error:
        read_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")])
    assert error.value.message == "the calibration text cannot be read"
    assert error.value.reasons == (
        f"{tmp_path}/a.jsonl: not all records can be read",
        "record 1: found nothing; expected text, content, instruction with output, or messages",
        f"{tmp_path}/b.txt: not UTF-8 text",
    )


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(CorpusError) as error:
        read_sources([str(tmp_path)])
    assert str(error.value).splitlines() == [
        f"no readable text in {tmp_path}",
        f"  - {tmp_path}: files passed over: 1 not UTF-8 text",
    ]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module in place of an optional package."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sources, "_installed", lambda package: True)


def test_parquet_rows_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ParquetFile:
        schema_arrow = SimpleNamespace(names=["content", "path", "stars"])

        def __init__(self, name: str) -> None:
            assert name == str(tmp_path / "a.parquet")

        def iter_batches(self, columns: list[str]) -> list[Any]:
            assert columns == ["content", "path"]
            rows = [[{"content": "x = 1\n", "path": "a.py"}], [{"content": "y = 2\n", "path": None}]]
            return [SimpleNamespace(to_pylist=lambda batch=batch: batch) for batch in rows]

    stand_in(monkeypatch, "pyarrow")
    stand_in(monkeypatch, "pyarrow.parquet", ParquetFile=ParquetFile)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    texts = read_sources([str(tmp_path / "a.parquet")])
    assert [(d.path, d.text) for d in texts.documents] == [("a.py", "x = 1\n"), ("record 2", "y = 2\n")]


def test_real_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(SHAPES[:1]), tmp_path / "a.parquet")
    (document,) = read_sources([str(tmp_path / "a.parquet")]).documents
    assert document.text == "print(1)\n"


def test_a_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (name, split, streaming) == ("owner/name", "train", True)
        return [{"instruction": "a", "output": "b", "score": 1}]

    stand_in(monkeypatch, "datasets", load_dataset=load_dataset)
    texts = read_sources(["owner/name"])
    assert [m["content"] for m in texts.conversations[0].messages] == ["a", "b"]
    assert len(texts.files["owner/name"].sha256) == 64


def test_a_dataset_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: Any) -> None:
        raise ConnectionError("no route")

    stand_in(monkeypatch, "datasets", load_dataset=load_dataset)
    with pytest.raises(CorpusError, match="the calibration text cannot be read") as error:
        read_sources(["owner/name"])
    assert error.value.reasons == ("owner/name: the dataset cannot be read: no route",)
