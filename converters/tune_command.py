"""`dscq tune` and `dscq convert --tune` as a terminal shows them; the work is converters/tune.py's.

Everything heavy is imported inside, so that `--help` stays quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.choices import opened
from converters.commands import SourceChoices
from converters.terminal import Terminal
from quantize.errors import UsageError

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint
    from converters.plan import ConvertOptions, Plan, Written


MOST_BITS = 4.5
"""Bits per weight above which nothing was gained where it was measured (docs/fidelity.md)."""
FEW_BITS = 4.0
"""Bits per weight below which a sixth to a third of the loss was gained."""


@dataclass(frozen=True, kw_only=True)
class TuneChoices(SourceChoices):
    """The options of `dscq tune`."""

    file: Path
    reference: str
    stats: Path
    output: Path
    steps: int
    force: bool
    no_proof: bool


def tune(terminal: Terminal, choices: TuneChoices) -> None:
    """Train a file's scales, write the result, prove it."""
    from converters.proof.file import GGUF
    from converters.prove import check_report_place, prove_file, ready_verifier
    from converters.stats.archive import open_archive
    from converters.tune import check_output, tune_file
    from converters.verify import torch_threads
    from quantize.tuning import Settings

    check_output(choices.file, choices.output, force=choices.force)
    report = check_report_place(choices.output, None)
    checkpoint, archive = opened(terminal, choices, choices.reference), open_archive(choices.stats)
    verifier = None if choices.no_proof else ready_verifier(checkpoint, choices, [GGUF])
    with terminal.stages("steps") as progress, torch_threads(choices.n_threads):
        found = tune_file(
            choices.file,
            checkpoint,
            archive,
            choices.output,
            Settings(n_steps=choices.steps),
            choices.device or "cpu",
            force=choices.force,
            on_step=lambda done, total, kl: progress("tune", done, total),
        )
    terminal.result(f"wrote {found.path} ({found.path.stat().st_size:,} bytes): {found.summary}")
    if verifier is not None:
        prove_file(terminal, verifier, choices.output, report)
        return
    figures = {"before": found.before, "after": found.after}
    terminal.document({"file": str(found.path), "kl": figures, "proof": "skipped by --no-proof"})


def check_tuning(terminal: Terminal, plans: Sequence["Plan"]) -> None:
    """Say which exports --tune leaves as they are; raises UsageError, before the work, if all of them."""
    from converters.tune import can_be_tuned

    idle = [str(plan.request) for plan in plans if not can_be_tuned(plan)]
    if len(idle) == len(plans):
        raise UsageError(f"--tune: {', '.join(idle)}: no type with scales that can be moved")
    for plan in plans:
        if plan.request.format == "gguf" and plan.bits_per_weight > MOST_BITS:
            bits = f"{plan.bits_per_weight:.2f} bits per weight"
            terminal.say(f"--tune: {plan.request} has {bits}: above {MOST_BITS:g} training gains nothing")
    if idle:
        terminal.say(f"--tune: {', '.join(idle)} stays as converted: no scales that can be moved")


def suggest_tuning(terminal: Terminal, plans: Sequence["Plan"], options: "ConvertOptions") -> None:
    """Name the exports that --tune would make much better, where there are rows to train on."""
    from converters.tune import can_be_tuned

    for plan in plans if options.archive is not None else ():
        few = plan.request.format == "gguf" and plan.bits_per_weight < FEW_BITS
        if few and len(plan.files) == 1 and can_be_tuned(plan):
            terminal.say(
                f"{plan.request}: --tune would lower the loss further, in more time: docs/fidelity.md"
            )


def trained(
    terminal: Terminal, checkpoint: "Checkpoint", written: "Written", options: "ConvertOptions", n_steps: int
) -> "Written":
    """Train the scales of what was written, if it has any that can be moved."""
    from converters.tune import can_be_tuned, tune_written
    from converters.verify import torch_threads
    from quantize.tuning import Settings

    if options.archive is None or not can_be_tuned(written.plan):
        return written
    with terminal.stages("steps") as progress, torch_threads(options.n_threads):
        found = tune_written(
            written,
            checkpoint,
            options.archive,
            Settings(n_steps=n_steps),
            options.device,
            on_step=lambda done, total, kl: progress("tune", done, total),
        )
    terminal.result(f"{written.plan.request}: {found.notes[-1]}")
    return found
