"""What each command does, from the user's choices to the last line of output.

The choices are the options of `converters.cli` word for word. Everything heavy is imported inside the
commands, so that `--help` stays quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converters.choices import OpenChoices, opened
from converters.terminal import Terminal
from quantize.errors import UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.plan import ConvertOptions, Plan, Request, Written
    from converters.verify import Verifier


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
    tune: int | None
    fold: bool
    imatrix: Path | None
    stats: Path | None
    calibrate: bool
    rounding: Literal["plain", "weighted", "compensated"] | None
    effort: Literal["fast", "default", "high"] | None
    measurement: Path | None
    tensor_parallel: int | None
    tensor_types: tuple[str, ...]
    output_tensor_type: str | None
    token_embedding_type: str | None
    pure: bool
    plan: Path | None
    ctx: int | None
    cache: str | None
    reserve: int | None
    ngl: int | None
    exclude_types: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyChoices(SourceChoices):
    """The options of `dscq verify`."""

    file: Path
    reference: str
    report: Path | None


def convert(terminal: Terminal, choices: ConvertChoices) -> None:
    """Open, plan, write, prove; or, with `--dry-run`, open and plan."""
    from converters.contradictions import refuse_contradictions
    from converters.measurements import expected, prepared
    from converters.pipeline import plan_exports
    from converters.prove import prove_written
    from converters.tune_command import check_tuning, suggest_tuning, trained

    requests = _requests(choices)
    refuse_contradictions(choices, requests)
    options = _convert_options(choices, {request.format for request in requests})
    checkpoint = opened(terminal, choices, choices.source, choices.name, headers_only=choices.dry_run)
    options = expected(choices, checkpoint, requests, options)
    plans = plan_exports(checkpoint, requests, options)
    if choices.tune is not None:
        check_tuning(terminal, plans)
    # Before the work starts: a device or a library that is not there must not show after an hour.
    verifier = _verifier(checkpoint, choices, requests)
    written_from, plans, options = prepared(terminal, checkpoint, choices, plans, options)
    for plan in plans:
        _say_plan(terminal, plan)
    if choices.tune is None:
        suggest_tuning(terminal, plans, options)
    if choices.dry_run:
        from converters.dry_run import show_dry_run

        show_dry_run(terminal, written_from, plans, options)
        return
    written = _write(terminal, written_from, plans, options)
    if choices.tune is not None:
        written = [trained(terminal, checkpoint, one, options, choices.tune) for one in written]
    if verifier is not None:
        prove_written(terminal, verifier, written)
        return
    files = [str(path) for one in written for path in one.paths]
    terminal.document({"files": files, "proof": "skipped by --no-proof"})


def _verifier(
    checkpoint: "Checkpoint", choices: ConvertChoices, requests: Sequence["Request"]
) -> "Verifier | None":
    """Return what will prove the files, ready; None where nothing is to be proven."""
    if choices.no_proof or choices.dry_run:
        return None
    from converters.proof.file import KINDS
    from converters.prove import ready_verifier

    kinds = {KINDS[request.format] for request in requests}
    return ready_verifier(checkpoint, choices, sorted(kinds, key=lambda kind: kind.name))


def _requests(choices: ConvertChoices) -> "list[Request]":
    """Return what --to and --plan ask for; raises UsageError."""
    from converters.plan import Request
    from converters.targets import parse_request
    from converters.targets.gguf_budget import plan_quant

    requests = [parse_request(text) for text in choices.targets]
    if choices.plan is not None:
        requests.append(Request("gguf", plan_quant(choices.plan.stem)))
    if not requests:
        raise UsageError("--to is missing", hint="for example --to gguf:Q4_K_M; or give --plan")
    return requests


def _convert_options(choices: ConvertChoices, formats: set[str]) -> "ConvertOptions":
    from converters.plan import ConvertOptions
    from converters.plan_file import read_plan
    from converters.planning import runtime
    from converters.targets.gguf_speed import excluded_types
    from converters.targets.gguf_types import written_type
    from converters.targets.overrides import parse_overrides
    from quantize.codecs.encoder import encoding_gpus

    device = choices.device or "cpu"
    encoding_gpus(device)  # one that is not there must show before a checkpoint is fetched
    output, embedding = choices.output_tensor_type, choices.token_embedding_type
    tensor_types, module_bits = parse_overrides(choices.tensor_types, formats)
    return ConvertOptions(
        folder=choices.output,
        force=choices.force,
        fresh=choices.fresh,
        split_max_bytes=choices.split_max_size,
        n_threads=choices.n_threads,
        hash_tensors=not choices.no_proof,
        tensor_types=tensor_types,
        module_bits=module_bits,
        output_tensor_type=output and written_type(output, "--output-tensor-type"),
        token_embedding_type=embedding and written_type(embedding, "--token-embedding-type"),
        pure=choices.pure,
        device=device,
        effort=choices.effort or "default",
        tensor_parallel=choices.tensor_parallel or 1,
        runtime=runtime(choices.ctx, choices.cache, choices.reserve, choices.ngl),
        excluded=excluded_types(choices.exclude_types),
        assigned=None if choices.plan is None else read_plan(choices.plan),
    )


def verify(terminal: Terminal, choices: VerifyChoices) -> None:
    """Prove a file that is there; its report goes beside it, and the file stays as it is."""
    from converters.proof.file import written_kind
    from converters.prove import check_report_place, prove_file, ready_verifier

    report = check_report_place(choices.file, choices.report)
    kind = written_kind(choices.file)
    verifier = ready_verifier(opened(terminal, choices, choices.reference), choices, [kind])
    prove_file(terminal, verifier, choices.file, report)


def _say_plan(terminal: Terminal, plan: "Plan") -> None:
    """State sizes, what options did, and every tensor that does not get the type meant for it."""
    terminal.say(
        f"{plan.request}: {len(plan.tensors)} tensors, {plan.n_bytes:,} bytes in {len(plan.files)} file(s), "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )
    for note in plan.notes:
        terminal.say(f"{plan.request}: {note}")
    for reader, *outcome in plan.readers:
        terminal.say(f"{plan.request}: {reader}: {': '.join(part for part in outcome if part)}")
    for tensor in plan.fallbacks:
        terminal.say(f"{plan.request}: {tensor.written_name} becomes {tensor.quant}: {tensor.reason}")


def _write(
    terminal: Terminal, checkpoint: "Checkpoint", plans: Sequence["Plan"], options: "ConvertOptions"
) -> "list[Written]":
    from converters.pipeline import check_destination, with_first_tokens
    from converters.pipeline import convert as write

    check_destination(plans, options, checkpoint.source_files)
    with terminal.stages("blocks") as report:
        options = with_first_tokens(
            checkpoint, plans, options, lambda done, total: report("first tokens", done, total)
        )
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
    for one in written:
        for note in one.notes:
            terminal.say(f"{one.plan.request}: {note}")
        for path in [one.place] if one.plan.directory else one.paths:
            n_bytes = one.plan.n_bytes if one.plan.directory else path.stat().st_size
            terminal.result(f"wrote {path} ({n_bytes:,} bytes)")
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
