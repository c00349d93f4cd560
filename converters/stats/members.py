"""The archive's files, safetensors each, which a reader maps into memory.

block-00000.safetensors ...   for each input of the block's linears (attention_input, attention_mixed,
                              mlp_input, mlp_inner):
                                  <input>.n_tokens       I64 (1,)
                                  <input>.diagonal       F32 (K,)             mean of x_j^2
                                  <input>.correlations   I16 (K*(K-1)/2,)     see quantize/statistics.py
head.safetensors              the same of head_input, and token_counts I64 (vocab_size,); and, with Hessians,
                              gradients F32 (n_layers, 7): the mean |g|^2 of q, k, v, o, gate, up, down (of
                              archives from before this was the rule, only where tokens count by gradients);
                              and embedding_gradient.*, the statistics of g at the embedding's output
rows.safetensors              ids I32 (n_tokens,), lengths I32 (n_rows,), kinds U8 (n_rows,)
weights.safetensors           only until the run is done, where tokens count by their gradients:
                              <layer>.<input> F32 (n_tokens,) for each block and input; gradients and
                              embedding_gradient.*, as in the head
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters.corpus.rows import NOISE
from converters.disk import PARTIAL, explained
from converters.stats.manifest import Member
from quantize.errors import ArchiveError
from quantize.llama import LlamaConfig
from quantize.reference import INPUTS
from quantize.statistics import PackedStatistics, Statistics, unpack

HEAD, ROWS, WEIGHTS = "head.safetensors", "rows.safetensors", "weights.safetensors"
GRADIENTS, EMBEDDING = "gradients", "embedding_gradient"
_HEADER_BYTES = 4096  # more than the header of any member
_CHUNK = 1 << 22


class TokenRow(Protocol):
    """A row of the corpus: its token ids, and what kind of text it is."""

    @property
    def ids(self) -> torch.Tensor:
        """The token ids, int64 (n,)."""
        ...

    @property
    def kind(self) -> str:
        """The kind, one of at most 256."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows as the archive stores them: int32 ids one after the other, int32 lengths, a kind for each."""

    ids: torch.Tensor
    lengths: torch.Tensor
    kinds: tuple[str, ...]

    def split(self) -> list[torch.Tensor]:
        """Return each row's ids, int64 (n,)."""
        return list(torch.split(self.ids.long(), self.lengths.tolist()))

    def is_text(self) -> torch.Tensor:
        """Return which rows are text, bool (rows,): all but noise, or all where there is nothing else."""
        text = torch.tensor([kind != NOISE for kind in self.kinds])
        return text if bool(text.any()) else ~text

    def text(self) -> list[torch.Tensor]:
        """Return the ids of each row that is text, int64 (n,)."""
        return [row for row, text in zip(self.split(), self.is_text().tolist(), strict=True) if text]

    def sha256(self) -> str:
        """Return a hash of all of it."""
        digest = hashlib.sha256()
        for tensor in (self.ids, self.lengths):
            digest.update(tensor.contiguous().numpy().data)
        digest.update("\0".join(self.kinds).encode())
        return digest.hexdigest()


def block_member(layer: int | Literal["*"]) -> str:
    """Return the name of a block's file, or the pattern of all."""
    return f"block-{layer if layer == '*' else f'{layer:05d}'}.safetensors"


def gradient_tensor(gradients: Mapping[tuple[int, str], float]) -> torch.Tensor:
    """Return mean squared gradients by (layer, linear) as the archive stores them."""
    n_layers = 1 + max(layer for layer, _ in gradients)
    return torch.tensor([[gradients[layer, name] for name in INPUTS] for layer in range(n_layers)])


def gradients_of(tensor: torch.Tensor) -> dict[tuple[int, str], float]:
    """Return what `gradient_tensor` stored."""
    rows = enumerate(tensor.tolist())
    return {(layer, name): value for layer, row in rows for name, value in zip(INPUTS, row, strict=True)}


def gather_rows(rows: Sequence[TokenRow]) -> Rows:
    """Return rows of the corpus as the archive stores them."""
    parts = [row.ids.to(torch.int32) for row in rows]
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return Rows(torch.cat(parts), lengths, tuple(row.kind for row in rows))


def join_rows(one: Rows, other: Rows) -> Rows:
    """Return the rows of both, the first's first."""
    ids, lengths = (torch.cat(pair) for pair in ((one.ids, other.ids), (one.lengths, other.lengths)))
    return Rows(ids, lengths, one.kinds + other.kinds)


def row_tensors(rows: Rows, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of `rows.safetensors`; `kinds` is the manifest's list."""
    numbers = torch.tensor([kinds.index(kind) for kind in rows.kinds], dtype=torch.uint8)
    return {"ids": rows.ids, "lengths": rows.lengths, "kinds": numbers}


def statistic_tensors(name: str, packed: PackedStatistics) -> dict[str, torch.Tensor]:
    """Return the tensors of one input's statistics."""
    tensors = {f"{name}.n_tokens": torch.tensor([packed.n_tokens]), f"{name}.diagonal": packed.diagonal}
    if packed.correlations is not None:
        tensors[f"{name}.correlations"] = packed.correlations
    return tensors


def write_member(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Member:
    """Write a member so that it appears whole, and return its length and hash; raises OutputError."""
    path = folder / name
    partial = path.with_name(name + PARTIAL)
    with explained(path):
        try:
            save_file(dict(tensors), partial)
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(None, str(error)) from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        member = Member(partial.stat().st_size, file_hash(partial))
        partial.replace(path)
    return member


def member_names(path: Path) -> set[str]:
    """Return the names of a member's tensors; raises ArchiveError for a file that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"{path}: cannot be read: {error}") from None


def read_member(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return tensors that map the file; raises ArchiveError for a file without them or that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            missing = sorted(set(names) - set(file.keys()))
            if missing:
                raise ArchiveError(f"{path}: damaged: it has no {', '.join(missing)}")
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"{path}: cannot be read: {error}") from None


def read_statistics(path: Path, name: str) -> Statistics:
    """Return the statistics that `statistic_tensors` stored under a name; raises ArchiveError."""
    tensors = read_member(path, statistic_names(name, diagonal_only=False))
    packed = (tensors[f"{name}.{part}"] for part in ("diagonal", "correlations"))
    return unpack(PackedStatistics(int(tensors[f"{name}.n_tokens"]), *packed))


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def archive_bytes(config: LlamaConfig, n_tokens: int, diagonal_only: bool) -> int:
    """Return about how many bytes the archive takes; never fewer than it does."""
    shapes = config.block_shapes()
    widths = {name: shapes[linear][1] for linear, name in INPUTS.items()}
    block = sum(_statistic_bytes(width, diagonal_only) for width in widths.values())
    head = _statistic_bytes(config.hidden_size, diagonal_only) + 8 * config.vocab_size
    manifest = 1 << 20
    return config.n_layers * (block + _HEADER_BYTES) + head + 10 * n_tokens + manifest


def _statistic_bytes(n_columns: int, diagonal_only: bool) -> int:
    return 4 * n_columns + (0 if diagonal_only else n_columns * (n_columns - 1)) + 8


def statistic_names(name: str, diagonal_only: bool) -> list[str]:
    """Return the names of the tensors of one input's statistics."""
    parts = ("n_tokens", "diagonal") if diagonal_only else ("n_tokens", "diagonal", "correlations")
    return [f"{name}.{part}" for part in parts]
