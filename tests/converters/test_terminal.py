"""What the terminal prints, and on which stream."""

import io
import json

import pytest
from rich.console import Console

from converters.terminal import Terminal
from quantize.errors import DscqError


def terminal(*, quiet: bool = False, as_json: bool = False) -> tuple[Terminal, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Terminal(quiet, as_json, Console(file=out), Console(file=err, width=200)), out, err


def test_a_stage_is_one_line_per_step_where_there_is_no_terminal() -> None:
    made, out, err = terminal()
    with made.stage("convert", 100) as advance:
        advance(25, "token_embd.weight")
        advance(75, "output.weight")
    lines = err.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["convert", "convert"]
    assert "25.0 %" in lines[0]
    assert "token_embd.weight" in lines[0]
    assert "100.0 %" in lines[1]
    assert out.getvalue() == ""


def test_quiet_leaves_results_and_errors() -> None:
    made, out, err = terminal(quiet=True)
    made.say("a note")
    with made.stage("convert", 1) as advance:
        advance(1, "tensor")
    assert err.getvalue() == ""
    made.result("a result")
    made.error(DscqError("it broke", reasons=["why", "and why"], hint="do this"))
    assert out.getvalue() == "a result\n"
    assert err.getvalue() == "error: it broke\n  - why\n  - and why\ndo this\n"


def test_json_keeps_tables_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    made, out, _ = terminal(as_json=True)
    made.table("t", ["a"], [["1"]])
    made.result("text")
    made.document({"a": 1})
    assert out.getvalue() == ""
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_table_cells_are_never_read_as_markup() -> None:
    made, out, _ = terminal()
    made.table("title", ["name", ">bytes"], [["[PAD32022]", "12"]])
    assert "[PAD32022]" in out.getvalue()
