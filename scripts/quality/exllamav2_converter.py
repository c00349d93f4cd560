"""ExLlamaV2's conversion of a whole model, restated: what a benchmark compares our files with.

Source of the facts: exllamav2 0.3.2, `conversion/measure.py` and `conversion/quantize.py`. Twice all rows go
through the model, attention and MLP one after the other:

    measure    a few rows, unquantized; every layout that a module's options have for a linear is quantized
               once, then each option's weights are put in and the module is run: its error is the mean over
               rows of |out - reference| / |reference|, Frobenius norms, the residual stream included
    quantize   all rows, through what is quantized so far; the Hessians of a module's linears are gathered
               from its own unquantized weights

What is theirs and not here: the head (a benchmark gives both sides the same), states in half precision.
Every block's result is a file, so that an interrupted run goes on.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from converters.disk import write_whole
from converters.exl2_measurement import decoder_linears
from quantize.layouts import Layout
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import INPUTS, Block, Observe, ReferenceModel, full_f32
from quantize.states import packs
from quantize.statistics import SecondMoment
from quantize.weights import Weights
from scripts.quality.exllamav2_options import OPTIONS, Option, Way, choose
from scripts.quality.exllamav2_solver import invert, quantize

PACK = 2048  # tokens that go through a module at a time
MEASURED_ROWS = 16
"""Its `-mr`."""


class Modules(ReferenceModel):
    """A Llama through which rows go module by module: self_attn, then mlp, each with norm and residual."""

    def push(
        self, module: str, block: Block, states: torch.Tensor, lengths: Sequence[int], observe: Observe
    ) -> torch.Tensor:
        """Push rows of `lengths` tokens, f32 (n, hidden_size) in all, through a module of a block."""
        found = torch.empty_like(states)
        for pack in packs(range(len(lengths)), lengths, PACK):
            part = states[pack.start : pack.end]
            if module == "self_attn":
                found[pack.start : pack.end] = self._attention_residual(block, part, pack.lengths, observe)
            else:
                found[pack.start : pack.end] = self._mlp_residual(block, part, 0, observe)
        return found


@dataclass(frozen=True)
class Module:
    """One module of a block, and the rows before it."""

    model: Modules
    name: str
    block: Block
    states: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """What the converter chooses among."""
        return OPTIONS[self.name]

    def reference(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the states behind the module, unquantized, and the Hessian of each of its inputs."""
        moments: dict[str, SecondMoment] = {}

        def observe(name: str, inputs: torch.Tensor, start: int) -> None:
            moments.setdefault(name, SecondMoment(inputs.shape[1], inputs.device)).add(inputs)

        states = self.push({}, observe)
        hessians = {}
        for name, moment in moments.items():
            H = moment.statistics().hessian
            assert H is not None
            hessians[name] = H * (sum(self.lengths) / len(self.lengths))
        return states, hessians

    def push(self, weights: Mapping[str, torch.Tensor], observe: Observe = lambda *_: None) -> torch.Tensor:
        """Return the states behind the module, with these weights in the place of its own."""
        block = self.block | {name: W.float() for name, W in weights.items()}
        return self.model.push(self.name, block, self.states, self.lengths, observe)

    def quantized(
        self, layouts: Mapping[str, Sequence[Layout]], hessians: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, Layout, torch.Tensor]]:
        """Yield each linear's weights, f16 (N, K), exact, under each layout that is asked for."""
        inverses = {name: invert(H) for name, H in hessians.items()}
        for linear, wanted in layouts.items():
            W, inverse = self.block[linear], inverses[INPUTS[linear]]
            for each in wanted:
                yield linear, each, quantize(W, inverse, each.groups(W.shape[1])).weights().half()

    def measure(self) -> tuple[list[Way], torch.Tensor]:
        """Return each option's bits and error, and the states behind the unquantized module."""
        target, hessians = self.reference()
        wanted = {
            linear: list(dict.fromkeys(option[linear] for option in self.options))
            for linear in self.options[0]
        }
        made = {(linear, each): weights for linear, each, weights in self.quantized(wanted, hessians)}
        ways = []
        for option in self.options:
            bits = sum(each.total_bits(*self.block[linear].shape) for linear, each in option.items())
            states = self.push({linear: made[linear, each] for linear, each in option.items()})
            # Its accuracy is at least 1e-6.
            ways.append(Way(bits, min(relative_error(states, target, self.lengths), 1 - 1e-6)))
        return ways, target

    def convert(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the weights under an option, f16 by linear, and the states behind the quantized module."""
        _, hessians = self.reference()
        layouts = {linear: [each] for linear, each in self.options[number].items()}
        weights = {linear: made for linear, _, made in self.quantized(layouts, hessians)}
        return weights, self.push(weights)


def relative_error(states: torch.Tensor, target: torch.Tensor, lengths: Sequence[int]) -> float:
    """Return the mean over rows of |states - target| / |target|."""
    errors = [
        torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)
        for found, wanted in zip(
            *(torch.split(each, list(lengths)) for each in (states, target)), strict=True
        )
    ]
    error = float(torch.stack(errors).mean())
    if not math.isfinite(error):
        raise ValueError("states that are not finite numbers")
    return error


@dataclass(frozen=True)
class Converter:
    """The conversion of one model, calibrated on `rows` of token ids; its files lie in `work`."""

    config: LlamaConfig
    weights: Weights
    rows: Sequence[torch.Tensor]
    work: Path
    n_measured: int = MEASURED_ROWS

    @torch.inference_mode()
    def measure(self) -> list[list[Way]]:
        """Return the measured options of each module, two a block, from rows that are evenly spread."""
        self.work.mkdir(parents=True, exist_ok=True)
        places = torch.linspace(0, len(self.rows) - 1, min(self.n_measured, len(self.rows)))
        model, rows = self._model(), [self.rows[int(place)] for place in places.round()]
        lengths, slots = tuple(map(len, rows)), []
        with full_f32():
            states = torch.cat(list(model.embed(rows)))
            for layer in range(self.config.n_layers):
                path = self.work / f"measured-{len(rows)}-{layer:03d}.json"
                block = model.widen(model.read_block(layer))
                if path.exists():
                    states = model.forward_block(block, states, lengths)
                else:
                    states = measure_block(model, block, states, lengths, path)
                found = json.loads(path.read_text())
                slots += [[Way(bits, error) for bits, error in found[module]] for module in OPTIONS]
        return slots

    @torch.inference_mode()
    def convert(self, bits: Fraction) -> "Restated":
        """Quantize all blocks to a size in bits per weight of the decoder's linears."""
        numel = sum(n * k for n, k in decoder_linears(self.config).values())
        slots = self.measure()
        choice = choose(slots, int(bits * numel))
        used = sum(slot[number].bits for slot, number in zip(slots, choice, strict=True))
        folder = self.work / f"{float(bits):g}-{self.n_measured}"
        folder.mkdir(exist_ok=True)
        (folder / "choice.json").write_text(json.dumps(choice))
        paths = [folder / f"{layer:03d}.safetensors" for layer in range(self.config.n_layers)]
        if not all(path.exists() for path in paths):
            self._quantize(paths, choice, folder / "states.pt")
        return Restated(tuple(paths), used / numel)

    def _quantize(self, paths: Sequence[Path], choice: Sequence[int], checkpoint: Path) -> None:
        """Write each block's weights; states before the next block lie in `checkpoint` meanwhile."""
        model, lengths = self._model(), tuple(map(len, self.rows))
        first, states = 0, torch.empty(0)
        if checkpoint.exists():
            first, states = torch.load(checkpoint, weights_only=True)
        with full_f32():
            states = states if first else torch.cat(list(model.embed(self.rows)))
            for layer in range(first, len(paths)):
                block, tensors = model.widen(model.read_block(layer)), dict[str, torch.Tensor]()
                for module, number in zip(OPTIONS, choice[2 * layer : 2 * layer + 2], strict=True):
                    weights, states = Module(model, module, block, states, lengths).convert(number)
                    tensors |= {block_tensor(layer, name): W.contiguous() for name, W in weights.items()}
                partial = paths[layer].with_suffix(".partial")
                save_file(tensors, partial)
                partial.replace(paths[layer])
                torch.save((layer + 1, states), partial)
                partial.replace(checkpoint)
        checkpoint.unlink()

    def _model(self) -> Modules:
        return Modules(self.config, self.weights)


def measure_block(
    model: Modules, block: Block, states: torch.Tensor, lengths: tuple[int, ...], path: Path
) -> torch.Tensor:
    """Measure both modules of a block into a file; return the states behind it."""
    found: dict[str, object] = {}
    started = time.monotonic()
    for module in OPTIONS:
        ways, states = Module(model, module, block, states, lengths).measure()
        found[module] = [[way.bits, way.error] for way in ways]
    found["seconds"] = time.monotonic() - started
    write_whole(path, json.dumps(found).encode("ascii"))
    return states


@dataclass(frozen=True)
class Restated:
    """A converted model: a file of exact weights for each block, and the bits per weight it takes."""

    paths: tuple[Path, ...]
    bits: float

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the decoder's linears, f16 by the checkpoint's names."""
        return {name: tensor for path in self.paths for name, tensor in load_file(path).items()}
