"""What `dscq calibrate` does, and what `dscq convert` does with a statistics archive.

rows      the built-in text or the user's own becomes token rows (converters.corpus)
stream    the rows go through the model, block by block, into the archive (converters.stats)
imatrix   the archive's diagonals, in llama.cpp's own formats, for whoever wants to use them elsewhere
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converters.choices import OpenChoices, opened
from converters.terminal import Terminal
from quantize.errors import ArchiveError, OutputError, UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.corpus.rows import Corpus, CorpusOptions, Shares
    from converters.imatrix import Importances
    from converters.stats.archive import Archive
    from converters.stats.prepare import CalibrateOptions

IN_OUTPUT = "stats"
"""The folder within `convert`'s output where `--calibrate` puts its archive."""


@dataclass(frozen=True, kw_only=True)
class CalibrateChoices(OpenChoices):
    """The options of `dscq calibrate`."""

    source: str
    output: Path
    text: tuple[str, ...]
    rows: int
    length: int | None
    shares: tuple[str, ...]
    long_rows: int
    seed: int
    diagonal_only: bool
    sensitivity: bool
    add: Path | None
    fresh: bool
    force: bool
    on_nonfinite: Literal["stop", "drop"]
    imatrix_out: tuple[Path, ...]
    show_rows: int | None


def calibrate(terminal: Terminal, choices: CalibrateChoices) -> None:
    """Make the rows, then the archive and what else was asked for; or only show the rows."""
    from converters.corpus.show import show_rows
    from converters.imatrix_file import check_imatrix_name

    for path in choices.imatrix_out:
        check_imatrix_name(path)
        check_free(path, force=choices.force)
    options = _corpus_options(choices)
    checkpoint = opened(terminal, choices, choices.source, headers_only=choices.show_rows is not None)
    _refuse_source(checkpoint, choices.imatrix_out)
    corpus = build_rows(terminal, checkpoint, options)
    if choices.show_rows is not None:
        lines = list(show_rows(corpus, checkpoint.tokenizer, n_rows=choices.show_rows or None))
        _report(terminal, lines, {"rows": lines})
        return
    archive = gather(terminal, checkpoint, corpus, _calibrate_options(choices), _n_threads(choices))
    written = list(choices.imatrix_out) if rank() == 0 else []
    for path in written:
        write_diagonals(archive, path)
    facts = {"archive": str(archive.folder), "n_tokens": archive.manifest.n_tokens}
    _report(terminal, [f"wrote {path}" for path in written], facts)


def _report(terminal: Terminal, lines: list[str], document: dict[str, object]) -> None:
    """Print the result, of several ranks the first one's alone."""
    if rank() == 0:
        for line in lines:
            terminal.result(line)
        terminal.document(document)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise OutputError for a file that would be overwritten, or whose folder is not there."""
    if path.exists() and not force:
        raise OutputError(f"{path}: exists; nothing is overwritten", hint="use --force, or another name")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: {path.parent} is no folder", hint="make it first")


def _refuse_source(checkpoint: "Checkpoint", paths: tuple[Path, ...]) -> None:
    """Raise OutputError for a file that is being read, which not even --force may replace."""
    for path in paths:
        if path.exists() and any(path.samefile(source) for source in checkpoint.source_files):
            raise OutputError(f"{path}: is being read", hint="write the imatrix under another name")


def _n_threads(choices: OpenChoices) -> int:
    """Return the threads asked for, or this rank's share of the machine's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return choices.threads or max(choices.n_threads // ranks_here, 1)


def rank() -> int:
    """Return this process's number among those that torchrun started; the first alone says and writes.

    Raises UsageError for an environment that names a number of ranks and not this one's.
    """
    count, number = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if count == "1":
        return 0
    if number is None or not (count.isdecimal() and number.isdecimal()):
        raise UsageError(
            f"WORLD_SIZE is {count!r} and RANK is {number!r}: not what torchrun sets",
            hint="start several ranks with torchrun, or unset both",
        )
    return int(number)


def _corpus_options(choices: CalibrateChoices) -> "CorpusOptions":
    from converters.corpus.rows import CorpusOptions

    return CorpusOptions(
        sources=choices.text or None,
        n_rows=choices.rows,
        length=choices.length,
        shares=parse_shares(choices.shares, own_text=bool(choices.text)),
        n_long=choices.long_rows,
        seed=choices.seed,
    )


def parse_shares(texts: tuple[str, ...], *, own_text: bool = False) -> "Shares":
    """Return the shares that `completion=0.5` and the like say; the kinds not named keep their default.

    Noise, if not named, is 0 for the built-in text, OWN_TEXT_NOISE of what the others have for other text.

    Raises UsageError for an unknown kind, for what is no number of zero or more, and for a share of no text.
    """
    from dataclasses import replace

    from converters.corpus.rows import KINDS, NOISE, OWN_TEXT_NOISE, Shares

    given: dict[str, float] = {}
    for text in texts:
        kind, _, value = text.partition("=")
        try:
            given[kind] = float(value)
        except ValueError:
            given[kind] = -1.0
        if kind not in KINDS or not 0 <= given[kind] < float("inf"):
            known = ", ".join(KINDS)
            raise UsageError(
                f"--share {text}: expected KIND=NUMBER, a number of zero or more", hint=f"kinds: {known}"
            )
    shares = replace(Shares(), **given)
    if shares.text == 0:
        raise UsageError("--share: no text has a share", hint="give at least one kind but noise a share")
    if own_text and NOISE not in given:
        return replace(shares, noise=OWN_TEXT_NOISE * shares.text)
    return shares


def _calibrate_options(choices: CalibrateChoices) -> "CalibrateOptions":
    from converters.stats.prepare import CalibrateOptions

    return CalibrateOptions(
        folder=choices.output,
        device=choices.device or "cpu",
        diagonal_only=choices.diagonal_only,
        sensitivity=choices.sensitivity,
        add=choices.add,
        on_nonfinite=choices.on_nonfinite,
        fresh=choices.fresh,
    )


def build_rows(terminal: Terminal, checkpoint: "Checkpoint", options: "CorpusOptions") -> "Corpus":
    """Return the rows, and say how many of each kind there are."""
    from converters.corpus.build import build_corpus
    from converters.corpus.rows import count_by_kind

    corpus = build_corpus(checkpoint.tokenizer, checkpoint.config, options)
    for note in corpus.notes:
        terminal.say(f"note: {note}")
    counts = count_by_kind(corpus.rows)
    kinds = ", ".join(
        f"{count['rows']} {kind} ({count['tokens']:,} tokens)" for kind, count in counts.items()
    )
    terminal.say(f"rows: {len(corpus.rows)} of {corpus.n_tokens:,} tokens: {kinds}")
    return corpus


def gather(
    terminal: Terminal,
    checkpoint: "Checkpoint",
    corpus: "Corpus",
    options: "CalibrateOptions",
    n_threads: int,
) -> "Archive":
    """Return the archive of the checkpoint over the rows, made or already there."""
    from converters.stats.run import calibrate_checkpoint
    from converters.verify import torch_threads
    from quantize.codecs.encoder import failures_explained

    hint = "use --device cpu, or shorter rows: --length 1024 --long-rows 0"
    explained = failures_explained(options.device, "calibrate", hint)
    with terminal.stages("blocks") as report, explained, torch_threads(n_threads):
        archive = calibrate_checkpoint(
            checkpoint,
            corpus.rows,
            corpus.identity,
            options,
            lambda done, total: report("calibrate", done, total),
            lambda done, total: report("gradients", done, total),
        )
    n_bytes = sum(member.n_bytes for member in archive.manifest.members.values())
    if rank() == 0:
        terminal.result(f"archive {archive.folder}: {archive.manifest.n_tokens:,} tokens, {n_bytes:,} bytes")
    return archive


def write_diagonals(archive: "Archive", path: Path) -> None:
    """Write the archive's diagonals as an imatrix: sums of squares by the names of GGUF's weights."""
    from converters.imatrix_file import write_imatrix
    from converters.names import gguf_name

    n_tokens, chunk = archive.manifest.n_tokens, 512
    packed = {gguf_name(name): archive.packed(name) for name in archive.linears()}
    entries = {name: (each.diagonal * each.n_tokens, each.n_tokens) for name, each in packed.items()}
    corpus = str(archive.manifest.request.corpus.get("name", ""))
    write_imatrix(path, entries, corpus, chunk, -(-n_tokens // chunk))


def expected_importances(checkpoint: "Checkpoint") -> "Importances":
    """Return what a calibration will give, its numbers aside: to plan and to check with before the work."""
    import torch

    from converters.imatrix import Importances
    from quantize.llama import EMBEDDING

    shapes = {name: shape for name, shape in checkpoint.config.tensor_shapes().items() if len(shape) > 1}
    rows = {
        name: torch.ones(shape[1])
        for name, shape in shapes.items()
        if name != EMBEDDING or checkpoint.config.tied_head
    }
    return Importances(rows, IN_OUTPUT, "built-in", 0)


def calibrated_archive(
    terminal: Terminal, checkpoint: "Checkpoint", choices: OpenChoices, output: Path
) -> "Archive":
    """Calibrate on the built-in text into a folder of the output, unless that is done; say so."""
    from converters.corpus.rows import CorpusOptions
    from converters.stats.prepare import CalibrateOptions

    folder = output / IN_OUTPUT
    terminal.say(f"calibrating: statistics on the built-in text, in {folder}; use them again with --stats")
    corpus = build_rows(terminal, checkpoint, CorpusOptions())
    options = CalibrateOptions(folder, device=choices.device or "cpu")
    try:
        return gather(terminal, checkpoint, corpus, options, _n_threads(choices))
    except ArchiveError as error:
        hint = f"give that archive with --stats {folder}, write elsewhere with -o, or remove {folder}"
        raise ArchiveError(error.message, reasons=error.reasons, hint=hint) from error
