"""The training loop: two optimizers, one clock, and checkpoints from which a killed run continues.

The hidden matrices are stepped by Muon (momentum, orthogonalized), everything else by AdamW. Progress is a
number from 0 to 1, read from the step count or the clock; learning rate and length of the rows follow it:

| progress   | rows x tokens per step                 | learning rate                 |
|------------|----------------------------------------|-------------------------------|
| 0 - 0.02   | 16 x 512                               | rises linearly                |
| 0.02 - 0.5 | 16 x 512                               | falls with the cosine to zero |
| 0.5 - 0.75 | 8 x 1024                               |                               |
| 0.75 - 1   | 8 x 1024 and 1 x 6144, taking turns    |                               |

Short rows come first because attention over them is cheap. The long ones train positions beyond 4096, the
context divided by the rotary factor.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import Llama

logger = logging.getLogger(__name__)

WARMUP = 0.02
SHORT_ROWS, MIDDLE_ROWS, LONG_ROWS = (16, 512), (8, 1024), (1, 6144)  # rows x tokens
MIDDLE_FROM, LONG_FROM = 0.5, 0.75
HIDDEN_RATE = 5e-3
OTHER_RATE = 4e-3
CLIP_NORM = 1.0
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class Budget:
    """How long to train: by steps when `n_steps` is given, otherwise by minutes of training."""

    minutes: float
    n_steps: int | None


@dataclass
class Clock:
    """Where a run stands; saved with the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    n_tokens: int = 0
    n_long_rows: int = 0

    def progress(self, budget: Budget) -> float:
        """The fraction of the budget that is used up, 0 to 1."""
        used = self.step / budget.n_steps if budget.n_steps else self.seconds / (60 * budget.minutes)
        return min(1.0, used)

    def count(self, rows: Tensor, seconds: float) -> None:
        """Add one step over rows [rows, n + 1]."""
        n_rows, n_tokens = rows.shape[0], rows.shape[1] - 1
        self.step += 1
        self.seconds += seconds
        self.n_tokens += n_rows * n_tokens
        self.n_long_rows += n_rows if n_tokens == LONG_ROWS[1] else 0


class Trainer:
    """A model, its optimizers and its clock."""

    def __init__(self, model: Llama, checkpoint: Path) -> None:
        self.model = model
        self.clock = Clock()
        self._checkpoint = checkpoint
        self._optimizers = _optimizers(model)
        if checkpoint.exists():
            self._resume()

    def run(
        self,
        budget: Budget,
        batches: Callable[[int, tuple[int, int]], Iterator[Tensor]],
        on_checkpoint: Callable[[Clock], None],
    ) -> None:
        """Train until the budget is spent.

        `batches(seed, (n_rows, n_tokens))` opens a stream of rows; `on_checkpoint` is told whenever the state
        of the run has been saved. A continued run opens new streams, seeded with the step it continues at.
        """
        streams = {
            shape: batches(3 * self.clock.step + i, shape)
            for i, shape in enumerate((SHORT_ROWS, MIDDLE_ROWS, LONG_ROWS))
        }
        saved = time.monotonic()
        while (progress := self.clock.progress(budget)) < 1.0:
            self._step(next(streams[row_shape(progress, self.clock.step)]), progress)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                on_checkpoint(self.clock)
                saved = time.monotonic()
        self._save()

    def _step(self, rows: Tensor, progress: float) -> None:
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.clock.count(rows, time.monotonic() - start)
        if self.clock.step % 10 == 0:
            self._log(rows, loss.item(), progress)

    def _log(self, rows: Tensor, loss: float, progress: float) -> None:
        speed = self.clock.n_tokens / self.clock.seconds
        shape = f"{rows.shape[0]}x{rows.shape[1] - 1}"
        message = "step %5d  %4.1f %%  %s  loss %.3f  %.0f tokens/s"
        logger.info(message, self.clock.step, 100 * progress, shape, loss, speed)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "clock": asdict(self.clock),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.clock = Clock(**state["clock"])
        logger.info("continuing at step %d", self.clock.step)


def row_shape(progress: float, step: int) -> tuple[int, int]:
    """The (rows, tokens per row) of a step."""
    if progress >= LONG_FROM and step % 2 == 1:
        return LONG_ROWS
    return MIDDLE_ROWS if progress >= MIDDLE_FROM else SHORT_ROWS


def rate(progress: float) -> float:
    """The learning rate as a fraction of its peak: linear warm-up, then the cosine's fall to zero."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def held_out_loss(model: Llama, rows: Tensor) -> Tensor:
    """Loss in nats at every position of rows [rows, n + 1]: [rows, n], float32."""
    losses = []
    with torch.inference_mode():
        for row in rows:
            logits = model(row[None, :-1])[0].float()
            losses.append(nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(losses)


def _optimizers(model: Llama) -> tuple[torch.optim.Optimizer, ...]:
    hidden = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    is_hidden = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in is_hidden]
    # The update is scaled to the size of an AdamW step, so one decay fits both.
    muon = torch.optim.Muon(
        [{"params": hidden, "peak": HIDDEN_RATE}],
        lr=HIDDEN_RATE,
        weight_decay=0.05,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        [{"params": others, "peak": OTHER_RATE}], lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    return muon, adam
