"""What a proof consists of: plain records, for the report and the terminal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converters.probe import DEFAULT_TOKENS
from quantize.fidelity import BlockReport
from quantize.metrics import Divergence

Layer = Literal["file", "metadata", "tensors", "forward", "runtime"]
LAYERS: tuple[Layer, ...] = ("file", "metadata", "tensors", "forward", "runtime")

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); a stage is a few words for the user."""

LATE = 4096
"""Positions from here on are measured apart: a lost rope factor, mild at first, ruins them."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold. `value` is within `bound` (mostly: at most) if both are numbers.

    `detail` says in words what was found; of a failed check also what was expected.
    """

    layer: Layer
    name: str
    passed: bool
    value: float | None = None
    bound: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        figures = (
            "" if self.value is None or self.bound is None else f" {self.value:.3g} (bound {self.bound:.3g})"
        )
        return f"{self.layer}: {self.name}{figures}{': ' if self.detail else ''}{self.detail}"


@dataclass(frozen=True)
class ProofOptions:
    """How to prove: the CLI's options in one record.

    `n_tokens` is the size of the probe text; `predicted_kl`, where a plan predicted the mean KL divergence
    of the file, replaces the type's bound by a multiple of it. `require_runtime` makes a missing runtime a
    failure; `readers` is the folder of the
    GPTQ readers' environments. `n_threads` is for everything: the tensors, the forward, the runtime.
    """

    n_tokens: int = DEFAULT_TOKENS
    llama_lib: Path | None = None
    readers: Path | None = None
    device: str = "cpu"
    n_threads: int = 2
    require_runtime: bool = False
    predicted_kl: float | None = None


@dataclass(frozen=True)
class TensorFigures:
    """One tensor of layer (a): its quant type, what the block test found, and how many steps its grid is off.

    `shift` is None for types without zero-points of their own.
    """

    name: str
    quant: str
    report: BlockReport
    shift: float | None = None


@dataclass(frozen=True)
class Figure:
    """One comparison of logits: `pair` names the two sides, the reference first."""

    pair: str
    positions: Literal["all", "late"]
    divergence: Divergence


@dataclass(frozen=True)
class RuntimeState:
    """The runtime's part. "failed": it refused the file, died, or differs. `hint` is the install line."""

    status: Literal["proven", "unproven in the runtime", "failed", "not reached"] = "not reached"
    version: str = ""
    system: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Proof:
    """Everything that was found out about a written file.

    `quant_types` counts the matrices of each type, `seconds` is wall time by layer, `rows` are the lengths of
    the probe's rows in tokens and `probe_note` is what could not be had of it (no row past position 4096).
    """

    paths: tuple[Path, ...]
    checks: tuple[Check, ...]
    quant_types: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[TensorFigures, ...] = ()
    figures: tuple[Figure, ...] = ()
    runtime: RuntimeState = RuntimeState()
    rows: tuple[int, ...] = ()
    probe_note: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, in the order of the layers."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether no check failed. A missing runtime is a failed check only if it was required."""
        return not self.failures
