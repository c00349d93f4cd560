"""`dscq convert --to gptq:` as a user runs it."""

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from converters.cli import dscq
from converters.corpus import rows
from quantize.errors import ArchiveError, DscqError, UsageError

ROWS = ("--rows", "4", "--length", "96", "--long-rows", "0")


def run(*arguments: str | Path) -> Result:
    """Run the command line in this process; DscqErrors come out as they are."""
    return CliRunner().invoke(dscq, [str(argument) for argument in arguments], catch_exceptions=True)


def error(*arguments: str | Path) -> DscqError:
    """Return the error that a command ends in."""
    exception = run(*arguments).exception
    assert isinstance(exception, DscqError)
    return exception


def test_without_an_archive_one_is_made_first(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(rows.CorpusOptions, n_rows=4, length=96, n_long=0)
    monkeypatch.setattr(rows, "CorpusOptions", few)
    result = run(
        "convert", demo_folder, "--to", "gptq:4bit-32g", "-o", tmp_path, "--no-proof", "--effort", "fast"
    )
    assert result.exit_code == 0, result.output
    assert f"calibrating: statistics on the built-in text, in {tmp_path / 'stats'}" in result.stderr
    assert "first tokens  100.0 %  5 of 5" in result.stderr
    assert f"wrote {tmp_path / 'gptq-4bit-32g'}" in result.stdout
    assert "share of the outputs' energy lost" in result.stderr
    config = json.loads((tmp_path / "gptq-4bit-32g" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4
    # The second time it is there, and another format is made of it too.
    again = run(
        "convert",
        demo_folder,
        "--to",
        "gguf:Q4_K_M",
        "--stats",
        tmp_path / "stats",
        "-o",
        tmp_path,
        "--no-proof",
    )
    assert again.exit_code == 0, again.output


def test_a_dry_run_needs_no_archive_and_names_the_readers(demo_folder: Path, tmp_path: Path) -> None:
    result = run("convert", demo_folder, "--to", "gptq:4bit-32g", "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    for reader in ("auto-gptq", "GPTQModel", "exllamav2", "vLLM"):
        assert reader in result.stdout


def test_diagonals_alone_are_refused_before_the_work(demo_folder: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    assert run("calibrate", demo_folder, *ROWS, "--diagonal-only", "-o", stats).exit_code == 0
    caught = error("convert", demo_folder, "--to", "gptq:4bit-32g", "--stats", stats, "-o", tmp_path / "out")
    assert isinstance(caught, ArchiveError) and "holds diagonals alone" in str(caught)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "gptq:4bit-32g", "--pure"), "--pure: only for gguf:, which is not asked for"),
        (("--to", "gptq:4bit-32g", "--rounding", "plain"), "--rounding: only for gguf:"),
        (("--to", "gguf:Q4_K_M", "--tp", "2"), "--tp: only for gptq:, which is not asked for"),
        (("--to", "gguf:F16", "--effort", "high"), "--effort: nothing here is rounded with Hessians"),
        (("--to", "gptq:4bit-32g", "--tensor-type", "down=Q6_K"), "a type of gguf:, which is not asked for"),
        (("--to", "gptq:7bit-32g"), "gptq:7bit-32g: expected BITSbit-GROUPg"),
        (("--to", "gptq"), "--to gptq: the type is missing"),
    ],
)
def test_options_that_would_be_ignored_are_usage_errors(
    demo_folder: Path, options: tuple[str, ...], message: str
) -> None:
    caught = error("convert", demo_folder, *options)
    assert isinstance(caught, UsageError) and message in str(caught)
