"""A calibration row, the corpus of all rows, and the choices that make one."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import torch

Kind = Literal["completion", "infill", "repository", "chat", "noise"]
KINDS: Final[tuple[Kind, ...]] = ("completion", "infill", "repository", "chat", "noise")
NOISE: Final = "noise"
"""The kind of rows that are no text (converters/corpus/noise.py)."""
OWN_TEXT_NOISE: Final = 0.1
"""Noise for each token of a text of the user's own, which is narrower than what the model will meet."""
TRAINED_REACH: Final = 4096
"""Positions up to here were trained before the rope scale was stretched; a long row passes it."""
DEFAULT_LENGTH: Final = 2048
SHORTEST: Final = 32
"""A row of fewer tokens shows the model next to nothing; texts that short are passed over."""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One sequence as the model meets it: `ids` int64 [n], BOS included, never padded.

    `source` names the file or files that the text is from.
    """

    ids: torch.Tensor
    kind: Kind
    source: str


@dataclass(frozen=True)
class Shares:
    """Parts of the token budget by kind, each 0 or more; they are scaled to a sum of one.

    The built-in text is of many kinds and needs no noise; `dscq calibrate --text` gives it OWN_TEXT_NOISE.
    """

    completion: float = 0.50
    infill: float = 0.25
    repository: float = 0.15
    chat: float = 0.10
    noise: float = 0.0

    @property
    def text(self) -> float:
        """What all kinds but noise have together, unscaled: without text there is no noise either."""
        return float(sum(getattr(self, kind) for kind in KINDS if kind != NOISE))

    def of(self, kind: Kind) -> float:
        """The share of one kind when all sum to one."""
        return float(getattr(self, kind) / sum(asdict(self).values()))


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to calibrate on.

    `sources`: None for the built-in corpus, else files, folders, or ids of the hub's datasets. The budget is
    `n_rows` x `length` tokens. Rows keep the length of their text, at most `length`, so there may be more
    rows than `n_rows`. `length` None means 2048, or the context where that is shorter. Up to `n_long` rows of
    up to `long_length` tokens pass position 4096, where the context reaches so far; they count in the budget.
    """

    sources: tuple[str, ...] | None = None
    n_rows: int = 128
    length: int | None = None
    shares: Shares = field(default_factory=Shares)
    n_long: int = 2
    long_length: int = 6144
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """The rows, and an `identity` from which it is clear what they were: JSON-able and complete.

    `notes` is what the user should hear: which share went elsewhere and why, what was skipped.
    """

    rows: tuple[TokenRow, ...]
    identity: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens in all rows together."""
        return sum(len(row.ids) for row in self.rows)


def ids_digest(rows: Iterable[TokenRow]) -> str:
    """SHA-256 over all rows: each as its length and its ids, little-endian int64."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(row.ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def count_by_kind(rows: Iterable[TokenRow]) -> dict[str, dict[str, int]]:
    """Return kind -> number of rows, of tokens, and the longest row, for the kinds that have rows."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        count = counts.setdefault(row.kind, {"rows": 0, "tokens": 0, "longest": 0})
        count["rows"] += 1
        count["tokens"] += len(row.ids)
        count["longest"] = max(count["longest"], len(row.ids))
    return {kind: counts[kind] for kind in KINDS if kind in counts}
