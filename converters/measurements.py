"""The statistics that a conversion is made with, from wherever the user said.

    --imatrix      importances of the columns, for GGUF
    --stats        an archive: Hessians, and for types that are not compensated the importances in them
    --calibrate    the archive is made first, on the built-in text, in OUTPUT/stats; so it is where a format
                   needs Hessians and nothing was given
    --measurement  what EXL2's layouts cost; without it OUTPUT/measurement.json is taken, or made first
    --fold         the inputs' statistics are those of scaled channels (converters/folding.py)

An archive that is to be made is expected first: its importances, their numbers aside, are enough to plan and
to check with, so that what can be refused is refused before the measuring.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.terminal import Terminal
from quantize.errors import OutputError, UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.commands import ConvertChoices
    from converters.exl2_measurement import Measurement
    from converters.plan import ConvertOptions, Plan, Request


def will_calibrate(choices: "ConvertChoices", requests: Sequence["Request"]) -> bool:
    """Return whether an archive must be made first."""
    return choices.calibrate or (_hessians_needed(requests) and choices.stats is None and not choices.dry_run)


def expected(
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    requests: Sequence["Request"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    """Return the options with what is there to measure with; raises ImatrixError, ArchiveError."""
    from converters.calibration import expected_importances
    from converters.imatrix import read_importances

    if choices.imatrix is not None:
        options = replace(options, importances=read_importances(choices.imatrix, checkpoint.config))
    if choices.stats is not None:
        options = _with_archive(choices, checkpoint, requests, options)
    options = _with_measurement(choices, checkpoint, requests, options)
    if choices.stats is not None:
        return options
    weighing = choices.rounding != "plain"
    if choices.calibrate and weighing:
        return replace(options, importances=expected_importances(checkpoint))
    return options


def _with_archive(
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    requests: Sequence["Request"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    from converters.hessians import check_hessians
    from converters.stats.archive import open_archive

    if choices.stats is None:
        raise AssertionError("there is no archive")
    archive = open_archive(choices.stats)
    archive.check_model(checkpoint, values=not choices.dry_run)
    if _hessians_needed(requests):
        check_hessians(archive)
    options = _compensating(choices, replace(options, archive=archive))
    # Reading them takes a look at every member: only where somebody weighs with them.
    weighing = choices.rounding != "plain" and any(request.format == "gguf" for request in requests)
    return replace(options, importances=archive.importances()) if weighing else options


def prepared(
    terminal: Terminal,
    checkpoint: "Checkpoint",
    choices: "ConvertChoices",
    plans: "list[Plan]",
    options: "ConvertOptions",
) -> "tuple[Checkpoint, list[Plan], ConvertOptions]":
    """Calibrate and measure what is missing, and fold if that is asked for.

    Returns what is to be written, the plans then, and the options with what they need.
    """
    from converters.pipeline import plan_exports
    from converters.planning import with_losses
    from converters.targets.gguf_budget import is_budget

    requests = [plan.request for plan in plans]
    if will_calibrate(choices, requests):
        options = calibrated(terminal, choices, checkpoint, plans, options)
        plans = plan_exports(checkpoint, requests, options)
    if choices.fold:
        checkpoint, options = _folded(terminal, choices, checkpoint, plans, options)
        plans = plan_exports(checkpoint, requests, options)
    if will_measure(choices, requests, options):
        options = measured(terminal, choices, checkpoint, plans, options)
        plans = plan_exports(checkpoint, requests, options)
    budgeted = [request for request in requests if request.format == "gguf" and is_budget(request.quant)]
    # A dry run does not know the factors, and so not the losses.
    if options.archive is not None and budgeted and not (choices.fold and choices.dry_run):
        options = with_losses(terminal, checkpoint, options, measure=not choices.dry_run)
        plans = plan_exports(checkpoint, requests, options)
    return checkpoint, plans, options


def _folded(
    terminal: Terminal,
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    plans: Sequence["Plan"],
    options: "ConvertOptions",
) -> "tuple[Checkpoint, ConvertOptions]":
    """Fold the checkpoint; in a dry run, which reads no weights, by factors of one."""
    from converters.folding import as_if_folded, folded, refuse_useless
    from converters.hessians import check_hessians
    from converters.pipeline import refuse_taken

    if options.archive is not None:
        check_hessians(options.archive)
    refuse_useless(plans)
    if choices.dry_run:
        return as_if_folded(checkpoint), options
    refuse_taken(plans, options)
    options = first_tokens_shown(terminal, checkpoint, options)
    with terminal.stages("inputs") as report:
        return folded(checkpoint, options, lambda done, total: report("fold", done, total))


def first_tokens_shown(
    terminal: Terminal, checkpoint: "Checkpoint", options: "ConvertOptions"
) -> "ConvertOptions":
    """Return the options with the inputs of rows' first tokens, if they need them; show how far it is."""
    from converters.pipeline import first_tokens_known

    with terminal.stages("blocks") as report:
        return first_tokens_known(
            checkpoint, options, lambda done, total: report("first tokens", done, total)
        )


def calibrated(
    terminal: Terminal,
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    plans: Sequence["Plan"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    """Return the options with the archive, made on the built-in text unless it is there already."""
    from converters.calibration import calibrated_archive
    from converters.pipeline import check_destination, read_licences
    from quantize.codecs import codec

    requests = [plan.request for plan in plans]
    ggufs = [tensor for plan in plans if plan.request.format == "gguf" for tensor in plan.tensors]
    weighed = any(codec(tensor.quant).uses_importance for tensor in ggufs)
    if not weighed and not _hessians_needed(requests):
        raise UsageError("--calibrate: no type that was asked for looks at importances")
    check_destination(plans, options, checkpoint.source_files)
    read_licences(checkpoint)
    archive = calibrated_archive(terminal, checkpoint, choices, choices.output)
    options = _compensating(choices, replace(options, archive=archive))
    if weighed and choices.imatrix is None and choices.rounding != "plain":
        return replace(options, importances=archive.importances())
    return options


def measured(
    terminal: Terminal,
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    plans: Sequence["Plan"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    """Return the options with what EXL2's layouts cost: read, or measured now and kept in the output."""
    from converters.exl2_measure import measure
    from converters.exl2_measurement import NAME
    from converters.pipeline import check_destination, read_licences

    options = _with_measurement(choices, checkpoint, [plan.request for plan in plans], options)
    archive = options.archive
    if options.measurement is not None or archive is None:
        return options
    check_destination(plans, options, checkpoint.source_files)
    read_licences(checkpoint)
    path = choices.output / NAME
    terminal.say(f"measuring: what each layout costs, once for all sizes, in {path}")
    options = first_tokens_shown(terminal, checkpoint, options)
    with terminal.stages("inputs") as report:
        measurement = measure(
            archive,
            checkpoint.weights,
            path,
            n_threads=options.n_threads,
            device=options.device,
            first=options.first_tokens,
            on_progress=report,
        )
    return replace(options, measurement=measurement)


def will_measure(choices: "ConvertChoices", requests: Sequence["Request"], options: "ConvertOptions") -> bool:
    """Return whether layouts must be measured first, or a measurement be read that was not there before."""
    exl2 = any(request.format == "exl2" for request in requests)
    return exl2 and options.measurement is None and not choices.dry_run


def _with_measurement(
    choices: "ConvertChoices",
    checkpoint: "Checkpoint",
    requests: Sequence["Request"],
    options: "ConvertOptions",
) -> "ConvertOptions":
    """Return the options with the measurement that was given, or this archive's in the output."""
    from converters.exl2_measurement import NAME, measurement_key, read_measurement

    if not any(request.format == "exl2" for request in requests):
        return options
    key = None if options.archive is None else measurement_key(options.archive)
    own, found = choices.output / NAME, None
    if choices.measurement is not None:
        found = read_measurement(choices.measurement, checkpoint.config, key)
    elif key is not None and own.is_file():
        found = _own_measurement(own, checkpoint, key, force=choices.force)
    return replace(options, measurement=found)


def _own_measurement(path: Path, checkpoint: "Checkpoint", key: str, *, force: bool) -> "Measurement | None":
    """Return what an earlier run measured; None where another's may be replaced."""
    from converters.exl2_measurement import read_measurement

    try:
        return read_measurement(path, checkpoint.config, key)
    except UsageError as error:
        if force:
            return None
        hint = "write elsewhere with -o, or measure anew with --force"
        raise OutputError(error.message, reasons=error.reasons, hint=hint) from error


def _compensating(choices: "ConvertChoices", options: "ConvertOptions") -> "ConvertOptions":
    """Return the options with GGUF's way of rounding: compensated where there are Hessians."""
    from converters.hessians import check_hessians

    if options.archive is None:
        raise AssertionError("there is no archive")
    if choices.rounding == "compensated":
        check_hessians(options.archive)
    by_default = choices.rounding is None and not options.archive.diagonal_only
    return replace(options, compensate=by_default or choices.rounding == "compensated")


def _hessians_needed(requests: Sequence["Request"]) -> bool:
    from converters.targets import TARGETS

    return any(TARGETS[request.format].needs_hessians(request) for request in requests)
