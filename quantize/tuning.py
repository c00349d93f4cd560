"""Scales, moved by gradients: what is left to gain once all codes are fixed.

A weight of a block type is d times an integer, less dmin times another. Both can be moved in a finished file
without changing its size, its layout or its speed. They are moved down the gradient of the KL divergence to
the original model's next-token distribution, over text that the model was calibrated on:

    W^ = r A + s B        A, B what d and dmin stand for in the file; r, s a number for each block, 1 at first

All of them are trained at once, end to end, by Adam: a step is a few rows. They are few, one or two for 256
weights of a K-quant, so little text is enough (EfficientQAT, arXiv 2407.11062, trains its steps so, among
much else). How far a number goes in a step is in proportion to what rounding has cost its matrix: a ratio
that is right by a hundredth at two bits is wrong by as much at five. Training the norms too brought nothing.

One block is held at a time, whatever the model. A step's rows go forward through all blocks, and their
states before each stay in memory, tokens x hidden_size x 4 bytes x blocks; then they go back: each block is
decoded once more, its outputs are made again and differentiated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantize.llama import EMBEDDING, FINAL_NORM, HEAD, block_tensor
from quantize.metrics import chunks
from quantize.products import linear
from quantize.reference import INPUTS, Block, ReferenceModel, full_f32
from quantize.scaled import Ratios, ScaledMatrix

POSITIONS = 512
"""Tokens whose logits are in memory at a time."""
NORMS = ("input_layernorm", "post_attention_layernorm")
_WARM = 5
_FARTHEST = 2.0
Parts = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
OnStep = Callable[[int, int, float], None]
"""Called with (steps done, in all, the step's KL divergence in nats per token, before it)."""


@dataclass(frozen=True)
class Settings:
    """How to train: `n_steps` steps of about `tokens` tokens; the most by which a ratio moves in a step, as a
    share of its matrix's relative error, `rate`, which rises over five steps and falls to zero by a cosine;
    and the order's `seed`."""

    n_steps: int = 64
    tokens: int = 2048
    rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What was found: ratios by matrix, and each step's KL divergence."""

    ratios: Mapping[str, Ratios]
    losses: tuple[float, ...]


def tune(
    reference: ReferenceModel,
    model: ReferenceModel,
    matrices: Mapping[str, ScaledMatrix],
    rows: Sequence[torch.Tensor],
    settings: Settings = Settings(),
    on_step: OnStep = lambda done, total, kl: None,
) -> Tuned:
    """Train the scales of `matrices`, linears of a model's decoder blocks by name.

    `model` is the file's, on the CPU or a GPU, `reference` the original one on the same device; `rows` are
    ids, int64 (n,). Linears that are not among the matrices stay. The same arguments give the same numbers.
    """
    training = _Training(model, matrices, settings, _errors(reference, matrices))
    with full_f32():
        states = [row.cpu() for row in reference.hidden(rows)]
        for step, picked in enumerate(_batches(rows, settings)):
            kl = training.step(reference, [rows[i] for i in picked], [states[i] for i in picked], step)
            on_step(step + 1, settings.n_steps, kl)
    return training.tuned()


def _errors(reference: ReferenceModel, matrices: Mapping[str, ScaledMatrix]) -> dict[str, float]:
    """Return |W - W^| / |W| of every matrix."""
    found = {}
    for name, matrix in matrices.items():
        W = reference.weights.load(name).float()
        lost = (W - matrix.kind.decode(matrix.blocks, matrix.n_columns)).square().sum()
        found[name] = float((lost / W.square().sum().clamp(min=1e-30)).sqrt())
    return found


def _batches(rows: Sequence[torch.Tensor], settings: Settings) -> list[list[int]]:
    """Return the rows of each step: all in a random order, and again in another, until there are enough."""
    generator, batches = torch.Generator().manual_seed(settings.seed), [list[int]()]
    room = settings.tokens
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            if batches[-1] and len(rows[i]) > room:
                if len(batches) == settings.n_steps:
                    return batches
                batches.append([])
                room = settings.tokens
            batches[-1].append(i)
            room -= len(rows[i])


class _Linear(torch.autograd.Function):
    """x W^T; backwards the gradient of W goes into those of its ratios."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, note: Callable[..., None]) -> torch.Tensor:
        """Multiply."""
        ctx.save_for_backward(x)
        ctx.weight, ctx.note = weight, note
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x."""
        (x,), gradient = ctx.saved_tensors, gradients[0].contiguous()
        ctx.note(linear(gradient.T.contiguous(), x.T.contiguous()))
        return linear(gradient, ctx.weight.T.contiguous()), None, None


class _Training:
    def __init__(
        self,
        model: ReferenceModel,
        matrices: Mapping[str, ScaledMatrix],
        settings: Settings,
        errors: Mapping[str, float],
    ) -> None:
        self.model, self.matrices, self.settings = model, matrices, settings
        self.ratios = {name: self._ratios(matrix) for name, matrix in matrices.items()}
        self.losses: list[float] = []
        groups = [{"params": ratios.all(), "share": errors[name]} for name, ratios in self.ratios.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        for ratio in self.all_ratios():
            ratio.grad = torch.zeros_like(ratio)

    def all_ratios(self) -> list[torch.Tensor]:
        """Return everything that is trained."""
        return [ratio for ratios in self.ratios.values() for ratio in ratios.all()]

    def tuned(self) -> Tuned:
        """Return what was found, on the CPU."""
        ratios = {
            name: Ratios(each.d.cpu(), None if each.dmin is None else each.dmin.cpu())
            for name, each in self.ratios.items()
        }
        return Tuned(ratios, tuple(self.losses))

    def step(
        self,
        reference: ReferenceModel,
        rows: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        number: int,
    ) -> float:
        """Take one step on these rows, `wanted` the original model's final states; return the KL before."""
        lengths, before = [len(row) for row in rows], list[torch.Tensor]()
        state = torch.cat(list(self.model.embed(rows)))
        with torch.no_grad():
            for layer in range(self.model.config.n_layers):
                before.append(state)
                state = self._through(layer, *self._block(layer), state, lengths)
        kl, gradient = self._last_gradient(reference, state, torch.cat(list(wanted)))
        for layer in reversed(range(self.model.config.n_layers)):
            gradient = self._backward(layer, before.pop(), lengths, gradient)
        self._move(number)
        self.losses.append(kl)
        return kl

    def _move(self, number: int) -> None:
        settings = self.settings
        share = 0.5 * (1 + math.cos(math.pi * number / settings.n_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * settings.rate * min(1, (number + 1) / _WARM) * share
        self.optimizer.step()
        for ratio in self.all_ratios():
            ratio.clamp_(1 / _FARTHEST, _FARTHEST)
            assert ratio.grad is not None
            ratio.grad.zero_()

    def _last_gradient(
        self, reference: ReferenceModel, state: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """Return the KL divergence per token, and its gradient at the states behind the last block."""
        head = self._load(EMBEDDING if self.model.config.tied_head else HEAD)
        state, gain = state.requires_grad_(), self._load(FINAL_NORM)
        normed, total, pulled = self.model._norm(state, gain), 0.0, list[torch.Tensor]()
        for start, end in chunks(len(state), POSITIONS):
            log_p = torch.log_softmax(reference.logits(wanted[start:end]), dim=-1)
            log_q = torch.log_softmax(linear(normed[start:end].detach().contiguous(), head), dim=-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            pulled.append(linear((log_q.exp() - log_p.exp()) / len(state), head.T.contiguous()))
        (at_state,) = torch.autograd.grad(normed, state, torch.cat(pulled))
        return total / len(state), at_state

    def _backward(
        self, layer: int, state: torch.Tensor, lengths: Sequence[int], gradient: torch.Tensor
    ) -> torch.Tensor:
        """Note the gradients of a block's ratios; return that of its input."""
        block, parts = self._block(layer)
        state = state.requires_grad_()
        with torch.enable_grad():
            after = self._through(layer, block, parts, state, lengths)
        (before,) = torch.autograd.grad(after, state, gradient)
        return before

    def _block(self, layer: int) -> tuple[Block, Parts]:
        """Return a block's tensors as they are now, and the parts of its matrices by their names."""
        block = {name: self._load(block_tensor(layer, name)) for name in NORMS}
        parts: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for name in INPUTS:
            full = block_tensor(layer, name)
            if full not in self.matrices:
                block[name] = self._load(full)
                continue
            found = self.matrices[full].parts()
            scaled, based = (None if part is None else part.to(self.model.device) for part in found)
            assert scaled is not None
            ratios = self.ratios[full]
            weight = scaled * ratios.d[..., None]
            if based is not None and ratios.dmin is not None:
                weight = torch.addcmul(weight, based, ratios.dmin[..., None])
            block[name] = weight.flatten(1)
            parts[full] = scaled, based
        return block, parts

    def _through(
        self,
        layer: int,
        block: Block,
        parts: Parts,
        state: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        def times(x: torch.Tensor, name: str) -> torch.Tensor:
            full = block_tensor(layer, name)
            found: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                x, block[name], lambda at_weight: self._note_ratios(full, at_weight, parts)
            )
            return found

        return self.model.differentiable_block(block, state, lengths, times)

    def _note_ratios(self, name: str, at_weight: torch.Tensor, parts: Parts) -> None:
        if name in parts:
            for ratio, part in zip(self.ratios[name].all(), parts[name], strict=False):
                assert ratio.grad is not None and part is not None
                ratio.grad += (at_weight.view_as(part) * part).sum(-1)

    def _ratios(self, matrix: ScaledMatrix) -> Ratios:
        ones = torch.ones(matrix.shape, device=self.model.device)
        return Ratios(ones, ones.clone() if matrix.based else None)

    def _load(self, name: str) -> torch.Tensor:
        return self.model.weights.load(name).to(self.model.device).float()
