"""Options that leave each other nothing to do: refused before a checkpoint is opened."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantize.errors import UsageError

if TYPE_CHECKING:
    from converters.commands import ConvertChoices
    from converters.plan import Request


def refuse_contradictions(choices: "ConvertChoices", requests: Sequence["Request"]) -> None:
    """Raise UsageError for options that would be ignored, and for two sources of the same thing."""
    proof = {
        "--require-proof": choices.require_proof,
        "--probe-tokens": choices.probe_tokens is not None,
        "--llama-lib": choices.llama_lib is not None,
    }
    if choices.no_proof and (idle := _given(proof)):
        raise UsageError(f"--no-proof leaves nothing to do for {', '.join(idle)}")
    _refuse_idle(choices, requests)
    _refuse_useless_budgets(choices, requests)
    _refuse_two_measurements(choices, {request.format for request in requests})


def _refuse_useless_budgets(choices: "ConvertChoices", requests: Sequence["Request"]) -> None:
    """Raise UsageError for options that a budget or a plan leaves nothing to do."""
    from converters.planning import refuse_idle_exclusion, refuse_idle_runtime
    from converters.targets.gguf_budget import is_budget, is_plan

    refuse_idle_runtime(choices.ctx, choices.cache, choices.reserve, choices.ngl, requests)
    refuse_idle_exclusion(choices.exclude_types, requests)
    mixed = [request for request in requests if not is_budget(request.quant) and not is_plan(request.quant)]
    if choices.pure and not any(request.format == "gguf" for request in mixed):
        raise UsageError("--pure: no recipe is asked for, whose mix it would leave out")


def _refuse_idle(choices: "ConvertChoices", requests: Sequence["Request"]) -> None:
    """Raise UsageError for options of a format that is not asked for."""
    from converters.measurements import will_calibrate

    formats = {request.format for request in requests}
    of_gguf = {
        "--imatrix": choices.imatrix is not None,
        "--rounding": choices.rounding is not None,
        "--output-tensor-type": choices.output_tensor_type is not None,
        "--token-embedding-type": choices.token_embedding_type is not None,
        "--pure": choices.pure,
        "--llama-lib": choices.llama_lib is not None,
        "--tune": choices.tune is not None,
        "--fold": choices.fold,
    }
    of_gptq = {"--tp": choices.tensor_parallel is not None}
    of_exl2 = {"--measurement": choices.measurement is not None}
    for name, options in {"gguf": of_gguf, "gptq": of_gptq, "exl2": of_exl2}.items():
        if name not in formats and (idle := _given(options)):
            raise UsageError(f"{', '.join(idle)}: only for {name}:, which is not asked for")
    measured = choices.stats is not None or will_calibrate(choices, requests)
    if choices.tune is not None and not measured:
        raise UsageError("--tune: there is no text to train on", hint="give --stats or --calibrate")
    if choices.tune is not None and choices.split_max_size is not None:
        raise UsageError("--tune: takes a single file", hint="leave --split-max-size out")
    _refuse_fold(choices, formats, measured=measured)
    if choices.effort is not None and formats == {"gguf"} and (not measured or _is_simple(choices)):
        raise UsageError(
            "--effort: nothing here is rounded with Hessians", hint="give --stats or --calibrate"
        )


def _refuse_fold(choices: "ConvertChoices", formats: set[str], *, measured: bool) -> None:
    """Raise UsageError for folding where nothing gains from it, or others would get the folded model too."""
    if not choices.fold:
        return
    if not measured or _is_simple(choices):
        hint = "give --stats or --calibrate, and no other --rounding than compensated"
        raise UsageError("--fold: channels are scaled for rounding with Hessians alone", hint=hint)
    if others := sorted(formats - {"gguf"}):
        hint = "two commands with the same --stats do the same"
        raise UsageError(f"--fold: only for gguf:, and {', '.join(others)} is asked for too", hint=hint)


def _refuse_two_measurements(choices: "ConvertChoices", formats: set[str]) -> None:
    """Raise UsageError unless the importances come from one place, and are there to be used."""
    sources = {
        "--imatrix": choices.imatrix is not None,
        "--stats": choices.stats is not None,
        "--calibrate": choices.calibrate,
    }
    given = _given(sources)
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: the importances can come from one of them only")
    if choices.rounding in ("weighted", "compensated") and not given:
        fault = f"--rounding {choices.rounding}: there is nothing to weigh with"
        raise UsageError(fault, hint=f"give {', '.join(sources)}")
    if choices.rounding == "compensated" and choices.imatrix is not None:
        raise UsageError(
            "--rounding compensated: --imatrix has no Hessians", hint="give --stats or --calibrate"
        )
    if choices.rounding == "plain" and given and formats == {"gguf"}:
        raise UsageError(f"--rounding plain leaves nothing to do for {given[0]}")
    if choices.dry_run and choices.calibrate:
        raise UsageError(
            "--dry-run: --calibrate would do hours of work", hint="run dscq calibrate, then give --stats"
        )


def _is_simple(choices: "ConvertChoices") -> bool:
    return choices.rounding in ("plain", "weighted")


def _given(options: Mapping[str, bool]) -> list[str]:
    return [name for name, is_given in options.items() if is_given]
