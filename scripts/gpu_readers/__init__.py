"""Folders in the programs that serve them on a GPU, for `scripts/gpu_check readers` and `exl2`.

Every program has an environment of its own, DIR/NAME with DIR the value of DSCQ_GPU_READERS, and is driven by
a worker that imports nothing of this project: it is given a folder and prompts, and answers with the ids that
the program saw and those that it continues them with, the likeliest each time. GPTQ folders are compared
here, EXL2 folders in `exl2`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from converters.gptq_source import open_gptq
from converters.vocabulary import Vocabulary
from quantize.llama import LlamaConfig
from quantize.reference import ReferenceModel
from quantize.weights import Weights

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INSTALL = {
    "exllamav2": "pip install exllamav2==0.3.2 tokenizers flash-attn",
    "vllm": "pip install vllm",
    "gptqmodel": "pip install gptqmodel==7.6.0 optimum==2.3.0",
}
PROMPTS = (
    "def add(a, b):\n",
    "import os\n\ndef read_file(path):\n",
    "class Stack:\n    def push(self, x):\n",
)
N_NEW = 24
AGREED = 12
"""Of the new tokens, how many at least must be those of the f32 forward, before a near-tie may part them."""


class Served(Protocol):
    """A folder as this project reads it."""

    @property
    def config(self) -> LlamaConfig:
        """Its figures."""
        ...

    @property
    def weights(self) -> Weights:
        """Its weights, decoded."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of its tokenizer files."""
        ...


class WorkerError(Exception):
    """A program did not run: its exit code and the end of what it said."""


@dataclass(frozen=True)
class Answer:
    """What a program made of one prompt: the ids that it saw, and its continuation."""

    prompt: list[int]
    new: list[int]


def made_folder(place: Path, source: Path) -> Path:
    """Convert a checkpoint to 4 bits in groups of 32, and return the folder; raises CalledProcessError."""
    command = [sys.executable, "-m", "converters.cli", "convert", str(source), "--to", "gptq:4bit-32g"]
    subprocess.run([*command, "--no-proof", "--quiet", "-o", str(place)], cwd=ROOT, check=True)
    return place / "gptq-4bit-32g"


def compare(name: str, folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield, for each prompt, what was found and whether it is as it must be."""
    if (python := environment(name)) is None:
        yield not_run(name), True
        return
    try:
        answers = asked(name, python, folder)
    except WorkerError as error:
        yield f"{name}: {error}", False
        return
    yield from judged(name, open_gptq(folder), answers)


def environment(name: str) -> Path | None:
    """Return the Python of a program's environment; None where there is none."""
    environments = os.environ.get("DSCQ_GPU_READERS")
    python = Path(environments or "", name, "bin", "python")
    return python if environments is not None and python.is_file() else None


def not_run(name: str) -> str:
    """Return how a program could be had that was not run."""
    return f"{name}: not run: make DIR/{name} ({INSTALL[name]}) and set DSCQ_GPU_READERS=DIR"


def asked(name: str, python: Path, folder: Path, *more: str) -> list[Answer]:
    """Run a program's worker over the prompts, with `more` arguments; raises WorkerError."""
    command = [str(python), str(HERE / f"{name}_worker.py"), str(folder), json.dumps(PROMPTS), str(N_NEW)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkerError(f"exit {done.returncode}: {done.stderr[-500:]}")
    return [Answer(**each) for each in json.loads(done.stdout.rpartition("ANSWERS")[2])]


def judged(name: str, file: Served, answers: Sequence[Answer]) -> Iterator[tuple[str, bool]]:
    """Yield, for each prompt, whether it had one BOS and went on as in f32."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        yield _judged(name, file, prompt, answer)


def _judged(name: str, file: Served, prompt: str, answer: Answer) -> tuple[str, bool]:
    bos = file.vocabulary.bos_id
    if bos is None or answer.prompt.count(bos) != 1 or answer.prompt[0] != bos:
        return f"{name}: {prompt!r} was read as {answer.prompt}: BOS must stand once, in front", False
    expected = greedy(file, answer.prompt, len(answer.new))
    pairs = enumerate(zip(answer.new, expected, strict=True))
    agreed = next((i for i, (one, other) in pairs if one != other), len(expected))
    return f"{name}: {prompt!r}: {agreed} of {len(expected)} new tokens as in f32", agreed >= AGREED


def greedy(file: Served, ids: Sequence[int], n_new: int) -> list[int]:
    """Continue ids by the likeliest tokens, in the f32 reference forward of the folder's weights."""
    model, known = ReferenceModel(file.config, file.weights), list(ids)
    for _ in range(n_new):
        (hidden,) = model.hidden([torch.tensor(known)])
        known.append(int(model.logits(hidden[-1:]).argmax()))
    return known[len(ids) :]
