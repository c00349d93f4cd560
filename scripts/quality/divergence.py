"""KL divergence by token of a file's exact weights: both sides in the f32 reference forward, steps cached.

A step's result lies under the cache folder by the hash of what it was made from, so an interrupted benchmark
goes on where it was, and a second benchmark of the same model does not run its reference again.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from converters.checkpoint import Checkpoint
from converters.gguf_source import open_gguf
from quantize.llama import FINAL_NORM
from quantize.metrics import chunks
from quantize.reference import ReferenceModel

POSITIONS = 256


def digest(*parts: object) -> str:
    """Return a hash of paths' contents, tensors' bytes and other things' texts."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, torch.Tensor):
            whole.update(part.numpy().tobytes())
        else:
            whole.update(str(part).encode())
    return whole.hexdigest()[:24]


def cached(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the tensor at a path, made and written there first if need be."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(made, partial)
        partial.replace(path)
    loaded: torch.Tensor = torch.load(path, weights_only=True)
    return loaded


Read = Callable[[Path], ReferenceModel]
"""Opens a file, or a file of a folder, as a model."""


def read_gguf(path: Path) -> ReferenceModel:
    """Open a GGUF as a model."""
    file = open_gguf(path)
    return ReferenceModel(file.config, file.weights)


class Reference:
    """A checkpoint's final states over fixed rows, and the KL divergence of files to it."""

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[torch.Tensor], cache: Path) -> None:
        self.rows, self.cache = list(rows), cache
        self.model = ReferenceModel(checkpoint.config, checkpoint.weights)
        # A tensor that every seed scales differently stands for the weights.
        gains = checkpoint.weights.load(FINAL_NORM).float()
        self.key = digest(checkpoint.provenance.source, checkpoint.config, gains, *self.rows)
        self.lengths = [len(row) for row in self.rows]
        self.states = cached(cache / f"{self.key}.states", lambda: torch.cat(self.model.hidden(self.rows)))

    def divergences(self, paths: Sequence[Path], read: Read = read_gguf) -> list[torch.Tensor]:
        """Return KL(checkpoint || file) in nats, f32 (tokens,), of each file's weights at every position.

        `read` makes of a path what the file means; GGUFs are read by default. The checkpoint's logits are
        made once for all files that are not in the cache yet.
        """
        places = [self.cache / f"{self.key}-{digest(path)}.kl" for path in paths]
        missing = [(path, place) for path, place in zip(paths, places, strict=True) if not place.exists()]
        if missing:
            found = self._measure([read(path) for path, _ in missing])
            for (_, place), divergence in zip(missing, found, strict=True):
                cached(place, lambda divergence=divergence: divergence)  # type: ignore[misc]
        return [torch.load(place, weights_only=True) for place in places]

    def divergence(self, model: ReferenceModel) -> torch.Tensor:
        """Return KL(checkpoint || model) in nats, f32 (tokens,), at every position; nothing is cached."""
        return self._measure([model])[0]

    @torch.inference_mode()
    def _measure(self, models: Sequence[ReferenceModel]) -> list[torch.Tensor]:
        others = [(model, torch.cat(model.hidden(self.rows))) for model in models]
        parts: list[list[torch.Tensor]] = [[] for _ in others]
        for start, end in chunks(len(self.states), POSITIONS):
            log_p = torch.log_softmax(self.model.logits(self.states[start:end]), dim=-1)
            p = log_p.exp()
            for (model, states), kept in zip(others, parts, strict=True):
                log_q = torch.log_softmax(model.logits(states[start:end]), dim=-1)
                kept.append((p * (log_p - log_q)).sum(-1))
        return [torch.cat(kept) for kept in parts]

    def by_row(self, divergence: torch.Tensor) -> torch.Tensor:
        """Return each row's mean, f64 (rows,): what the bootstrap draws from."""
        return torch.stack([part.double().mean() for part in torch.split(divergence, self.lengths)])
