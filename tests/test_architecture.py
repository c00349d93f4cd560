"""The house rules that a machine can check: one direction of imports, a light `--help`, who may print."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("quantize/**/*.py"), *ROOT.glob("converters/**/*.py")])
# Runs in another environment, whose transformers are what it judges with; dscq never imports it.
WORKER = ROOT / "converters" / "runtimes" / "gptq_worker.py"
HEAVY = ("torch", "numpy", "gguf", "tokenizers", "safetensors", "huggingface_hub", "transformers")


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.is_relative_to(ROOT / "quantize")], ids=lambda p: p.name
)
def test_quantize_never_imports_converters(path: Path) -> None:
    assert not imported(path) & {"converters", "tests", "scripts"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_runs_a_checkpoints_code(path: Path) -> None:
    assert path == WORKER or "transformers" not in imported(path)
    assert "gptq_worker" not in imported(path)
    assert "trust_remote_code" not in path.read_text("utf-8")


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, converters.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def public_nodes(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions, classes and methods; what is nested in a function is nobody's interface."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            methods = node.body if isinstance(node, ast.ClassDef) else []
            yield from (m for m in methods if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_and_public_function_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    assert [node.name for node in public_nodes(tree) if ast.get_docstring(node) is None] == []
