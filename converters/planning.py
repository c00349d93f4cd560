"""`dscq plan`: which size loses how much, and the types of one size as a file.

The choices are the options of `converters.cli` word for word. Everything heavy is imported inside, so that
`--help` stays quick.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.choices import OpenChoices, opened
from converters.terminal import Terminal
from quantize.errors import UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.curve import Point
    from converters.plan import ConvertOptions, Plan, Request
    from converters.runtime_memory import Runtime


@dataclass(frozen=True, kw_only=True)
class PlanChoices(OpenChoices):
    """The options of `dscq plan`."""

    source: str
    stats: Path
    target: str | None
    output: Path | None
    curve: bool
    plot: Path | None
    reports: Path | None
    force: bool
    ctx: int | None
    cache: str | None
    reserve: int | None
    ngl: int | None
    exclude_types: tuple[str, ...]
    fold: bool
    tensor_types: tuple[str, ...]
    output_tensor_type: str | None
    token_embedding_type: str | None


def plan(terminal: Terminal, choices: PlanChoices) -> None:
    """Predict losses, or read them; then show the curve, and plan one size."""
    from converters.folding import folded
    from converters.measurements import first_tokens_shown
    from converters.plan import Request
    from converters.targets import parse_request

    request = parse_request(choices.target) if choices.target is not None else None
    _check(choices, request)
    checkpoint, options = _opened(terminal, choices)
    if choices.fold:
        options = first_tokens_shown(terminal, checkpoint, options)
        with terminal.stages("inputs") as report:
            checkpoint, options = folded(checkpoint, options, lambda done, total: report("fold", done, total))
    options = with_losses(terminal, checkpoint, options)
    document: dict[str, object] = {}
    if choices.curve:
        document["curve"] = [asdict(point) for point in _curve(terminal, checkpoint, options, choices)]
    if isinstance(request, Request):
        document["plan"] = _one(terminal, checkpoint, request, options, choices.output)
    terminal.document(document)


def with_losses(
    terminal: Terminal, checkpoint: "Checkpoint", options: "ConvertOptions", *, measure: bool = True
) -> "ConvertOptions":
    """Return the options with predicted losses: those of an earlier plan, or new ones if they may be made."""
    from converters.measurements import first_tokens_shown
    from converters.type_losses import kept_losses, measured_losses

    kept = kept_losses(options)
    if kept is not None or not measure:
        return replace(options, losses=kept)
    if options.compensate:
        options = first_tokens_shown(terminal, checkpoint, options)
    with terminal.stages("matrices") as report:
        found = measured_losses(checkpoint, options, lambda done, total: report("losses", done, total))
    return replace(options, losses=found)


def runtime(ctx: int | None, cache: str | None, reserve: int | None, ngl: int | None) -> "Runtime":
    """Return what `fit=` leaves room for, defaults where nothing was said."""
    from converters.runtime_memory import Runtime

    default = Runtime()
    return Runtime(ctx or default.context, cache, reserve or default.reserve, ngl)


def refuse_idle_runtime(
    ctx: int | None,
    cache: str | None,
    reserve: int | None,
    ngl: int | None,
    requests: Sequence["Request"],
) -> None:
    """Raise UsageError for options of the memory where no request asks for a fit, or none in that runtime."""
    given = {"--ctx": ctx, "--cache": cache, "--reserve": reserve, "--ngl": ngl}
    idle = [name for name, value in given.items() if value is not None]
    fits = [request for request in requests if request.quant.startswith("fit=")]
    if idle and not fits:
        raise UsageError(f"{', '.join(idle)}: only for fit=, which is not asked for")
    if cache is not None:
        _refuse_foreign_cache(cache, fits)
    foreign = [str(request) for request in fits if request.format != "gguf"]
    if ngl is not None and foreign:
        raise UsageError(f"--ngl: only for gguf:fit=; {', '.join(foreign)} is on the card whole")


def refuse_idle_exclusion(patterns: Sequence[str], requests: Sequence["Request"]) -> None:
    """Raise UsageError for types to exclude where no request lets types be chosen."""
    from converters.targets.gguf_budget import is_budget

    if patterns and not any(each.format == "gguf" and is_budget(each.quant) for each in requests):
        raise UsageError(
            "--exclude-type: only for gguf:bpw=, size= and fit=, none of which is asked for",
            hint="a recipe's types are changed by --tensor-type",
        )


def _refuse_foreign_cache(cache: str, fits: Sequence["Request"]) -> None:
    """Raise UsageError for a type of the KV cache that the runtime of a format does not have."""
    from converters import exllamav2_memory, runtime_memory

    runtimes = {
        "gguf": ("llama.cpp", runtime_memory.CACHES),
        "exl2": ("exllamav2", exllamav2_memory.CACHES),
    }
    for request in fits:
        name, known = runtimes[request.format]
        if cache not in known:
            mixed = len({request.format for request in fits}) > 1
            raise UsageError(
                f"--cache {cache}: {request} is for {name}, whose caches are {', '.join(known)}",
                hint="one command for each format, or no --cache: both have halves" if mixed else "",
            )


def _check(choices: PlanChoices, request: "Request | None") -> None:
    from converters.calibration import check_free
    from converters.stats.look import check_plot

    if request is None and not choices.curve:
        raise UsageError("there is nothing to plan", hint="give --to gguf:bpw=3.5, or --curve")
    if request is not None and request.format != "gguf":
        raise UsageError(f"--to {request}: only GGUF has types to plan", hint="for example gguf:bpw=3.5")
    if choices.output is not None and request is None:
        raise UsageError("-o: only with --to, which says what to plan")
    drawn = {"--plot draws": choices.plot, "--reports is for": choices.reports}
    if idle := [name for name, value in drawn.items() if value is not None and not choices.curve]:
        raise UsageError(f"{idle[0]} the curve", hint="give --curve too")
    if choices.plot is not None:
        check_plot(choices.plot)
    requests = [] if request is None else [request]
    refuse_idle_runtime(choices.ctx, choices.cache, choices.reserve, choices.ngl, requests)
    if not choices.curve:
        refuse_idle_exclusion(choices.exclude_types, requests)
    for path in filter(None, (choices.output, choices.plot)):
        check_free(path, force=choices.force)


def _opened(terminal: Terminal, choices: PlanChoices) -> "tuple[Checkpoint, ConvertOptions]":
    """Return the checkpoint, and the options of a conversion with its statistics."""
    from converters.hessians import check_hessians
    from converters.plan import ConvertOptions
    from converters.stats.archive import open_archive
    from converters.targets.gguf_speed import excluded_types
    from converters.targets.gguf_types import written_type
    from converters.targets.overrides import parse_overrides

    output, embedding = choices.output_tensor_type, choices.token_embedding_type
    options = ConvertOptions(
        folder=Path(),
        n_threads=choices.n_threads,
        tensor_types=parse_overrides(choices.tensor_types, {"gguf"})[0],
        output_tensor_type=output and written_type(output, "--output-tensor-type"),
        token_embedding_type=embedding and written_type(embedding, "--token-embedding-type"),
        runtime=runtime(choices.ctx, choices.cache, choices.reserve, choices.ngl),
        excluded=excluded_types(choices.exclude_types),
    )
    checkpoint = opened(terminal, choices, choices.source)
    archive = open_archive(choices.stats)
    archive.check_model(checkpoint)
    check_hessians(archive)
    return checkpoint, replace(options, archive=archive, compensate=True, importances=archive.importances())


def _curve(
    terminal: Terminal, checkpoint: "Checkpoint", options: "ConvertOptions", choices: PlanChoices
) -> "list[Point]":
    from converters import curve

    points = curve.curve(checkpoint, options, choices.reports)
    terminal.table("size against KL divergence", curve.COLUMNS, [point.cells() for point in points])
    if choices.plot is not None:
        curve.plot(points, choices.plot)
        terminal.result(f"wrote {choices.plot}")
    return points


def _one(
    terminal: Terminal,
    checkpoint: "Checkpoint",
    request: "Request",
    options: "ConvertOptions",
    output: Path | None,
) -> dict[str, object]:
    """Show what a request's tensors become, and write it down if there is a place for it."""
    from converters.pipeline import plan_exports
    from converters.plan_file import write_plan
    from converters.targets.gguf import gguf_types
    from converters.targets.gguf_budget import predicted_loss

    (made,) = plan_exports(checkpoint, [request], options)
    nats = predicted_loss(gguf_types(checkpoint, request, options))
    rows = [
        (tensor.written_name, tensor.quant, f"{tensor.bits_per_weight:.4g}", f"{tensor.n_bytes:,}")
        for tensor in made.tensors
        if len(tensor.shape) > 1
    ]
    terminal.table(f"{request}: {made.n_bytes:,} bytes", ("tensor", "type", ">bits", ">bytes"), rows)
    for note in made.notes:
        terminal.result(f"{request}: {note}")
    if output is not None:
        fold = checkpoint.fold is not None
        write_plan(output, checkpoint.provenance.name, made, nats, fold=fold)
        terminal.result(f"wrote {output}")
    return _document(made, nats)


def _document(made: "Plan", nats: float | None) -> dict[str, object]:
    types = {tensor.written_name: tensor.quant for tensor in made.tensors if len(tensor.shape) > 1}
    return {"request": str(made.request), "bytes": made.n_bytes, "predicted_kl": nats, "types": types}
