"""Rows of several files: what needs what, what stands first, and the path before each file."""

import pytest

from converters.corpus.dependencies import ProjectFiles, dependency_order, needed_by
from converters.corpus.repository import projects_of, repository_rows
from converters.corpus.texts import Document
from converters.tokenizer import CheckpointTokenizer
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]

CASES = {
    "python": {
        "app/main.py": "from app.model import Net\nfrom . import data\nimport os, app.log as log\n",
        "app/model.py": "import torch\n",
        "app/data.py": "from .log import say\n",
        "app/log.py": "",
    },
    "typescript": {
        "src/index.ts": 'import { a } from "./a";\nexport * from "./lib";\n',
        "src/a.ts": 'const b = require("./b.js");\nimport fs from "fs";\n',
        "src/b.ts": "",
        "src/lib/index.ts": 'import "../b";\n',
    },
    "c": {
        "src/main.c": '#include <stdio.h>\n#include "list.h"\n',
        "src/list.h": '#  include "core/types.h"\n',
        "include/core/types.h": "",
    },
    "java": {
        "a/Main.java": "class Main { Shape s = new Circle(); }",
        "a/Circle.java": "class Circle extends Shape {}",
        "b/Shape.java": "class Shape {}",
    },
    "go": {
        "main.go": 'package main\n\nimport (\n\t"fmt"\n\n\tst "example.com/x/store"\n)\n',
        "store/disk.go": "package store\n",
    },
    "rust": {
        "src/lib.rs": "pub mod parse;\nmod tree;\n",
        "src/parse.rs": "use crate::tree::Node;\n",
        "src/tree.rs": "",
    },
    "php": {"A.php": "class A extends Base {}", "Base.php": "<?php class Base {}"},
    "ruby": {"a.rb": "require_relative 'b'\n", "b.rb": ""},
    "scss": {"main.scss": '@use "colors";\n', "_colors.scss": ""},
}
NEEDS = {
    "python": {"app/main.py": ["app/data.py", "app/log.py", "app/model.py"], "app/data.py": ["app/log.py"]},
    "typescript": {
        "src/index.ts": ["src/a.ts", "src/lib/index.ts"],
        "src/a.ts": ["src/b.ts"],
        "src/lib/index.ts": ["src/b.ts"],
    },
    "c": {"src/main.c": ["src/list.h"], "src/list.h": ["include/core/types.h"]},
    "java": {"a/Main.java": ["a/Circle.java", "b/Shape.java"], "a/Circle.java": ["b/Shape.java"]},
    "go": {"main.go": ["store/disk.go"]},
    "rust": {"src/lib.rs": ["src/parse.rs", "src/tree.rs"], "src/parse.rs": ["src/tree.rs"]},
    "php": {"A.php": ["Base.php"]},
    "ruby": {"a.rb": ["b.rb"]},
    "scss": {"main.scss": ["_colors.scss"]},
}


@pytest.mark.parametrize("name", CASES)
def test_needs_are_found(name: str) -> None:
    files = ProjectFiles(CASES[name])
    assert {path: found for path in files.texts if (found := needed_by(path, files))} == NEEDS[name]


@pytest.mark.parametrize("name", CASES)
def test_what_is_needed_stands_before(name: str) -> None:
    (order,) = dependency_order(CASES[name])
    assert sorted(order) == sorted(CASES[name])
    for path, needs in NEEDS[name].items():
        assert all(order.index(needed) < order.index(path) for needed in needs)


def test_a_circle_is_cut_and_groups_stay_apart() -> None:
    files = {
        "a.py": "import b\n",
        "b.py": "import c\nimport d\n",
        "c.py": "import a\n",
        "d.py": "",
        "z.py": "",
    }
    assert dependency_order(files) == [["d.py", "a.py", "c.py", "b.py"], ["z.py"]]


def documents(files: dict[str, str]) -> list[Document]:
    return [Document(text, path, "python", path, "p", True) for path, text in files.items()]


def test_a_row_is_files_under_their_paths(demo: Model) -> None:
    tokenizer = demo[0]
    ordered = projects_of(documents({"main.py": "import lib\nlib.f()\n", "lib.py": "def f(): ...\n\n\n"}))[
        "p"
    ]
    (row,) = repository_rows(tokenizer, ordered, 2048)
    wanted = "#lib.py\ndef f(): ...\n#main.py\nimport lib\nlib.f()\n"
    assert row.ids == tokenizer.encode(wanted)
    assert [d.path for d in row.documents] == ["lib.py", "main.py"]


def test_the_last_file_is_cut_at_the_rows_end(demo: Model) -> None:
    files = {"a.py": "x = 1\n" * 10, "b.py": "import a\n" + "y = 2\n" * 500}
    (row,) = repository_rows(demo[0], projects_of(documents(files))["p"], 256)
    text = demo[0].decode(row.ids, skip_control=True)
    assert 240 < len(row.ids) <= 256
    assert text.startswith("#a.py\nx = 1\n") and "#b.py\nimport a\n" in text and text.endswith("y = 2\n")


def test_one_file_is_no_repository(demo: Model) -> None:
    assert projects_of(documents({"a.py": "x = 1\n"})) == {}
    huge = projects_of(documents({"a.py": "x = 1\n" * 999, "b.py": "y = 1\n"}))["p"]
    assert list(repository_rows(demo[0], huge, 128)) == []
