"""`dscq tune` as a user runs it: better files of the same layout, and nothing overwritten."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from converters.checkpoint import open_checkpoint
from converters.cli import dscq
from converters.gguf_file import read_head
from converters.gguf_source import open_gguf
from converters.names import gguf_name, hf_name
from converters.tune import scaled_matrices
from quantize.errors import ArchiveError, DscqError, OutputError, UsageError
from quantize.reference import ReferenceModel


@dataclass(frozen=True)
class Made:
    """The embedded model, an archive of it, and its Q2_K."""

    source: Path
    stats: Path
    file: Path


def run(*arguments: str | Path) -> Result:
    """Run the command line in this process; DscqErrors come out as they are."""
    return CliRunner().invoke(dscq, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tune")
    rows = ("--rows", "24", "--length", "128", "--long-rows", "0")
    assert run("calibrate", demo_folder, *rows, "-o", folder / "stats").exit_code == 0
    convert = ("convert", demo_folder, "--stats", folder / "stats", "--to", "gguf:Q2_K", "--no-proof")
    assert run(*convert, "-o", folder).exit_code == 0
    return Made(demo_folder, folder / "stats", folder / "demo-coder-Q2_K.gguf")


def tuned(made: Made, output: Path, *others: str | Path) -> Result:
    return run("tune", made.file, "--reference", made.source, "--stats", made.stats, "-o", output, *others)


def test_convert_tunes_what_it_has_written(made: Made, tmp_path: Path) -> None:
    """The same bytes as dscq tune makes of the file, proven as they are now, and no donor of slices."""
    convert = ("convert", made.source, "--stats", made.stats, "--to", "gguf:Q2_K", "--to", "gguf:Q8_0")
    done = run(*convert, "--tune", "3", "-o", tmp_path, "--probe-tokens", "64")
    assert done.exit_code == 0, done.output
    assert "gguf:Q8_0 stays as converted: no scales that can be moved" in done.stderr
    file = tmp_path / "demo-coder-Q2_K.gguf"
    assert tuned(made, tmp_path / "apart.gguf", "--steps", "3", "--no-proof").exit_code == 0
    assert file.read_bytes() == (tmp_path / "apart.gguf").read_bytes() != made.file.read_bytes()
    report = json.loads((tmp_path / "demo-coder-Q2_K.report.json").read_text())
    assert any("scales of 35 matrices trained" in note for note in report["notes"])
    checks = {check["name"]: check["detail"] for check in report["proof"]["checks"]}
    assert checks["payload on disk"] == "hashes as written"
    again = run(*convert[:-2], "-o", tmp_path, "--force", "--no-proof")
    assert "were there from an earlier run" not in again.stderr
    assert file.read_bytes() == made.file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf:Q2_K"), "--tune: there is no text to train on"),
        (
            ("--to", "gguf:Q8_0", "--stats", "STATS"),
            "--tune: gguf:Q8_0: no type with scales that can be moved",
        ),
        (("--to", "gptq:4bit-32g", "--stats", "STATS"), "--tune: only for gguf:"),
        (("--to", "gguf:Q2_K", "--stats", "STATS", "--split-max-size", "1M"), "--tune: takes a single file"),
    ],
)
def test_convert_refuses_what_it_cannot_tune(
    made: Made, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(made.stats) if each == "STATS" else each for each in arguments]
    exception = run("convert", made.source, *given, "--tune", "2", "-o", tmp_path).exception
    assert isinstance(exception, UsageError) and message in str(exception)
    assert not list(tmp_path.iterdir())


def test_convert_says_where_training_would_help(made: Made, tmp_path: Path) -> None:
    """Files of few bits with rows to train on; not those that are trained, split, or of more bits."""
    convert = ("convert", made.source, "--dry-run", "-o", tmp_path)
    hint = "--tune would lower the loss further"
    both = run(*convert, "--to", "gguf:Q2_K", "--to", "gguf:Q4_K_M", "--stats", made.stats)
    assert f"gguf:Q2_K: {hint}" in both.stderr and f"gguf:Q4_K_M: {hint}" not in both.stderr
    for others in ((), ("--stats", made.stats, "--tune"), ("--stats", made.stats, "--split-max-size", "1M")):
        done = run(*convert, "--to", "gguf:Q2_K", *others)
        assert done.exit_code == 0 and hint not in done.stderr


def error(made: Made, output: Path, *others: str | Path) -> DscqError:
    exception = tuned(made, output, *others).exception
    assert isinstance(exception, DscqError)
    return exception


def divergence(source: Path, file: Path) -> float:
    """Return the mean KL to the checkpoint over tokens at random: no text that was trained on."""
    checkpoint, written = open_checkpoint(source), open_gguf(file)
    rows = [torch.randint(0, 2000, (64,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    found = []
    for weights in (checkpoint.weights, written.weights):
        model = ReferenceModel(checkpoint.config, weights)
        found.append(torch.cat([torch.log_softmax(model.logits(h), -1) for h in model.hidden(rows)]))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


def test_a_tuned_file_is_better_and_of_the_same_layout(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "tuned.gguf"
    result = tuned(made, output, "--steps", "12", "--no-proof", "--json")
    assert result.exit_code == 0, result.output
    assert "tune  100.0 %  12 of 12" in result.stderr
    kl = json.loads(result.stdout)["kl"]
    assert kl["after"] < 0.9 * kl["before"]
    assert divergence(made.source, output) < 0.98 * divergence(made.source, made.file)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.gguf"]
    before, after = made.file.read_bytes(), output.read_bytes()
    head = read_head(made.file)
    assert len(before) == len(after) and before[: head.data_start] == after[: head.data_start]
    moved = scaled_matrices(open_gguf(made.file)).keys()
    assert len(moved) == 5 * 7
    for entry in head.tensors:
        place = slice(head.data_start + entry.offset, head.data_start + entry.offset + entry.n_bytes)
        assert (before[place] != after[place]) is (hf_name(entry.name) in moved), entry.name
    for name, matrix in scaled_matrices(open_gguf(made.file)).items():  # the codes are as they were
        old, new = (
            matrix.kind.unpack(b.reshape(-1, matrix.kind.block_bytes)) for b in blocks(made, output, name)
        )
        assert torch.equal(old.codes, new.codes) and torch.equal(old.scales, new.scales)
        assert 0.5 < float((new.d / old.d).nanmedian()) < 2


def blocks(made: Made, output: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return open_gguf(made.file).blocks(name), open_gguf(output).blocks(name)


def test_what_is_written_is_proven(made: Made, tmp_path: Path) -> None:
    (tmp_path / "tuned.verify.report.json").write_text("of an earlier file")
    result = tuned(made, tmp_path / "tuned.gguf", "--steps", "2", "--probe-tokens", "256")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "tuned.verify.report.json").read_text("utf-8"))
    assert not report["proof"]["verdict"].startswith("failed")


def test_nothing_is_overwritten(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "tuned.gguf"
    output.write_bytes(b"precious")
    found = error(made, output)
    assert isinstance(found, OutputError) and "exists" in found.message
    assert output.read_bytes() == b"precious"
    found = error(made, made.file, "--force")
    assert isinstance(found, OutputError) and "is the file that is read" in found.message
    found = error(made, tmp_path / "nowhere" / "tuned.gguf")
    assert isinstance(found, OutputError) and "is no folder" in found.message


def test_files_that_cannot_be_tuned(made: Made, tmp_path: Path) -> None:
    floats = run("convert", made.source, "--to", "gguf:F16", "--no-proof", "-o", tmp_path)
    assert floats.exit_code == 0
    other = Made(made.source, made.stats, tmp_path / "demo-coder-F16.gguf")
    found = error(other, tmp_path / "tuned.gguf")
    assert isinstance(found, UsageError) and "its types are F16, F32" in found.message
    run("convert", made.source, "--to", "gguf:Q4_0", "--no-proof", "--split-max-size", "1M", "-o", tmp_path)
    split = min(tmp_path.glob("*Q4_0-00001-of-*.gguf"))
    found = error(Made(made.source, made.stats, split), tmp_path / "tuned.gguf")
    assert isinstance(found, UsageError) and "is split" in found.message


def test_the_archive_is_the_models(made: Made, tmp_path: Path, make_checkpoint) -> None:  # type: ignore[no-untyped-def]
    other = make_checkpoint()
    found = error(Made(other, made.stats, made.file), tmp_path / "tuned.gguf")
    assert isinstance(found, ArchiveError) and gguf_name("model.norm.weight") not in found.message
