"""llama.cpp as a judge: logits at every position, token ids, and what it makes of a file's metadata.

The library is the one inside the `xllamacpp` wheel (the `llama` extra), or any libllama that the user names.
It runs in a worker process (`llama_cpp_worker.py`), so that a failed assertion in native code is an error
with the library's last words, not the end of dscq.

    with LlamaCpp().open(path, n_ctx=4400, n_threads=8) as session:
        session.facts.eos                     # what the runtime took from the file
        session.tokenize(["def f():"])        # its own tokenizer
        for start, logits in session.logits(ids): ...     # f32 (up to 512, vocab)

Positions are decoded in batches of 512 into one context: 32,256 logits for 4,400 positions would be 570 MB.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt

from quantize.errors import DscqError, RuntimeFailedError, RuntimeMissingError, UsageError

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"  # the pin of the `llama` extra
INSTALL = f"pip install {PACKAGE}=={VERSION}"
N_BATCH = 512
_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_NAME_ONE = "give the path of a libllama"
_LAST_LINES = 6
_TELLING = ("error", "fail", "assert", "invalid", "corrupt")

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RuntimeFacts:
    """What the runtime understood of a file. An id is None where it found no such token.

    `stops` are the ids that end generation, `rope_scale` is what positions are multiplied by (1/4 for
    DeepSeek Coder), `system` names the processor features in use.
    """

    bos: int | None
    eos: int | None
    eot: int | None
    pad: int | None
    fim_pre: int | None
    fim_suf: int | None
    fim_mid: int | None
    n_vocab: int
    add_bos: bool
    add_eos: bool
    stops: tuple[int, ...]
    context_length: int
    rope_scale: float
    system: str


class LlamaCpp:
    """A llama.cpp library: the wheel's, or `library`. Nothing is loaded before `start`."""

    def __init__(self, library: Path | None = None) -> None:
        """Find the library.

        Raises RuntimeMissingError if none is installed, naming the install line, and UsageError for a
        `library` that is no file.
        """
        if library is not None and not library.is_file():
            raise UsageError(f"--llama-lib {library}: no such file", hint=_NAME_ONE)
        self._named = library is not None
        self.library = _wheel_library() if library is None else library.resolve()
        self.version = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}" if library is None else str(library)

    def open(self, path: Path, *, n_ctx: int, n_threads: int) -> "Session":
        """Load a file (of several shards the first) for rows of up to `n_ctx` tokens.

        Raises RuntimeFailedError, with the library's last words, if it does not load, and what `start` does.
        """
        return Session(self.start(), path, n_ctx=n_ctx, n_threads=n_threads)

    def start(self) -> "Worker":
        """Start a worker with the library loaded and every function found, but no model.

        Raises, if the library does not load, UsageError for one that the user named and RuntimeFailedError
        for the wheel's.
        """
        worker = Worker(self.version)
        try:
            worker.ask("load", library=str(self.library))
        except RuntimeFailedError as error:
            worker.close()
            raise self._unusable(error) from error
        except BaseException:
            worker.close()
            raise
        return worker

    def check(self) -> None:
        """Load the library and let it go again; raises what `start` does."""
        self.start().close()

    def _unusable(self, error: RuntimeFailedError) -> DscqError:
        if self._named:
            return UsageError(f"--llama-lib {error.message}", reasons=error.reasons, hint=_NAME_ONE)
        return RuntimeFailedError(error.message, reasons=error.reasons, hint=f"{INSTALL} --force-reinstall")


class Session:
    """A file, loaded by a worker, which it owns. A context manager; `close` ends the worker.

    Every method raises RuntimeFailedError if the runtime refuses, or dies.
    """

    def __init__(self, worker: "Worker", path: Path, *, n_ctx: int, n_threads: int) -> None:
        self._worker = worker
        worker.busy_with = f" while it worked on {path}"
        try:
            self.facts = _facts(worker.ask("open", **_shape(path, n_ctx, n_threads)))
        except BaseException:
            worker.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def logits(self, ids: Sequence[int]) -> Iterator[tuple[int, Logits]]:
        """Yield (first position, f32 logits (n, n_vocab)) of consecutive batches of one row of ids."""
        for start in range(0, len(ids), N_BATCH):
            yield start, self._decode(ids[start : start + N_BATCH], start, want_all=True)

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text by the runtime's tokenizer, BOS by its own rule if `add_special`."""
        answer = self._worker.ask(
            "tokenize", texts=list(texts), add_special=add_special, parse_special=parse_special
        )
        ids: list[list[int]] = answer["ids"]
        return ids

    def generate(
        self, ids: Sequence[int], *, n_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Yield up to `n_tokens` ids after the prompt, until a stop token (which is not yielded).

        Greedy at temperature 0, else sampled from softmax(logits / temperature) with `seed`.
        """
        generator = np.random.default_rng(seed)
        last = self._last_logits(ids)
        for position in range(len(ids), len(ids) + n_tokens):
            token = sample(last, temperature, generator)
            if token in self.facts.stops:
                return
            yield token
            last = self._decode([token], position, want_all=False)[0]

    def close(self) -> None:
        """End the worker and wait for it."""
        self._worker.close()

    def _last_logits(self, ids: Sequence[int]) -> Logits:
        for start in range(0, len(ids), N_BATCH):
            last = self._decode(ids[start : start + N_BATCH], start, want_all=False)
        return cast(Logits, last[0])

    def _decode(self, ids: Sequence[int], start: int, *, want_all: bool) -> Logits:
        answer = self._worker.ask("decode", ids=[int(i) for i in ids], start=start, all=want_all)
        data = self._worker.read(answer["n_bytes"])
        return np.frombuffer(data, dtype="<f4").reshape(answer["n_rows"], -1)


class Worker:
    """The process that the library lives in, and the pipes to it. `close` ends it.

    Every method raises RuntimeFailedError if the library refuses, or the process dies.
    """

    def __init__(self, version: str) -> None:
        """Start the process. Raises RuntimeFailedError where the system does not let it."""
        self.version, self.busy_with = version, ""
        # -P: the worker's own folder must not become a place to import from.
        command, pipe = [sys.executable, "-P", str(_WORKER)], subprocess.PIPE
        try:
            with contextlib.ExitStack() as opened:
                self._log: BinaryIO = opened.enter_context(tempfile.TemporaryFile())
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log)
                opened.pop_all()  # from here on `close` closes it
        except OSError as error:
            raise RuntimeFailedError(f"{version} cannot be started: {error}") from error
        self._requests = cast(BinaryIO, self.process.stdin)
        self._answers = cast(io.BufferedReader, self.process.stdout)

    def close(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # what was still buffered for a worker that is gone
            self._requests.close()
        self._log.close()

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer."""
        try:
            self._requests.write(json.dumps({"do": what, **request}).encode("ascii") + b"\n")
            self._requests.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeFailedError(f"{self.version}: {answer['error']}", reasons=self._last_words())
        return answer

    def read(self, n_bytes: int) -> bytearray:
        """Return the raw bytes that follow an answer."""
        data = bytearray(n_bytes)
        if self._answers.readinto(data) < n_bytes:
            raise self._died()
        return data

    def _died(self) -> RuntimeFailedError:
        status = self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return RuntimeFailedError(f"{self.version} {how}{self.busy_with}", reasons=self._last_words())

    def _last_words(self) -> list[str]:
        """The last lines of the library's log that sound like a reason; the last of all if none does."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line]
        telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
        return (telling or lines)[-_LAST_LINES:]


def sample(logits: Logits, temperature: float, generator: np.random.Generator) -> int:
    """Return the most likely id at temperature 0, else one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    weights = np.exp(scaled)
    return int(generator.choice(len(logits), p=weights / weights.sum()))


def _shape(path: Path, n_ctx: int, n_threads: int) -> dict[str, Any]:
    # The library lowers n_batch to n_ctx, and the guard would take that for a changed struct.
    return {"path": str(path), "n_ctx": max(n_ctx, N_BATCH), "n_batch": N_BATCH, "n_threads": n_threads}


def _facts(answer: dict[str, Any]) -> RuntimeFacts:
    return RuntimeFacts(**(answer | {"stops": tuple(answer["stops"])}))


def _wheel_library() -> Path:
    found = importlib.util.find_spec(PACKAGE)  # finds, and does not import
    folders = (found.submodule_search_locations or []) if found is not None else []
    for folder in folders:
        for library in sorted(Path(folder).glob(f"{PACKAGE}*.so")):
            return library
    raise RuntimeMissingError("llama.cpp is not installed", hint=INSTALL)
