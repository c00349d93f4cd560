"""The report that lies beside every export: `NAME.report.json`.

Everything that the terminal shows and everything behind it, for people and for scripts: where the
weights came from, what was planned, the files with their sha256, every check with value and bound, every
tensor's figures, wall times, the environment. `schema` is raised when a field changes its meaning.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.checkpoint import Checkpoint
from converters.disk import PARTIAL, explained
from converters.plan import Plan
from converters.proof.record import Check, Figure, Proof, TensorFigures

SCHEMA = 1
SUFFIX = ".report.json"
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


def report_path(place: Path) -> Path:
    """Return where the report of an export lies: beside its first file, without the number of a shard.

    Of an export that is a folder it lies beside the folder.
    """
    stem = _SHARD_NUMBER.sub("", place.name.removesuffix(".gguf"))
    return place.with_name(stem + SUFFIX)


def build_report(
    checkpoint: Checkpoint,
    proof: Proof | None,
    *,
    plan: Plan | None = None,
    file_hashes: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report as plain JSON values.

    `notes` say what went otherwise than planned. `proof` is None for `--no-proof`, `plan` for `dscq verify`,
    which did not write the file. `file_hashes` are sha256 by file name; `seconds` are wall times of stages
    before the proof.
    """
    source = dataclasses.asdict(checkpoint.provenance)
    source["travelling"] = [path.name for path in checkpoint.provenance.travelling]
    source["tokenizer"] = checkpoint.tokenizer.fingerprint
    report = {
        "schema": SCHEMA,
        "dscq": _version("dscq"),
        "source": source,
        "config": dataclasses.asdict(checkpoint.config),
        "plan": None if plan is None else _plan(plan),
        "notes": list(notes),
        "files": dict(file_hashes or {}),
        "proof": None if proof is None else proof_document(proof),
        "seconds": {**(seconds or {}), **(proof.seconds if proof is not None else {})},
        "environment": environment(),
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def proof_document(proof: Proof) -> dict[str, Any]:
    """Return the proof's part of the report: verdict, checks, figures, tensors, the runtime's state."""
    return {
        "passed": proof.passed,
        "verdict": verdict(proof),
        "checks": [_check(check) for check in proof.checks],
        "figures": [_figure(figure) for figure in proof.figures],
        "quant_types": dict(proof.quant_types),
        "probe_rows": list(proof.rows),
        "probe_note": proof.probe_note,
        "runtime": dataclasses.asdict(proof.runtime),
        "tensors": [_tensor(tensor) for tensor in proof.tensors],
    }


def verdict(proof: Proof) -> str:
    """Return the outcome in one line: what failed, proven, or unproven in the runtime and what to install."""
    if not proof.passed:
        return f"failed: {'; '.join(f'{check.layer}: {check.name}' for check in proof.failures)}"
    if proof.runtime.status == "proven":
        return f"proven, in {proof.runtime.version}"
    hint = f": {proof.runtime.hint}" if proof.runtime.hint else ""
    return f"unproven in the runtime{hint}"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report atomically; raises OutputError if the folder cannot be written to."""
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def environment() -> dict[str, str]:
    """Return what the figures may depend on: Python, the machine, the libraries' versions."""
    libraries = ("torch", "numpy", "gguf", "tokenizers", "safetensors", "xllamacpp")
    found = {name: _version(name) for name in libraries}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        **{name: version for name, version in found.items() if version},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plan(plan: Plan) -> dict[str, Any]:
    fallbacks = {t.written_name: f"{t.quant}: {t.reason}" for t in plan.fallbacks}
    return {
        "request": str(plan.request),
        "n_bytes": plan.n_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "types": {t.written_name: f"{t.quant}: {t.reason}" for t in plan.tensors},
        "fallbacks": fallbacks,
        "notes": list(plan.notes),
        "readers": [list(reader) for reader in plan.readers],
    }


def _check(check: Check) -> dict[str, Any]:
    return dataclasses.asdict(check)


def _figure(figure: Figure) -> dict[str, Any]:
    return {"pair": figure.pair, "positions": figure.positions, **dataclasses.asdict(figure.divergence)}


def _tensor(tensor: TensorFigures) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "quant": tensor.quant,
        "shift": tensor.shift,
        **dataclasses.asdict(tensor.report),
    }


def _plain(value: Any) -> Any:
    """Make a value JSON's: lists, and `"nan"` or `"inf"` for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
