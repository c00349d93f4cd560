"""EXL2 folders in ExLlamaV2, for `scripts/gpu_check exl2`.

Three sizes, so that all widths of codes and both heads are met. What is compared is exllamav2's logits with
those of this project's f32 forward over the same folder's weights, on the text that proofs are made on: the
weights are the same to the bit, so what is left is arithmetic in halves, and the bound is that of GPTQ's
readers in halves. One row passes position 4096, where a lost RoPE factor would show.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from converters.bounds import READER_KL
from converters.checkpoint import open_checkpoint
from converters.exl2_source import Exl2Folder, open_exl2
from converters.probe import DEFAULT_TOKENS, probe_rows
from converters.proof.forward import POSITIONS
from converters.proof.record import LATE
from quantize.metrics import Comparison, Divergence, chunks
from quantize.reference import ReferenceModel
from scripts.gpu_readers import ROOT, WorkerError, asked, environment, judged, not_run

NAME = "exllamav2"
SIZES = ("3", "4.25", "6,h8")
STATISTICS = ("--rows", "24", "--length", "256", "--long-rows", "0")
N_TOKENS = DEFAULT_TOKENS
MOST_KL = READER_KL["torch.float16"]


def made_folders(place: Path, source: Path) -> list[Path]:
    """Calibrate a checkpoint and convert it to every size; raises CalledProcessError."""
    stats, out = str(place / "stats"), place / "out"
    command = [sys.executable, "-m", "converters.cli"]
    calibrate = [*command, "calibrate", str(source), "-o", stats, *STATISTICS, "--quiet"]
    sizes = [part for size in SIZES for part in ("--to", f"exl2:{size}")]
    convert = [*command, "convert", str(source), "--stats", stats, *sizes, "-o", str(out)]
    subprocess.run(calibrate, cwd=ROOT, check=True)
    subprocess.run([*convert, "--no-proof", "--quiet"], cwd=ROOT, check=True)
    return [out / f"exl2-{size.replace(',', '-')}" for size in SIZES]


def compare(folder: Path, source: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """Yield what ran, how far its logits are from the f32 forward's, and the continuations, each judged.

    `source` is the checkpoint, for its tokenizer; the logits are kept in `scratch` meanwhile.
    """
    if (python := environment(NAME)) is None:
        yield not_run(NAME), True
        return
    file, title = open_exl2(folder), f"{NAME}, {folder.name}"
    tokenizer = open_checkpoint(source).tokenizer
    probe = probe_rows(tokenizer, n_tokens=N_TOKENS, context_length=file.config.context_length)
    rows = [list(row.ids) for row in probe.rows]
    ids, logits = scratch / "rows.json", scratch / "logits.safetensors"
    ids.write_text(json.dumps(rows), "ascii")
    try:
        answers = asked(NAME, python, folder, str(ids), str(logits))
    except WorkerError as error:
        yield f"{title}: {error}", False
        return
    yield f"{title}: {_ran(logits)}; {_types(file)}; {len(rows)} rows, {probe.n_tokens} positions", True
    yield from _compared(title, file, rows, logits)
    yield from judged(title, file, answers)


def _ran(logits: Path) -> str:
    """Return what the worker says that it ran with."""
    with safe_open(logits, "pt") as stored:
        return str((stored.metadata() or {})["ran"])


def _types(file: Exl2Folder) -> str:
    counts = Counter(kind for kind in file.tensor_types.values() if kind.startswith("EXL2"))
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))


def _compared(
    title: str, file: Exl2Folder, rows: list[list[int]], logits: Path
) -> Iterator[tuple[str, bool]]:
    """Yield the mean KL divergence over all positions, and over those from 4096 on."""
    model, comparison = ReferenceModel(file.config, file.weights), Comparison()
    states = model.hidden([torch.tensor(row) for row in rows])
    with safe_open(logits, "pt") as stored:
        for number, (row, hidden) in enumerate(zip(rows, states, strict=True)):
            theirs = stored.get_tensor(str(number))[:, : file.config.vocab_size].float()
            for start, end in chunks(len(row), POSITIONS):
                next_ids = torch.tensor(row[start + 1 : end + 1], dtype=torch.int64)
                comparison.add(model.logits(hidden[start:end]), theirs[start:end], next_ids, start)
    everywhere, late = comparison.divergence(), comparison.divergence(LATE)
    for place, found in (("", everywhere), (f" from {LATE} on", late)):
        yield _judged_kl(f"{title}: positions{place}", found)


def _judged_kl(title: str, found: Divergence | None) -> tuple[str, bool]:
    if found is None:
        return f"{title}: there are none", False
    text = f"{found.n_positions}, mean KL {found.mean:.3g} to the f32 forward of the same weights"
    agreed = f"bound {MOST_KL:g}, top-1 agreement {found.top1_agreement:.4f}"
    return f"{title}: {text}, {agreed}", found.mean <= MOST_KL
