"""What each command does, from the user's choices to the last line of output.

The choices are the options of `converters.cli` word for word. Everything heavy is imported inside the
commands, so that `--help` stays quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converters.choices import OpenChoices, opened
from converters.terminal import Terminal
from quantize.errors import UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.imatrix import Importances
    from converters.plan import ConvertOptions, Plan, Written


@dataclass(frozen=True, kw_only=True)
class SourceChoices(OpenChoices):
    """How a checkpoint is opened, and how a file made of it is proven: what two commands share."""

    require_proof: bool
    probe_tokens: int | None
    llama_lib: Path | None
    readers: Path | None


@dataclass(frozen=True, kw_only=True)
class ConvertChoices(SourceChoices):
    """The options of `dscq convert`."""

    source: str
    targets: tuple[str, ...]
    output: Path
    name: str | None
    split_max_size: int | None
    dry_run: bool
    force: bool
    fresh: bool
    no_proof: bool
    imatrix: Path | None
    stats: Path | None
    calibrate: bool
    rounding: Literal["plain", "weighted"] | None
    tensor_types: tuple[str, ...]
    output_tensor_type: str | None
    token_embedding_type: str | None
    pure: bool


@dataclass(frozen=True, kw_only=True)
class VerifyChoices(SourceChoices):
    """The options of `dscq verify`."""

    file: Path
    reference: str
    report: Path | None


def convert(terminal: Terminal, choices: ConvertChoices) -> None:
    """Open, plan, write, prove; or, with `--dry-run`, open and plan."""
    from converters.pipeline import plan_exports
    from converters.targets import parse_request

    _refuse_contradictions(choices)
    requests = [parse_request(text) for text in choices.targets]
    options = _convert_options(choices)
    checkpoint = opened(terminal, choices, choices.source, choices.name, headers_only=choices.dry_run)
    options = replace(options, importances=_importances(choices, checkpoint))
    plans = plan_exports(checkpoint, requests, options)
    verifier = None
    if not (choices.no_proof or choices.dry_run):
        from converters.prove import prove_written, ready_verifier

        # Before the work starts: a device or a library that is not there must not show after an hour.
        verifier = ready_verifier(checkpoint, choices)
    if choices.calibrate:
        options = _calibrated(terminal, choices, checkpoint, plans, options)
        plans = plan_exports(checkpoint, requests, options)
    for plan in plans:
        _say_plan(terminal, plan)
    if choices.dry_run:
        from converters.dry_run import show_dry_run

        show_dry_run(terminal, checkpoint, plans, options)
        return
    written = _write(terminal, checkpoint, plans, options)
    if verifier is not None:
        prove_written(terminal, verifier, written)
        return
    files = [str(path) for one in written for path in one.paths]
    terminal.document({"files": files, "proof": "skipped by --no-proof"})


def _convert_options(choices: ConvertChoices) -> "ConvertOptions":
    from converters.plan import ConvertOptions
    from converters.targets.gguf_types import parse_tensor_type, written_type
    from quantize.codecs.encoder import encoding_gpus

    device = choices.device or "cpu"
    encoding_gpus(device)  # one that is not there must show before a checkpoint is fetched
    output, embedding = choices.output_tensor_type, choices.token_embedding_type
    return ConvertOptions(
        folder=choices.output,
        force=choices.force,
        fresh=choices.fresh,
        split_max_bytes=choices.split_max_size,
        n_threads=choices.n_threads,
        hash_tensors=not choices.no_proof,
        tensor_types=tuple(parse_tensor_type(text) for text in choices.tensor_types),
        output_tensor_type=output and written_type(output, "--output-tensor-type"),
        token_embedding_type=embedding and written_type(embedding, "--token-embedding-type"),
        pure=choices.pure,
        device=device,
    )


def _importances(choices: ConvertChoices, checkpoint: "Checkpoint") -> "Importances | None":
    """Return what the searches are weighed with, from wherever the user said; None to round plainly.

    For `--calibrate` it is what will be measured, its numbers aside: enough to plan and to check with.
    """
    from converters.calibration import archived_importances, expected_importances
    from converters.imatrix import read_importances

    if choices.imatrix is not None:
        return read_importances(choices.imatrix, checkpoint.config)
    if choices.stats is not None:
        return archived_importances(choices.stats, checkpoint, headers_only=choices.dry_run)
    return expected_importances(checkpoint) if choices.calibrate else None


def _calibrated(
    terminal: Terminal,
    choices: ConvertChoices,
    checkpoint: "Checkpoint",
    plans: Sequence["Plan"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    """Return the options with measured importances; what can be refused is refused before the measuring."""
    from converters.calibration import calibrated_importances
    from converters.pipeline import check_destination, read_licences
    from quantize.codecs import codec

    if not any(codec(tensor.quant).uses_importance for plan in plans for tensor in plan.tensors):
        raise UsageError("--calibrate: no type that was asked for looks at importances")
    check_destination(plans, options, checkpoint.source_files)
    read_licences(checkpoint)
    return replace(options, importances=calibrated_importances(terminal, checkpoint, choices, choices.output))


def verify(terminal: Terminal, choices: VerifyChoices) -> None:
    """Prove a file that is there; its report goes beside it, and the file stays as it is."""
    from converters.proof.file import GGUF, GPTQ
    from converters.prove import check_report_place, prove_file, ready_verifier

    report = check_report_place(choices.file, choices.report)
    kind = GPTQ if choices.file.is_dir() else GGUF
    verifier = ready_verifier(opened(terminal, choices, choices.reference), choices, [kind])
    prove_file(terminal, verifier, choices.file, report)


def _refuse_contradictions(choices: ConvertChoices) -> None:
    """Raise UsageError for options that the proof would have needed, where there is none."""
    given = {
        "--require-proof": choices.require_proof,
        "--probe-tokens": choices.probe_tokens is not None,
        "--llama-lib": choices.llama_lib is not None,
    }
    if choices.no_proof and (idle := [name for name, is_given in given.items() if is_given]):
        raise UsageError(f"--no-proof leaves nothing to do for {', '.join(idle)}")
    _refuse_two_measurements(choices)


def _refuse_two_measurements(choices: ConvertChoices) -> None:
    """Raise UsageError unless the importances come from one place, and are there to be used."""
    sources = {
        "--imatrix": choices.imatrix is not None,
        "--stats": choices.stats is not None,
        "--calibrate": choices.calibrate,
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: the importances can come from one of them only")
    if choices.rounding == "weighted" and not given:
        raise UsageError(
            "--rounding weighted: there is nothing to weigh with", hint=f"give {', '.join(sources)}"
        )
    if choices.rounding == "plain" and given:
        raise UsageError(f"--rounding plain leaves nothing to do for {given[0]}")
    if choices.dry_run and choices.calibrate:
        raise UsageError(
            "--dry-run: --calibrate would do hours of work", hint="run dscq calibrate, then give --stats"
        )


def _say_plan(terminal: Terminal, plan: "Plan") -> None:
    """State sizes, what options did, and every tensor that does not get the type meant for it."""
    terminal.say(
        f"{plan.request}: {len(plan.tensors)} tensors, {plan.n_bytes:,} bytes in {len(plan.files)} file(s), "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )
    for note in plan.notes:
        terminal.say(f"{plan.request}: {note}")
    for tensor in plan.fallbacks:
        terminal.say(f"{plan.request}: {tensor.written_name} becomes {tensor.quant}: {tensor.reason}")


def _write(
    terminal: Terminal, checkpoint: "Checkpoint", plans: Sequence["Plan"], options: "ConvertOptions"
) -> "list[Written]":
    from converters.pipeline import convert as write

    n_bytes = sum(spec.n_bytes for spec in checkpoint.weights.specs().values())
    with terminal.stage("convert", n_bytes) as advance:
        written = write(
            checkpoint,
            [plan.request for plan in plans],
            options,
            lambda done: advance(done.n_source_bytes, done.name),
        )
    for one in (one for one in written if one.n_reused):
        terminal.say(
            f"{one.plan.request}: {one.n_tensors_reused} of {len(one.plan.tensors)} tensors were there from "
            f"an earlier run ({one.n_reused:,} bytes)"
        )
    for path in (path for one in written for path in one.paths):
        terminal.result(f"wrote {path} ({path.stat().st_size:,} bytes)")
    return written


def inspect(terminal: Terminal, path: Path, *, list_tensors: bool, plot: Path | None, force: bool) -> None:
    """Describe a GGUF, a folder of weights or a statistics archive; what is wrong with it comes last."""
    from converters.calibration import check_free
    from converters.inspect import inspect_path
    from converters.stats.manifest import NAME

    if (path / NAME).is_file():
        if plot is not None:
            check_free(plot, force=force)
        _inspect_archive(terminal, path, plot)
        return
    if plot is not None:
        raise UsageError(f"--plot draws statistics archives, and {path} is none")
    found = inspect_path(path)
    terminal.table(f"{found.kind} {found.path}", ["", ""], [list(fact) for fact in found.facts.items()])
    types = [(quant, str(count), f"{n_bytes:,}") for quant, count, n_bytes in found.by_type()]
    terminal.table("", ["type", ">tensors", ">bytes"], types)
    if list_tensors:
        rows = [(row.name, str(list(row.shape)), row.quant, f"{row.n_bytes:,}") for row in found.tensors]
        terminal.table("", ["tensor", "shape", "type", ">bytes"], rows)
    for finding in found.findings:
        terminal.result(f"finding: {finding}")
    terminal.document(found.document())


def _inspect_archive(terminal: Terminal, path: Path, plot: Path | None) -> None:
    from converters.stats import look
    from converters.stats.archive import open_archive

    if plot is not None:
        look.check_plot(plot)
    archive = open_archive(path)
    with terminal.stages("inputs") as report:
        rows = look.input_rows(archive, lambda done, total: report("statistics", done, total))
    facts = look.archive_facts(archive)
    terminal.table(f"statistics archive {path}", ["", ""], [list(fact) for fact in facts.items()])
    terminal.table("", look.COLUMNS, [row.cells() for row in rows])
    if plot is not None:
        look.plot(rows, plot)
        terminal.result(f"wrote {plot}")
    terminal.document(look.archive_document(archive, rows))
