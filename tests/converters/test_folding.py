"""`--fold` as a user runs it: files that are proven, say what was done, and are taken back by a proof."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from converters.checkpoint import open_checkpoint
from converters.cli import dscq
from converters.fold_fields import read_fold
from converters.folding import folded
from converters.gguf_source import open_gguf
from converters.imatrix import Importances
from converters.pipeline import plan_exports
from converters.plan import ConvertOptions
from converters.stats.archive import open_archive
from converters.targets import parse_request
from converters.type_losses import kept_losses
from quantize import type_errors
from quantize.errors import ArchiveError, CheckpointError, OutputError, UsageError, VerificationError
from quantize.folding import places
from quantize.llama import block_tensor
from quantize.reference import ReferenceModel
from quantize.tuning import Tuned, tune


@dataclass(frozen=True)
class Made:
    """The embedded model and an archive of it; the same Q4_K_M with and without folding, proven."""

    source: Path
    stats: Path
    plain: Path
    folded: Path
    said: str


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dscq, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("fold")
    rows = ("--rows", "24", "--length", "128", "--long-rows", "0")
    assert run("calibrate", demo_folder, *rows, "-o", folder / "stats").exit_code == 0
    stats = ("--stats", folder / "stats")
    convert = ("convert", demo_folder, *stats, "--to", "gguf:Q4_K_M", "--probe-tokens", "64")
    assert run(*convert, "-o", folder / "plain").exit_code == 0
    done = run(*convert, "--fold", "-o", folder / "folded")
    assert done.exit_code == 0, done.output
    name = "demo-coder-Q4_K_M.gguf"
    return Made(demo_folder, folder / "stats", folder / "plain" / name, folder / "folded" / name, done.stderr)


def test_a_folded_file_is_the_model_still(made: Made) -> None:
    """Four matrices of every block are other ones, of the same types; the logits are the checkpoint's."""
    plain, file = open_gguf(made.plain), open_gguf(made.folded)
    assert plain.tensor_types == file.tensor_types
    report = json.loads(made.folded.with_name("demo-coder-Q4_K_M.report.json").read_text())
    assert report["proof"]["passed"]
    figures = {
        figure["pair"]: figure["mean"]
        for figure in report["proof"]["figures"]
        if figure["positions"] == "all"
    }
    assert 0 < figures["checkpoint -> file"] < 0.05
    same = {name for name in plain.tensor_types if torch.equal(plain.blocks(name), file.blocks(name))}
    matrices = [f"{part}_proj" for part in ("self_attn.v", "self_attn.o", "mlp.up", "mlp.down")]
    changed = {block_tensor(layer, name) for layer in range(plain.config.n_layers) for name in matrices}
    assert set(plain.tensor_types) - same == changed


def test_it_is_said_everywhere(made: Made) -> None:
    note = "adapters (LoRA) made for the original model do not fit"
    assert note in made.said
    report = json.loads(made.folded.with_name("demo-coder-Q4_K_M.report.json").read_text())
    assert any(note in each for each in report["plan"]["notes"])
    assert "channel scales, powers of 2^(1/8)" in run("inspect", made.folded).output
    assert "dscq.fold" not in run("inspect", made.plain).output


def test_a_later_proof_takes_the_factors_from_the_file(made: Made, tmp_path: Path) -> None:
    verify = ("--reference", made.source, "--probe-tokens", "64", "--report", tmp_path / "report.json")
    done = run("verify", made.folded, *verify)
    assert done.exit_code == 0, done.output


def edited(made: Made, path: Path, edit: Callable[[bytearray], None]) -> Path:
    data = bytearray(made.folded.read_bytes())
    edit(data)
    path.write_bytes(data)
    return path


def test_a_proof_finds_factors_that_are_not_the_files(made: Made, tmp_path: Path) -> None:
    def edit(data: bytearray) -> None:
        key = b"dscq.fold.mlp_inner"
        first = data.index(key) + len(key) + 4 + 8
        data[first : first + 64] = 16 * base64.b64encode(bytes([40, 40, 40]))

    path = edited(made, tmp_path / "wrong.gguf", edit)
    done = run("verify", path, "--reference", made.source, "--probe-tokens", "64")
    assert isinstance(done.exception, VerificationError)
    assert any("relative error" in reason for reason in done.exception.reasons)


def test_unknown_kinds_of_folding_fail_the_proof(made: Made, tmp_path: Path) -> None:
    def edit(data: bytearray) -> None:
        at = data.index(b"powers of 2^(1/8)")
        data[at : at + 17] = b"powers of 3^(1/8)"

    path = edited(made, tmp_path / "newer.gguf", edit)
    done = run("verify", path, "--reference", made.source, "--probe-tokens", "64")
    assert "supported: 'channel scales, powers of 2^(1/8)'" in str(vars(done.exception))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has 0 bytes, expected"),
        ("AAAA", "has 3 bytes, expected"),
        ("%", "is no base64"),
        ("ü", "is no base64"),
    ],
)
def test_damaged_factors_are_refused(made: Made, text: str | None, message: str) -> None:
    file = open_gguf(made.folded)
    metadata = {key: value for key, value in file.metadata.items() if key != "dscq.fold.mlp_inner"}
    with pytest.raises(CheckpointError, match=f"dscq.fold.mlp_inner {message}"):
        read_fold(metadata if text is None else {**metadata, "dscq.fold.mlp_inner": text}, file.config)


def test_the_factors_come_back_as_they_were(made: Made) -> None:
    checkpoint, archive = open_checkpoint(made.source), open_archive(made.stats)
    fold = folded(checkpoint, ConvertOptions(Path(), archive=archive))[0].fold
    read = open_gguf(made.folded).fold
    assert fold is not None and read is not None
    assert all(
        torch.equal(fold.exponents[place], read.exponents[place]) for place in places(checkpoint.config)
    )
    assert any(fold.exponents[place].any() for place in places(checkpoint.config))


def test_what_is_not_folded_is_taken_over(made: Made, tmp_path: Path) -> None:
    """q, k, gate, embedding and output of an unfolded file serve a folded one; o and down don't."""
    convert = ("convert", made.source, "--stats", made.stats, "--no-proof", "-o", tmp_path)
    assert run(*convert, "--to", "gguf:Q4_K_M").exit_code == 0
    again = run(*convert, "--to", "gguf:Q4_K_M", "--fold", "--force")
    assert "17 of 48 tensors were there from an earlier run" in again.stderr
    file = tmp_path / "demo-coder-Q4_K_M.gguf"
    assert file.read_bytes() == made.folded.read_bytes()


def test_folded_losses_are_predicted_apart(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type_errors, "ROWS", 24)
    plan = ("plan", made.source, "--stats", made.stats, "--to", "gguf:bpw=4")
    assert run(*plan).exit_code == 0
    done = run(*plan, "--fold", "-o", tmp_path / "plan.toml")
    assert done.exit_code == 0, done.output
    assert "fold = true" in (tmp_path / "plan.toml").read_text()
    assert len(list(made.stats.glob("type-losses-*.json"))) == 2
    convert = ("convert", made.source, "--stats", made.stats, "--fold", "--plan", tmp_path / "plan.toml")
    assert run(*convert, "--tune", "2", "--probe-tokens", "64", "-o", tmp_path).exit_code == 0
    archive = open_archive(made.stats)
    options = ConvertOptions(Path(), archive=archive, compensate=True, importances=archive.importances())
    plain = kept_losses(options)
    other = kept_losses(folded(open_checkpoint(made.source), options)[1])
    assert plain is not None and other is not None
    down, gate = (block_tensor(0, f"mlp.{part}_proj") for part in ("down", "gate"))
    assert plain[gate] == other[gate] and plain[down] != other[down]


def dry_run(made: Made, output: Path, quant: str, *others: str) -> Result:
    convert = ("convert", made.source, "--stats", made.stats, "--to", quant, "-o", output)
    return run(*convert, "--fold", "--dry-run", *others)


def test_a_dry_run_knows_the_size(made: Made, tmp_path: Path) -> None:
    done = dry_run(made, tmp_path, "gguf:Q4_K_M", "--json")
    assert done.exit_code == 0, done.output
    assert f"{made.folded.stat().st_size:,} bytes" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf:Q4_K_M"), "channels are scaled for rounding with Hessians alone"),
        (
            ("--to", "gguf:Q4_K_M", "--stats", "STATS", "--rounding", "weighted"),
            "rounding with Hessians alone",
        ),
        (("--to", "gptq:4bit-32g", "--stats", "STATS"), "--fold: only for gguf:"),
        (
            ("--to", "gguf:Q4_K_M", "--to", "gptq:4bit-32g", "--stats", "STATS"),
            "--fold: only for gguf:, and gptq is asked for too",
        ),
    ],
)
def test_idle_folding_is_refused(
    made: Made, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [str(made.stats) if each == "STATS" else each for each in arguments]
    exception = run("convert", made.source, *given, "--fold", "-o", tmp_path).exception
    assert isinstance(exception, UsageError) and message in str(exception)


def test_diagonals_are_not_enough(made: Made, demo_folder: Path, tmp_path: Path) -> None:
    rows = ("--rows", "4", "--length", "64", "--long-rows", "0", "--diagonal-only")
    assert run("calibrate", demo_folder, *rows, "-o", tmp_path / "stats").exit_code == 0
    convert = ("convert", demo_folder, "--stats", tmp_path / "stats", "--to", "gguf:Q4_K_M", "--fold")
    exception = run(*convert, "-o", tmp_path / "out").exception
    assert isinstance(exception, ArchiveError) and "holds diagonals alone" in exception.message
    without = replace(ConvertOptions(Path()), archive=None)
    with pytest.raises(ArchiveError, match="--fold needs statistics"):
        folded(open_checkpoint(demo_folder), without)


def test_nothing_of_the_plan_but_its_head_changes(made: Made) -> None:
    """Types, reasons and sizes of tensors are those of the unfolded model."""
    checkpoint, archive = open_checkpoint(made.source), open_archive(made.stats)
    options = ConvertOptions(Path(), archive=archive, compensate=True, importances=archive.importances())
    request = [parse_request("gguf:Q4_K_M")]
    scaled, changed = folded(checkpoint, options)
    (plain,), (other,) = plan_exports(checkpoint, request, options), plan_exports(scaled, request, changed)
    assert [(t.quant, t.reason, t.n_bytes) for t in plain.tensors] == [
        (t.quant, t.reason, t.n_bytes) for t in other.tensors
    ]


def test_training_counts_what_rounding_has_cost(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are in proportion to a matrix's relative error: to the folded matrix, not to the original."""
    seen = list[ReferenceModel]()

    def watched(reference: ReferenceModel, *others: Any) -> Tuned:
        seen.append(reference)
        return tune(reference, *others)

    monkeypatch.setattr("converters.tune.tune", watched)
    output = ("-o", tmp_path / "tuned.gguf", "--steps", "1", "--probe-tokens", "64")
    done = run("tune", made.folded, "--reference", made.source, "--stats", made.stats, *output)
    assert done.exit_code == 0, done.output
    file, name = open_gguf(made.folded), block_tensor(1, "mlp.down_proj")
    error = (seen[0].weights.load(name) - file.weights.load(name)).norm() / file.weights.load(name).norm()
    other = open_checkpoint(made.source).weights.load(name).float() - file.weights.load(name)
    assert error < 0.8 * other.norm() / file.weights.load(name).norm()


def test_a_folded_file_is_no_source(made: Made, tmp_path: Path) -> None:
    exception = run("convert", made.folded, "--to", "gguf:Q8_0", "-o", tmp_path).exception
    assert isinstance(exception, CheckpointError) and "channel scales are folded" in exception.message


@pytest.mark.parametrize("quants", [["F16"], ["Q4_K_M", "BF16"]])
def test_exports_that_gain_nothing_are_refused(made: Made, tmp_path: Path, quants: list[str]) -> None:
    """A BF16 of the checkpoint is exact; folded it would not be."""
    asked = [part for quant in quants for part in ("--to", f"gguf:{quant}")]
    exception = run("convert", made.source, "--stats", made.stats, *asked, "--fold", "-o", tmp_path).exception
    assert isinstance(exception, UsageError)
    assert f"--fold: gguf:{quants[-1]} has no type that gains from it" in exception.message


def test_what_exists_is_refused_before_the_work(made: Made) -> None:
    convert = ("convert", made.source, "--stats", made.stats, "--to", "gguf:Q4_K_M", "--fold")
    done = run(*convert, "-o", made.folded.parent)
    assert isinstance(done.exception, OutputError) and "first tokens" not in done.stderr


def test_other_importances_are_scaled_too(made: Made) -> None:
    checkpoint, archive = open_checkpoint(made.source), open_archive(made.stats)
    down, gate = (block_tensor(0, f"mlp.{part}_proj") for part in ("down", "gate"))
    own = {
        down: torch.full((archive.config.intermediate_size,), 3.0),
        gate: torch.ones(archive.config.hidden_size),
    }
    given = Importances(own, "theirs.gguf", "", 0)
    fold, changed = folded(checkpoint, ConvertOptions(Path(), archive=archive, importances=given))
    assert fold.fold is not None and changed.importances is not None
    factors = fold.fold.multiplied(down)
    assert factors is not None and len(set(factors.tolist())) > 2
    torch.testing.assert_close(changed.importances.rows[down] * factors.square(), own[down])
    assert changed.importances.rows[gate] is own[gate] and changed.importances.file == "theirs.gguf"


def test_a_dry_run_of_a_budget_is_provisional(made: Made, tmp_path: Path) -> None:
    done = dry_run(made, tmp_path, "gguf:bpw=4")
    assert done.exit_code == 0, done.output
    assert "no losses have been predicted yet" in done.output
