"""What `--dry-run` shows: every tensor's type and reason, the sizes, and what the real run would need."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.memory import Needs, memory_needs
from converters.plan import ConvertOptions, Plan
from converters.terminal import Terminal

_COLUMNS = ("tensor", "shape", "type", ">bits", ">bytes", "file", "why")


def show_dry_run(
    terminal: Terminal, checkpoint: Checkpoint, plans: Sequence[Plan], options: ConvertOptions
) -> None:
    """Print the plans, the files, and the disk and memory that they need; or all of it as a document."""
    for plan in plans:
        _show_plan(terminal, plan)
    total, free = sum(plan.n_bytes for plan in plans), _free_bytes(options.folder)
    needs = memory_needs(checkpoint, plans, options)
    terminal.result(f"disk: {total:,} bytes in {options.folder}, {free:,} are free")
    terminal.result(f"memory: about {_megabytes(needs.writing)} to write, {_megabytes(needs.proof)} to prove")
    terminal.result("nothing was written")
    terminal.document(
        {
            "plans": [_plan_document(plan) for plan in plans],
            "needed": total,
            "free": free,
            "memory": _memory_document(needs),
        }
    )


def _show_plan(terminal: Terminal, plan: Plan) -> None:
    rows = [
        (
            tensor.written_name,
            str(list(tensor.shape)),
            tensor.quant,
            f"{tensor.bits_per_weight:.4g}",
            f"{tensor.n_bytes:,}",
            str(tensor.file + 1),
            tensor.reason,
        )
        for tensor in plan.tensors
    ]
    title = f"{plan.request}: {plan.n_bytes:,} bytes, {plan.bits_per_weight:.3f} bits per weight"
    terminal.table(title, _COLUMNS, rows)
    files = [(str(number), file.name, f"{file.n_bytes:,}") for number, file in enumerate(plan.files, 1)]
    terminal.table("", ("file", "name", ">bytes"), files)
    if plan.readers:
        terminal.table("", ("reader", "", "why"), plan.readers)
    for note in plan.notes:
        terminal.result(f"{plan.request}: {note}")


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _memory_document(needs: Needs) -> dict[str, int]:
    return {"write": needs.writing, "prove": needs.proof}


def _plan_document(plan: Plan) -> dict[str, Any]:
    tensors = [
        {
            "name": t.written_name,
            "source": t.name,
            "shape": t.shape,
            "type": t.quant,
            "bytes": t.n_bytes,
            "bits_per_weight": t.bits_per_weight,
            "falls_back": t.falls_back,
            "why": t.reason,
        }
        for t in plan.tensors
    ]
    return {
        "request": str(plan.request),
        "files": [{"name": file.name, "bytes": file.n_bytes} for file in plan.files],
        "bytes": plan.n_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "notes": plan.notes,
        "readers": plan.readers,
        "tensors": tensors,
    }
