"""Layer (c): real llama.cpp on the written file.

It must take from the file what the checkpoint says (ids with a role, BOS rule, rope scale), cut texts into
the checkpoint's tokens, and give the reference forward's logits at every position, but for the rounding of
activations in its kernels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.bounds import FileBound
from converters.probe_strings import probe_strings
from converters.proof.blame import not_the_file, one_line
from converters.proof.forward import POSITIONS, Sides, figures_of, kl_check
from converters.proof.metadata import first_difference
from converters.proof.record import Check, Figure, OnProgress, ProofOptions, RuntimeState
from converters.runtimes.llama_cpp import LlamaCpp, RuntimeFacts, Session
from converters.tokenizer import CheckpointTokenizer
from quantize.errors import RuntimeFailedError, RuntimeMissingError
from quantize.llama import LlamaConfig
from quantize.metrics import Comparison, chunks

FILE_RUNTIME = "file -> runtime"
CHECKPOINT_RUNTIME = "checkpoint -> runtime"
STAGE = "llama.cpp"


@dataclass(frozen=True)
class Expected:
    """What the runtime must find in the file: the checkpoint's figures and tokenizer."""

    config: LlamaConfig
    tokenizer: CheckpointTokenizer


@dataclass(frozen=True)
class RuntimeProof:
    """The checks, figures and state of layer (c)."""

    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]
    state: RuntimeState


def prove_in_runtime(
    path: Path,
    expected: Expected,
    sides: Sides | None,
    bound: FileBound,
    options: ProofOptions,
    on_progress: OnProgress,
) -> RuntimeProof:
    """Run layer (c); without `sides` (the forwards failed) only facts and tokens are compared.

    Raises NotTheFileError for a library that does not load: it would not do so with any file.
    """
    with not_the_file():
        try:
            worker = LlamaCpp(options.llama_lib).start()
        except RuntimeMissingError as error:
            return without_runtime(error, options)
    collected: list[Check] = []
    figures: list[Figure] = []
    state = RuntimeState(version=worker.version)
    longest = max((len(row) for row in sides.rows), default=1) if sides is not None else 1
    try:
        with Session(worker, path, n_ctx=longest, n_threads=options.n_threads) as session:
            state = replace(state, system=session.facts.system)
            collected += compare_facts(session.facts, expected)
            collected.append(compare_tokens(session, expected.tokenizer))
            if sides is not None:
                figures += compare_logits(session, sides, on_progress)
                collected += (kl_check("runtime", figure, _bound(figure, bound)) for figure in figures)
    except RuntimeFailedError as error:
        collected.append(Check("runtime", "runs the file", False, detail=one_line(error)))
    return RuntimeProof(tuple(collected), tuple(figures), concluded(state, collected, sides))


def without_runtime(error: RuntimeMissingError, options: ProofOptions) -> RuntimeProof:
    """Return the layer where no runtime is installed: a failed check only if one was required."""
    required = Check("runtime", "installed", False, detail=one_line(error))
    checks = (required,) if options.require_runtime else ()
    return RuntimeProof(checks, (), RuntimeState("unproven in the runtime", hint=error.hint))


def concluded(state: RuntimeState, checks: Sequence[Check], sides: Sides | None) -> RuntimeState:
    """Return the state after all checks: facts and token ids alone are no proof of the weights."""
    if not all(check.passed for check in checks):
        return replace(state, status="failed")
    return replace(state, status="proven" if sides is not None else "unproven in the runtime")


def compare_facts(facts: RuntimeFacts, expected: Expected) -> list[Check]:
    """Compare what the runtime took from the file with the checkpoint; each difference is a failed check."""
    wrong = [
        Check("runtime", name, False, detail=f"llama.cpp has {got}, the checkpoint {want}")
        for name, got, want in _fact_pairs(facts, expected)
        if got != want
    ]
    eos = expected.tokenizer.vocabulary.eos_id
    if eos is not None and eos not in facts.stops:
        wrong.append(Check("runtime", "stop tokens", False, detail=f"{facts.stops} lack eos {eos}"))
    return wrong or [Check("runtime", "facts", True, detail="ids with a role, BOS rule, rope scale")]


def _fact_pairs(facts: RuntimeFacts, expected: Expected) -> Iterator[tuple[str, object, object]]:
    vocabulary, config = expected.tokenizer.vocabulary, expected.config
    roles: Iterable[tuple[str, int | None, int | None]] = (
        ("bos", facts.bos, vocabulary.bos_id),
        ("eos", facts.eos, vocabulary.eos_id),
        ("eot", facts.eot, vocabulary.eot_id),
        ("fim prefix", facts.fim_pre, vocabulary.fim_prefix),
        ("fim suffix", facts.fim_suf, vocabulary.fim_suffix),
        ("fim middle", facts.fim_mid, vocabulary.fim_middle),
    )
    # Where the checkpoint has no such token llama.cpp may guess one; that is no fault of the file.
    yield from ((name, got, want) for name, got, want in roles if want is not None)
    yield "add_bos", facts.add_bos, vocabulary.add_bos
    yield "add_eos", facts.add_eos, vocabulary.add_eos
    yield "vocabulary size", facts.n_vocab, len(vocabulary.tokens)
    yield "context length", facts.context_length, config.context_length
    yield "rope scale", round(facts.rope_scale, 6), round(1 / config.rope_factor, 6)


def compare_tokens(session: Session, tokenizer: CheckpointTokenizer) -> Check:
    """Compare the runtime's ids with the tokenizer's over the probe corpus.

    Texts with bytes that the vocabulary has no token for are left out: what stands for those is each
    runtime's own affair.
    """
    with not_the_file():
        expected = {text: tokenizer.encode(text) for text in probe_strings() if tokenizer.can_spell(text)}
    texts = list(expected)
    faults = [
        f"{text[:40]!r}: {first_difference(got, expected[text])}"
        for text, got in zip(texts, session.tokenize(texts), strict=True)
        if got != expected[text]
    ]
    detail = (
        f"{len(faults)} of {len(texts)} texts differ, the first {faults[0]}"
        if faults
        else f"{len(texts)} texts"
    )
    return Check("runtime", "token ids", not faults, float(len(faults)), 0.0, detail)


def compare_logits(session: Session, sides: Sides, on_progress: OnProgress) -> list[Figure]:
    """Run every row in the runtime and compare it with both forwards, position by position."""
    against_file, against_checkpoint = Comparison(), Comparison()
    done, total = 0, sum(len(ids) for ids in sides.rows)
    for row, ids in enumerate(sides.rows):
        for first, batch in session.logits(ids.tolist()):
            logits = torch.from_numpy(batch)
            for start, end in chunks(len(logits), POSITIONS):
                at = (row, first + start, first + end)
                own, next_ids = logits[start:end].to(sides.file.model.device), ids[at[1] + 1 : at[2] + 1]
                against_file.add(sides.file.logits(*at), own, next_ids, at[1])
                against_checkpoint.add(sides.checkpoint.logits(*at), own, next_ids, at[1])
            done += len(logits)
            on_progress(STAGE, done, total)
    return [*figures_of(against_file, FILE_RUNTIME), *figures_of(against_checkpoint, CHECKPOINT_RUNTIME)]


def _bound(figure: Figure, bound: FileBound) -> float:
    return bound.activations_kl if figure.pair == FILE_RUNTIME else bound.runtime_kl
