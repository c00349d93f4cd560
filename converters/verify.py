"""The proof of a written file, from its first byte to its real runtime's logits.

    file       it opens: header, metadata, tensor table and size fit together
    metadata   its figures and its vocabulary are the checkpoint's, field by field
    tensors    (a) every tensor against its source, block by block
    forward    (b) its weights in the reference forward against the checkpoint's, f32 arithmetic on both sides
    runtime    (c) llama.cpp's logits at every position, its token ids, its view of the metadata; of a GPTQ
               folder AutoGPTQ's and GPTQModel's; ExLlamaV2 runs on CUDA GPUs alone and is not asked

All layers run even if an earlier one fails, so that a lost rope factor and a wrong EOS are both named; only a
file that does not open ends the proof at once. A fault of the file is a failed check and never an
exception; a fault of anything else is an exception and never a failed check (`converters.proof.blame`).
`converters.report` writes the result down.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from converters.bounds import FileBound, file_bound
from converters.checkpoint import Checkpoint
from converters.exl2_source import Exl2Folder
from converters.gptq_source import GptqFolder
from converters.probe import ProbeRows, probe_rows
from converters.proof.blame import BlamelessWeights, NotTheFileError, not_the_file, one_line
from converters.proof.file import EXL2, GGUF, GPTQ, Kind, ModelFile, kind_of
from converters.proof.forward import Side, Sides, compare_forwards, run_forward
from converters.proof.metadata import compare_config, compare_vocabulary
from converters.proof.readers import prove_in_readers
from converters.proof.record import (
    Check,
    Figure,
    Layer,
    OnProgress,
    Proof,
    ProofOptions,
    RuntimeState,
    TensorFigures,
)
from converters.proof.runtime import Expected, RuntimeProof, prove_in_runtime, without_runtime
from converters.proof.tensors import prove_tensors
from converters.runtimes.gptq_readers import find_readers
from converters.runtimes.llama_cpp import LlamaCpp
from quantize.errors import DscqError, RuntimeMissingError, VerificationError
from quantize.reference import ReferenceModel, usable_device

__all__ = ["Check", "Proof", "ProofOptions", "Verifier", "verify"]

T = TypeVar("T")

# What a damaged file makes its readers raise: our own errors, or those of the numbers it claims to hold.
_FAULTS = (DscqError, OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError)


class Verifier:
    """Proves files of one checkpoint. The checkpoint's own forward is made once and serves all of them.

    `reference` must be opened as for the conversion, `eos` and adapter included. Raises UsageError for a
    device that is not there.
    """

    def __init__(self, reference: Checkpoint, options: ProofOptions) -> None:
        usable_device(options.device)
        self.reference, self.options = reference, options
        self.weights = BlamelessWeights(reference.weights, reference.provenance.source)
        self.probe: ProbeRows = probe_rows(
            reference.tokenizer,
            n_tokens=options.n_tokens,
            context_length=reference.config.context_length,
        )
        self.rows = tuple(torch.tensor(row.ids, dtype=torch.int64) for row in self.probe.rows)
        self._checkpoint_side: Side | None = None

    def check_runtime(self, kind: Kind = GGUF) -> None:
        """Look for the runtime of a kind, without a model: what can fail early fails before hours of work.

        llama.cpp's library is loaded, the GPTQ readers are looked for, ExLlamaV2 is always missing. Raises
        UsageError for a folder without readers, for a `llama_lib` that is no libllama, RuntimeFailedError for
        an installed runtime that does not load, VerificationError where the runtime is required and missing.
        """
        try:
            if kind is GPTQ:
                find_readers(self.options.readers)
            elif kind is EXL2:
                raise _exllamav2_missing()
            else:
                LlamaCpp(self.options.llama_lib).check()
        except RuntimeMissingError as error:
            if self.options.require_runtime:
                raise VerificationError(
                    f"the proof needs the runtime, and {error.message}", hint=error.hint
                ) from error

    def sides(self, file: ModelFile, on_progress: OnProgress) -> Sides:
        """Return both forwards over the probe, each by its own side's figures."""
        with not_the_file():
            checkpoint_side = self._checkpoint_forward(on_progress)
        model = ReferenceModel(file.config, file.weights, self.options.device)
        side = run_forward("forward of the file", model, self.rows, on_progress)
        return Sides(self.rows, checkpoint_side, side)

    def _checkpoint_forward(self, on_progress: OnProgress) -> Side:
        if self._checkpoint_side is None:
            model = ReferenceModel(self.reference.config, self.weights, self.options.device)
            self._checkpoint_side = run_forward("forward of the checkpoint", model, self.rows, on_progress)
        return self._checkpoint_side

    def verify(self, path: Path, on_progress: OnProgress = lambda stage, done, total: None) -> Proof:
        """Prove a GGUF (of several shards the first), a GPTQ or EXL2 folder; faults are failed checks.

        Raises the checkpoint's own errors, CheckpointError for a source that is gone; DscqError where memory
        or the device fails; UsageError for a `llama_lib` that is none.
        """
        proof = _Proof(self, on_progress)
        try:
            with torch_threads(self.options.n_threads):
                return _run_layers(path, proof)
        except NotTheFileError as failure:
            error = _explained(failure.error, self.options.device)
            raise error from error.__cause__


def verify(
    path: Path,
    reference: Checkpoint,
    options: ProofOptions,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Proof:
    """Prove one file: see `Verifier`."""
    return Verifier(reference, options).verify(path, on_progress)


def _run_layers(path: Path, proof: "_Proof") -> Proof:
    file = proof.attempt("file", "opens", lambda: kind_of(path).open(path))
    if file is None:
        return proof.finished((path,))
    proof.checks.append(Check("file", "opens", True, detail=f"{len(file.tensor_types)} tensors"))
    proof.metadata(file)
    proof.tensors(file)
    sides = proof.forward(file)
    proof.runtime(file, sides)
    return proof.finished(file.paths)


def _exllamav2_missing() -> RuntimeMissingError:
    return RuntimeMissingError("exllamav2 is not asked: it runs on CUDA alone", hint="needs a CUDA GPU")


def _of_the_host(error: Exception) -> bool:
    """Whether memory or the device failed: a CPU tensor without room is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _explained(error: Exception, device: str) -> Exception:
    """Return an error in the user's words, if it is one of memory or the device, else as it is."""
    if not _of_the_host(error):
        return error
    if isinstance(error, torch.AcceleratorError):
        explained = DscqError(f"device {device} failed: {one_line(error)}", hint="--device cpu")
    else:
        hint = "--device cpu, or fewer --probe-tokens"
        explained = DscqError(f"the proof does not fit the memory of {device}", hint=hint)
    explained.__cause__ = error
    return explained


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Bound the threads of torch's operations for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Proof:
    """The proof in the making: layers add checks and figures to it."""

    def __init__(self, verifier: Verifier, on_progress: OnProgress) -> None:
        self.verifier, self.on_progress = verifier, on_progress
        self.reference = replace(verifier.reference, weights=verifier.weights)
        self.options = verifier.options
        self.checks: list[Check] = []
        self.figures: list[Figure] = []
        self.compared: tuple[TensorFigures, ...] = ()
        self.quant_types: dict[str, int] = {}
        self.state = RuntimeState()
        self.seconds: dict[str, float] = {}

    def attempt(self, layer: Layer, name: str, work: Callable[[], T]) -> T | None:
        """Return what `work` returns; the file's failure becomes a failed check, and None."""
        with self._timed(layer):
            try:
                return work()
            except _FAULTS as error:
                if _of_the_host(error):
                    raise NotTheFileError(error) from error
                self.checks.append(Check(layer, name, False, detail=one_line(error)))
                return None

    @contextmanager
    def _timed(self, layer: Layer) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[layer] = self.seconds.get(layer, 0.0) + time.monotonic() - started

    def metadata(self, file: ModelFile) -> None:
        """Compare figures and vocabulary."""
        self.checks += compare_config(file.config, self.reference.config)
        expected = self.reference.tokenizer.vocabulary
        compared = self.attempt(
            "metadata", "vocabulary", lambda: compare_vocabulary(file.vocabulary, expected)
        )
        self.checks += compared or ()

    def tensors(self, file: ModelFile) -> None:
        """Layer (a)."""
        matrices = [file.tensor_types[n] for n, spec in file.weights.specs().items() if len(spec.shape) > 1]
        self.quant_types = {quant: matrices.count(quant) for quant in sorted(set(matrices))}
        done = self.attempt(
            "tensors",
            "readable",
            lambda: prove_tensors(
                file,
                replace(self.reference, weights=file.as_stored(self.reference.weights)),
                n_threads=self.options.n_threads,
                on_progress=self.on_progress,
            ),
        )
        if done is not None:
            self.checks += done.checks
            self.compared = done.tensors

    def forward(self, file: ModelFile) -> Sides | None:
        """Layer (b); None if there is nothing to compare logits with."""

        def work() -> Sides:
            sides = self.verifier.sides(file, self.on_progress)
            checks, figures = compare_forwards(sides, self._bound())
            self.checks += checks
            self.figures += figures
            return sides

        return self.attempt("forward", "runs", work)

    def runtime(self, file: ModelFile, sides: Sides | None) -> None:
        """Layer (c)."""
        expected = Expected(self.reference.config, self.reference.tokenizer)
        done = self.attempt(
            "runtime",
            "runs the file",
            lambda: self._in_runtime(file, expected, sides),
        )
        if done is None:
            self.state = RuntimeState("failed")
            return
        self.checks += done.checks
        self.figures += done.figures
        self.state = done.state

    def _in_runtime(self, file: ModelFile, expected: Expected, sides: Sides | None) -> RuntimeProof:
        """Run the file in the runtime of its kind."""
        if isinstance(file, GptqFolder):
            return prove_in_readers(file, expected, sides, self._bound(), self.options, self.on_progress)
        if isinstance(file, Exl2Folder):
            return without_runtime(_exllamav2_missing(), self.options)
        return prove_in_runtime(file.paths[0], expected, sides, self._bound(), self.options, self.on_progress)

    def _bound(self) -> FileBound:
        return file_bound(self.quant_types, self.options.predicted_kl)

    def finished(self, paths: tuple[Path, ...]) -> Proof:
        """Return the record of everything so far."""
        return Proof(
            paths=paths,
            checks=tuple(self.checks),
            quant_types=self.quant_types,
            tensors=self.compared,
            figures=tuple(self.figures),
            runtime=self.state,
            rows=tuple(len(row.ids) for row in self.verifier.probe.rows),
            probe_note=self.verifier.probe.note,
            seconds=self.seconds,
        )
