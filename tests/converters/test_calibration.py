"""`dscq calibrate`, and `dscq convert` and `dscq inspect` on what it makes, as a user runs them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from converters.calibration import parse_shares
from converters.cli import dscq
from converters.gguf_source import open_gguf
from converters.imatrix import read_importances
from converters.stats.archive import open_archive
from quantize.errors import ArchiveError, DscqError, UsageError

ROWS = ("--rows", "6", "--length", "96", "--long-rows", "0")


def run(*arguments: str | Path) -> Result:
    """Run the command line in this process; DscqErrors come out as they are."""
    return CliRunner().invoke(dscq, [str(argument) for argument in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def stats(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "stats"
    imatrix = folder.with_name("imatrix.gguf")
    result = run("calibrate", demo_folder, *ROWS, "-o", folder, "--imatrix-out", imatrix)
    assert result.exit_code == 0, result.output
    return folder


def test_an_archive_is_made_and_said(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    result = run("calibrate", demo_folder, *ROWS, "-o", stats, "--json")
    archive = open_archive(stats)
    assert json.loads(result.stdout) == {"archive": str(stats), "n_tokens": archive.manifest.n_tokens}
    archive.verify()
    assert re.search(r"rows: \d+ of \d+ tokens: \d+ completion", result.stderr)


def test_the_imatrix_is_the_archives_diagonal(demo_folder: Path, stats: Path) -> None:
    archive = open_archive(stats)
    read = read_importances(stats.with_name("imatrix.gguf"), archive.config)
    own = archive.importances()
    assert read.rows.keys() == own.rows.keys()
    for name, values in own.rows.items():
        assert ((read.rows[name] - values).abs() <= 1e-6 * values).all()


def test_convert_uses_the_statistics(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    arguments = ("convert", demo_folder, "--to", "gguf:Q4_K_M", "--no-proof")
    assert run(*arguments, "-o", plain).exit_code == 0
    result = run(*arguments, "-o", weighted, "--stats", stats)
    assert result.exit_code == 0
    assert "importances of 34 tensors from stats (36 entries" in result.stderr
    files = [open_gguf(next(folder.glob("*.gguf"))) for folder in (plain, weighted)]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not files[0].weights.load(name).equal(files[1].weights.load(name))
    assert files[1].metadata["quantize.imatrix.file"] == "stats"


def test_rounding_plain_is_the_file_without_statistics(demo_folder: Path, tmp_path: Path) -> None:
    arguments = ("convert", demo_folder, "--to", "gguf:Q4_0", "--no-proof", "-o")
    assert run(*arguments, tmp_path / "a").exit_code == 0
    assert run(*arguments, tmp_path / "b", "--rounding", "plain").exit_code == 0
    assert (
        next((tmp_path / "a").glob("*.gguf")).read_bytes()
        == next((tmp_path / "b").glob("*.gguf")).read_bytes()
    )


def test_convert_calibrates_first_where_it_is_told_to(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.corpus import rows

    few = rows.CorpusOptions(n_rows=4, length=64, n_long=0)
    monkeypatch.setattr(rows, "CorpusOptions", lambda: few)
    arguments = ("convert", demo_folder, "--to", "gguf:IQ2_XS", "--no-proof", "--calibrate", "-o", tmp_path)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"calibrating: statistics on the built-in text, in {tmp_path / 'stats'}" in result.stderr
    assert open_archive(tmp_path / "stats").manifest.request.corpus["name"] == "built-in"


def test_statistics_of_another_model_are_refused(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo_folder, other)
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}), "utf-8")
    result = run("convert", other, "--to", "gguf:Q4_K_M", "--stats", stats, "-o", tmp_path / "out")
    assert isinstance(result.exception, ArchiveError)
    assert "statistics of another model than other" in str(result.exception)
    assert "rms_norm_eps" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounding", "weighted"), "--rounding weighted: there is nothing to weigh with"),
        (("--calibrate", "--dry-run"), "--dry-run: --calibrate would do hours of work"),
        (("--calibrate", "--rounding", "plain"), "--rounding plain leaves nothing to do for --calibrate"),
        (("--calibrate", "--imatrix", "FILE"), "--imatrix and --calibrate: the importances can come from"),
    ],
)
def test_contradictions_are_usage_errors(
    demo_folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "imatrix.dat"
    file.touch()
    chosen = [str(file) if option == "FILE" else option for option in options]
    result = run("convert", demo_folder, "--to", "gguf:Q4_K_M", "-o", tmp_path / "out", *chosen)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize(("options", "noisy"), [((), True), (("--share", "noise=0"), False)])
def test_text_of_ones_own_is_shown_with_its_noise(
    demo_folder: Path, tmp_path: Path, options: tuple[str, ...], noisy: bool
) -> None:
    (tmp_path / "a.py").write_text("".join(f"value_{i} = compute({i})\n" for i in range(2000)))
    result = run("calibrate", demo_folder, "--text", tmp_path / "a.py", "--show-rows", "0", *options)
    heads = [line for line in result.stdout.splitlines() if line.startswith("=== row ")]
    assert result.exit_code == 0 and any(": completion, " in head for head in heads)
    assert any(": noise, 256 tokens, random tokens" in head for head in heads) is noisy


def test_rows_are_shown_and_nothing_else_is_done(demo_folder: Path, tmp_path: Path) -> None:
    result = run("calibrate", demo_folder, *ROWS, "--show-rows", "4", "-o", tmp_path / "stats")
    assert result.exit_code == 0
    heads = [line for line in result.stdout.splitlines() if line.startswith("=== row ")]
    assert len(heads) == 4 and any(": infill, " in head for head in heads)
    assert "<｜fim▁begin｜>" in result.stdout
    assert not (tmp_path / "stats").exists()


def test_shares_are_read_and_the_others_keep_their_default() -> None:
    shares = parse_shares(("infill=0", "chat=0.3"))
    assert (shares.infill, shares.chat, shares.completion) == (0.0, 0.3, 0.5)


def test_text_of_ones_own_gets_noise_unless_told_otherwise() -> None:
    assert parse_shares(()).noise == 0
    assert parse_shares((), own_text=True).noise == 0.1
    assert parse_shares(("noise=0",), own_text=True).noise == 0
    percent = parse_shares(("completion=50", "infill=25", "repository=15", "chat=0"), own_text=True)
    assert percent.of("noise") == pytest.approx(0.1 / 1.1)


@pytest.mark.parametrize("text", ["fim=1", "infill", "infill=-1", "infill=much", "infill=inf", "infill=nan"])
def test_a_share_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=f"--share {text}: expected KIND=NUMBER"):
        parse_shares((text,))


@pytest.mark.parametrize("own_text", [False, True])
def test_shares_of_zero_leave_nothing_to_calibrate_on(own_text: bool) -> None:
    zeros = tuple(f"{kind}=0" for kind in ("completion", "infill", "repository", "chat"))
    with pytest.raises(UsageError, match="no text has a share"):
        parse_shares(zeros, own_text=own_text)


def test_inspect_shows_every_input(stats: Path) -> None:
    result = run("inspect", stats, "--json")
    document = json.loads(result.stdout)
    assert document["kind"] == "statistics archive"
    assert len(document["inputs"]) == 5 * 4 + 1
    assert document["inputs"][-1]["input"] == "head_input"
    portrait = document["inputs"][0]["portrait"]
    assert portrait["n_columns"] == 256 and 1 <= portrait["effective_rank"] <= 256
    table = run("inspect", stats)
    assert re.search(r"^4 +down +640 +0 ", table.stdout, re.MULTILINE)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_inspect_draws(stats: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the `plot` extra)")
    picture = tmp_path / f"stats{suffix}"
    assert run("inspect", stats, "--plot", picture).exit_code == 0
    assert picture.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]


def test_a_plot_needs_an_archive_and_a_known_suffix(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    of_model = run("inspect", demo_folder, "--plot", tmp_path / "a.png")
    assert isinstance(of_model.exception, DscqError) and "draws statistics archives" in str(
        of_model.exception
    )
    odd = run("inspect", stats, "--plot", tmp_path / "a.bmp")
    assert "expected a name that ends in .png or .svg" in str(odd.exception)


def test_nothing_is_overwritten_without_force(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    taken = tmp_path / "there.gguf"
    taken.write_bytes(b"somebody's")
    arguments = ("calibrate", demo_folder, *ROWS, "-o", stats, "--imatrix-out", taken)
    assert f"{taken}: exists; nothing is overwritten" in str(run(*arguments).exception)
    assert taken.read_bytes() == b"somebody's"
    assert run(*arguments, "--force").exit_code == 0
    assert taken.read_bytes()[:4] == b"GGUF"
    nowhere = tmp_path / "no" / "a.dat"
    refused = run("calibrate", demo_folder, *ROWS, "-o", tmp_path / "new", "--imatrix-out", nowhere)
    assert "is no folder" in str(refused.exception)
    assert not (tmp_path / "new").exists()
    picture = tmp_path / "a.svg"
    picture.touch()
    assert "nothing is overwritten" in str(run("inspect", stats, "--plot", picture).exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "gguf:IQ2_XS", "--tensor-type", "nothing=Q6_K"), "no matrix is left that it matches"),
        (("--to", "gguf:F16"), "--calibrate: no type that was asked for looks at importances"),
        (("--to", "gguf:IQ2_XS", "--llama-lib", "FILE"), "libllama"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_calibration(
    demo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("calibrated before all was checked")

    monkeypatch.setattr("converters.calibration.gather", too_late)
    library = tmp_path / "libllama.so"
    library.write_bytes(b"none")
    chosen = [str(library) if option == "FILE" else option for option in options]
    result = run("convert", demo_folder, "--calibrate", "-o", tmp_path / "out", *chosen)
    assert isinstance(result.exception, DscqError)
    assert message in str(result.exception)


def test_an_export_that_exists_is_refused_before_the_calibration(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-coder-IQ2_XS.gguf").touch()
    arguments = ("convert", demo_folder, "--to", "gguf:IQ2_XS", "--no-proof", "--calibrate", "-o", tmp_path)
    assert "nothing is overwritten" in str(run(*arguments).exception)
    assert not (tmp_path / "stats").exists()


def test_another_archive_in_the_output_is_not_replaced(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.corpus import rows

    assert run("calibrate", demo_folder, *ROWS, "--seed", "5", "-o", tmp_path / "stats").exit_code == 0
    few = rows.CorpusOptions(n_rows=4, length=64, n_long=0)
    monkeypatch.setattr(rows, "CorpusOptions", lambda: few)
    arguments = ("convert", demo_folder, "--to", "gguf:IQ2_XS", "--no-proof", "--calibrate", "-o", tmp_path)
    error = run(*arguments).exception
    assert isinstance(error, ArchiveError)
    assert "holds an archive of another request" in error.message
    assert f"--stats {tmp_path / 'stats'}" in error.hint
    assert max(map(len, error.reasons)) < 200


def test_shown_rows_are_a_document_too(demo_folder: Path, tmp_path: Path) -> None:
    result = run("calibrate", demo_folder, *ROWS, "--show-rows", "2", "--json", "-o", tmp_path / "stats")
    assert json.loads(result.stdout)["rows"][0].startswith("=== row ")


def test_only_the_first_rank_says_and_writes(
    demo_folder: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.calibration import rank

    monkeypatch.setenv("RANK", "1")
    assert rank() == 0  # one process alone, whatever is left in its environment
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank() == 1
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match="not what torchrun sets"):
        rank()


def test_an_interrupted_calibration_is_named(demo_folder: Path, stats: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text("{}", "utf-8")
    result = run("convert", demo_folder, "--to", "gguf:Q4_0", "--stats", tmp_path, "-o", tmp_path / "out")
    assert "its calibration was interrupted" in str(result.exception)
