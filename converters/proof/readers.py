"""Layer (c) of a GPTQ folder: its real readers on it, each in an environment of its own.

They must cut texts into the checkpoint's tokens with the folder's own tokenizer files, know its BOS and EOS,
and give the reference forward's logits at every position, but for the rounding of the dtype in which they
compute.
"""

import tempfile
from pathlib import Path

import torch

from converters.bounds import FileBound, reader_bound
from converters.gptq_source import GptqFolder
from converters.probe_strings import probe_strings
from converters.proof.blame import not_the_file, one_line
from converters.proof.forward import POSITIONS, Sides, figures_of, kl_check
from converters.proof.metadata import first_difference
from converters.proof.record import Check, Figure, OnProgress, ProofOptions, RuntimeState
from converters.proof.runtime import Expected, RuntimeProof, concluded, without_runtime
from converters.runtimes.gptq_readers import Reader, ReaderAnswer, find_readers, read_with
from converters.tokenizer import CheckpointTokenizer
from quantize.errors import RuntimeFailedError, RuntimeMissingError
from quantize.metrics import Comparison, chunks


def prove_in_readers(
    file: GptqFolder,
    expected: Expected,
    sides: Sides | None,
    bound: FileBound,
    options: ProofOptions,
    on_progress: OnProgress,
) -> RuntimeProof:
    """Run layer (c); without `sides` (the forwards failed) only tokens are compared."""
    with not_the_file():
        try:
            readers = find_readers(options.readers)
        except RuntimeMissingError as error:
            return without_runtime(error, options)
    checks: list[Check] = []
    figures: list[Figure] = []
    versions, left_out = [], []
    for reader in readers:
        if why := reader.unfit(file):
            left_out.append(f"{reader.label} left out: {why}")
            continue
        try:
            version = _ask(reader, file, expected, sides, bound, options, on_progress, checks, figures)
            versions.append(f"{reader.label} ({version})")
        except RuntimeFailedError as error:
            checks.append(Check("runtime", f"{reader.label} runs the folder", False, detail=one_line(error)))
    state = RuntimeState(version="; ".join(versions), system="; ".join(left_out), hint="; ".join(left_out))
    judged = sides if versions else None
    return RuntimeProof(tuple(checks), tuple(figures), concluded(state, checks, judged))


def _ask(
    reader: Reader,
    file: GptqFolder,
    expected: Expected,
    sides: Sides | None,
    bound: FileBound,
    options: ProofOptions,
    on_progress: OnProgress,
    checks: list[Check],
    figures: list[Figure],
) -> str:
    """Ask one reader everything; return its version."""
    with not_the_file():
        texts = {t: expected.tokenizer.encode(t) for t in probe_strings() if expected.tokenizer.can_spell(t)}
    rows = [ids.tolist() for ids in sides.rows] if sides is not None else []
    done = 0

    def on_tokens(n: int) -> None:
        nonlocal done
        done += n
        on_progress(reader.label, done, sum(map(len, rows)))

    with tempfile.TemporaryDirectory(prefix="dscq-") as scratch:
        place = Path(scratch)
        answer = read_with(reader, file.paths[0], rows, list(texts), place, options.n_threads, on_tokens)
        checks += _token_checks(reader, answer, expected.tokenizer, texts)
        if sides is not None:
            found = _compare_logits(reader, answer, sides)
            figures += found
            own = reader_bound(bound, answer.dtype)
            checks += (kl_check("runtime", figure, _bound(figure, own)) for figure in found)
    return f"{answer.version}, {answer.dtype.removeprefix('torch.')}"


def _token_checks(
    reader: Reader, answer: ReaderAnswer, tokenizer: CheckpointTokenizer, texts: dict[str, list[int]]
) -> list[Check]:
    """Compare the reader's ids with the checkpoint's over the probe corpus, and the ids with a role."""
    if answer.tokenizer_fault:
        return [Check("runtime", f"token ids in {reader.label}", False, detail=answer.tokenizer_fault)]
    faults = [
        f"{text[:40]!r}: {first_difference(got, want)}"
        for got, (text, want) in zip(answer.ids, texts.items(), strict=True)
        if list(got) != want
    ]
    detail = f"{len(faults)} of {len(texts)} texts differ, the first {faults[0]}" if faults else ""
    vocabulary = tokenizer.vocabulary
    roles = {"bos": (answer.bos, vocabulary.bos_id), "eos": (answer.eos, vocabulary.eos_id)}
    wrong = [f"{role} is {got}, not {want}" for role, (got, want) in roles.items() if want not in (None, got)]
    return [
        Check(
            "runtime",
            f"token ids in {reader.label}",
            not faults,
            float(len(faults)),
            0.0,
            detail or f"{len(texts)} texts",
        ),
        Check("runtime", f"bos and eos in {reader.label}", not wrong, detail="; ".join(wrong)),
    ]


def _compare_logits(reader: Reader, answer: ReaderAnswer, sides: Sides) -> list[Figure]:
    """Compare every position of every row with both forwards."""
    against_file, against_checkpoint = Comparison(), Comparison()
    first = 0
    for row, ids in enumerate(sides.rows):
        for start, end in chunks(len(ids), POSITIONS):
            # A copy: the mapping is read-only, which torch does not like.
            logits = torch.from_numpy(answer.logits[first + start : first + end].copy())
            own, next_ids = logits.to(sides.file.model.device), ids[start + 1 : end + 1]
            against_file.add(sides.file.logits(row, start, end), own, next_ids, start)
            against_checkpoint.add(sides.checkpoint.logits(row, start, end), own, next_ids, start)
        first += len(ids)
    return [
        *figures_of(against_file, f"file -> {reader.label}"),
        *figures_of(against_checkpoint, f"checkpoint -> {reader.label}"),
    ]


def _bound(figure: Figure, bound: FileBound) -> float:
    return bound.activations_kl if figure.pair.startswith("file ") else bound.runtime_kl
