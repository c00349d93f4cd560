"""The proof as the two commands run it: verify, report, table, verdict, exit code.

`convert` proves what it has just written: it reads the payload's hashes back from the disk, leaves a report
beside every export, and takes the name away from a file that fails (`*.failed`). `verify` proves a file that
was made some time ago, by whatever tool: its name stays, whatever comes out.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from converters.checkpoint import Checkpoint
from converters.pipeline import mark_failed, reread_hashes
from converters.plan import Written
from converters.probe import DEFAULT_TOKENS
from converters.proof.file import GGUF, Kind
from converters.proof.record import Check, Figure, Proof, ProofOptions
from converters.report import build_report, report_path, verdict, write_report
from converters.terminal import Terminal
from converters.verify import Verifier
from quantize.errors import UsageError, VerificationError


class Choices(Protocol):
    """The options of the command line that the proof looks at; None leaves the default."""

    @property
    def require_proof(self) -> bool:
        """Whether a missing runtime is a failure."""
        ...

    @property
    def probe_tokens(self) -> int | None:
        """Size of the probe text."""
        ...

    @property
    def llama_lib(self) -> Path | None:
        """Another libllama."""
        ...

    @property
    def readers(self) -> Path | None:
        """The folder of the GPTQ readers' environments."""
        ...

    @property
    def device(self) -> str | None:
        """Where the reference forward runs."""
        ...

    @property
    def n_threads(self) -> int:
        """Worker threads."""
        ...


def ready_verifier(checkpoint: Checkpoint, choices: Choices, kinds: Iterable[Kind] = (GGUF,)) -> Verifier:
    """Return a verifier whose device, probe and runtimes, those of `kinds`, are known to be there.

    Raises UsageError for a device or a library that is not, VerificationError where the runtime is
    required and missing.
    """
    options = ProofOptions(
        n_tokens=choices.probe_tokens or DEFAULT_TOKENS,
        llama_lib=choices.llama_lib,
        readers=choices.readers,
        device=choices.device or "cpu",
        n_threads=choices.n_threads,
        require_runtime=choices.require_proof,
    )
    verifier = Verifier(checkpoint, options)
    for kind in kinds:
        verifier.check_runtime(kind)
    return verifier


def prove_written(terminal: Terminal, verifier: Verifier, exports: Sequence[Written]) -> None:
    """Prove every export, write its report, rename what fails; raises VerificationError if any did."""
    reports: list[dict[str, Any]] = []
    failures: list[str] = []
    try:
        for written in exports:
            proof, report = _prove_export(terminal, verifier, written)
            reports.append(_conclude(terminal, proof, report, report_path(written.place)))
            if not proof.passed:
                terminal.result(f"renamed to {', '.join(str(path) for path in mark_failed(written))}")
                failures += [f"{written.place.name}: {check}" for check in proof.failures]
    except BaseException:
        unproven = [str(written.place) for written in exports[len(reports) :]]
        terminal.say(f"written but not proven: {', '.join(unproven)}; `dscq verify` will do it")
        raise
    terminal.document({"reports": reports})
    _raise_if_any(failures)


def _prove_export(terminal: Terminal, verifier: Verifier, written: Written) -> tuple[Proof, dict[str, Any]]:
    """Read an export's hashes back and prove it; return the proof and its report."""
    reread = reread_hashes(written)
    wrong = ", ".join(reread.differing)
    check = Check("file", "payload on disk", not reread.differing, detail=wrong or "hashes as written")
    with terminal.stages() as on_progress:
        proof = verifier.verify(written.place, on_progress)
    proof = replace(proof, checks=(check, *proof.checks))
    report = build_report(
        verifier.reference,
        proof,
        plan=written.plan,
        file_hashes=reread.file_hashes,
        seconds={"convert": written.seconds},
        notes=written.notes,
    )
    return proof, report


def check_report_place(file: Path, report: Path | None) -> Path:
    """Return where the report of `dscq verify` goes: as asked, or beside the file.

    Of a folder, beside that: in it, it would travel with the model. Raises UsageError, before any work, for a
    place where it cannot be written or where a model lies.
    """
    file = file.resolve() if file.is_dir() else file  # "." has no name
    place = report or file.with_name(file.name.removesuffix(".gguf") + ".verify.report.json")
    in_folder = file.is_dir() and place.exists() and place.resolve().is_relative_to(file)
    if (
        place.suffix.lower() in (".gguf", ".safetensors")
        or in_folder
        or (place.exists() and file.exists() and place.samefile(file))
    ):
        raise UsageError(f"--report {place}: a report must not take a model's name")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise UsageError(f"{place.parent}: the report cannot be written there", hint="give --report PATH")
    return place


def prove_file(terminal: Terminal, verifier: Verifier, path: Path, report: Path) -> None:
    """Prove one file that exists; raises VerificationError if it fails."""
    with terminal.stages() as on_progress:
        proof = verifier.verify(path, on_progress)
    document = build_report(verifier.reference, proof)
    terminal.document(_conclude(terminal, proof, document, report))
    hint = "if the file was made with --eos completion, say --eos completion here too"
    eos_differs = any(check.name == "eos_id" for check in proof.failures)
    _raise_if_any([f"{path.name}: {check}" for check in proof.failures], hint if eos_differs else "")


def _raise_if_any(failures: Sequence[str], hint: str = "") -> None:
    if failures:
        raise VerificationError(
            "the proof failed", reasons=failures, hint=hint or "the report has the details"
        )


def _conclude(terminal: Terminal, proof: Proof, report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Print tables and verdict, write the report and return it."""
    checks = [_check_row(check) for check in proof.checks]
    terminal.table(f"Proof of {proof.paths[0]}", ["layer", "check", ">value", ">bound", "result", ""], checks)
    columns = [
        "logits",
        "positions",
        ">mean KL",
        ">median",
        ">99 %",
        ">max",
        ">same top-1",
        ">perplexity",
        "",
    ]
    terminal.table("", columns, [_figure_row(figure) for figure in proof.figures])
    if proof.probe_note:
        terminal.result(f"probe: {proof.probe_note}")
    terminal.result(verdict(proof))
    write_report(path, report)
    terminal.say(f"report: {path}")
    return report


def _check_row(check: Check) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.3g}" for value in (check.value, check.bound))
    return (check.layer, check.name, *numbers, "ok" if check.passed else "FAILED", check.detail)


def _figure_row(figure: Figure) -> tuple[str, ...]:
    d = figure.divergence
    kl = (f"{value:.2e}" for value in (d.mean, d.median, d.p99, d.max))
    top1 = f"{100 * d.top1_agreement:.2f} %"
    return (
        figure.pair,
        figure.positions,
        *kl,
        top1,
        f"{d.perplexity_reference:.4f}",
        f"-> {d.perplexity_other:.4f}",
    )
