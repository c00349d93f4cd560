"""AutoGPTQ and GPTQModel as judges of a GPTQ folder: logits at every position, and token ids.

They live in environments of their own, `DIR/autogptq` and `DIR/gptqmodel`, which `scripts/gptq_readers DIR`
makes once; `gptq_worker.py` runs there. AutoGPTQ computes in f32 what the file says, and no line of it is
ours; GPTQModel behind transformers is what users run today, in the dtype that config.json states.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from converters.gptq_source import GptqFolder
from quantize.errors import RuntimeFailedError, RuntimeMissingError, UsageError

VARIABLE: Final = "DSCQ_GPTQ_READERS"
MAKE: Final = "scripts/gptq_readers DIR, then --readers DIR"
# What pip leaves when it is done: an environment that was left half made is none.
_INSTALLED: Final = {"autogptq": "auto_gptq-*.dist-info", "gptqmodel": "gptqmodel-*.dist-info"}
LABELS: Final = {"autogptq": "AutoGPTQ", "gptqmodel": "GPTQModel"}
_WORKER = Path(__file__).with_name("gptq_worker.py")
_LAST_LINES = 2


@dataclass(frozen=True)
class Reader:
    """One reader: its name on disk, and the Python of its environment."""

    name: str
    python: Path

    @property
    def label(self) -> str:
        """What users call it."""
        return LABELS[self.name]

    def unfit(self, file: GptqFolder) -> str:
        """Return why this reader cannot be asked about a folder that others may read; "" if it can."""
        if self.name != "autogptq":
            return ""
        if file.quantization.version != 1:
            return "it knows no gptq_v2"
        if file.quantization.dynamic:
            return "it ignores `dynamic`"
        odd = [
            n for n, scheme in file.weights.schemes.items() if file.weights.shapes[n][1] % scheme.group_size
        ]
        return f"it takes whole groups only, unlike those of {odd[0]}" if odd else ""


@dataclass(frozen=True)
class ReaderAnswer:
    """What a reader made of a folder: its version, dtype, ids of the texts, and every row's logits.

    `logits` maps raw f32 (tokens, vocab) of all rows, one after the other, while the file is there. Where the
    folder's tokenizer does not load, `tokenizer_fault` says why, and there are no ids.
    """

    version: str
    dtype: str
    ids: tuple[tuple[int, ...], ...]
    bos: int | None
    eos: int | None
    logits: npt.NDArray[np.float32]
    tokenizer_fault: str = ""


def find_readers(folder: Path | None) -> tuple[Reader, ...]:
    """Return the readers whose environments are in a folder.

    Raises RuntimeMissingError where none is named, and UsageError for a folder that holds none.
    """
    if folder is None:
        raise RuntimeMissingError("no GPTQ reader is installed", hint=MAKE)
    homes = {name: folder.absolute() / name for name in LABELS}
    found = tuple(
        Reader(name, home / "bin" / "python")
        for name, home in homes.items()
        if (home / "bin" / "python").exists()
        and any(home.glob(f"lib/python*/site-packages/{_INSTALLED[name]}"))
    )
    if not found:
        raise UsageError(
            f"--readers {folder}: holds no reader, neither {' nor '.join(LABELS)}",
            hint=f"scripts/gptq_readers {folder}",
        )
    return found


def read_with(
    reader: Reader,
    folder: Path,
    rows: Sequence[Sequence[int]],
    texts: Sequence[str],
    scratch: Path,
    n_threads: int,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> ReaderAnswer:
    """Run a reader over rows of ids and texts; `on_tokens` hears how many tokens each step has done.

    `scratch` is a folder for the logits, 4 bytes for each token and row of the vocabulary. Raises
    RuntimeFailedError, with the reader's last words, where it refuses the folder or dies.
    """
    request, logits = scratch / f"{reader.name}.json", scratch / f"{reader.name}.f32"
    content: dict[str, Any] = {"do": "forward", "reader": reader.name, "folder": str(folder.absolute())}
    content |= {"rows": rows, "texts": texts, "logits": str(logits), "n_threads": n_threads}
    request.write_text(json.dumps(content), "utf-8")
    said: dict[str, Any] = {}
    for line in _lines(reader, request, n_threads):
        on_tokens(line.get("done", 0))
        said |= line
    n_tokens = sum(map(len, rows))
    if not said.get("finished") or logits.stat().st_size != 4 * n_tokens * said["n_vocab"]:
        raise RuntimeFailedError(f"{reader.label} ended early")
    mapped: npt.NDArray[np.float32] = (
        np.memmap(logits, np.float32, "r", shape=(n_tokens, said["n_vocab"]))
        if n_tokens
        else np.empty((0, 0), np.float32)
    )
    ids = tuple(tuple(text) for text in said.get("ids", ()))
    roles, fault = (said.get("bos"), said.get("eos")), said.get("tokenizer_fault", "")
    return ReaderAnswer(said["version"], said["dtype"], ids, *roles, mapped, fault)


def _lines(reader: Reader, request: Path, n_threads: int) -> Iterator[dict[str, Any]]:
    """Yield what the worker says; raises RuntimeFailedError if it fails."""
    # Compiling would cost minutes, and the hub is not asked: everything is in the folder.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(n_threads)}
    with tempfile.TemporaryFile() as log:
        command = [str(reader.python), str(_WORKER), str(request)]
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise RuntimeFailedError(f"{reader.label} cannot be started: {error}") from error
        with process:
            try:
                for line in process.stdout or ():
                    yield json.loads(line)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            log.seek(0)
            said = log.read().decode("utf-8", errors="replace").splitlines()
            # Of a traceback, what is not indented: the exception's own words.
            last = [line for line in said if line[:1].strip() and not line.startswith("Traceback")]
            raise RuntimeFailedError(
                f"{reader.label} ended with status {process.returncode}", reasons=last[-_LAST_LINES:]
            )
