"""Folding: the same function, statistics as they would be gathered anew, factors that cost least."""

import math

import pytest
import torch

from quantize.folding import (
    MOST,
    PAIRS,
    STEPS,
    Channels,
    Fold,
    FoldedWeights,
    exponents_of,
    n_channels,
    of_kv_heads,
    of_query_heads,
    places,
)
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import ATTENTION_MIXED, MLP_INNER, ReferenceModel
from quantize.statistics import SecondMoment, pack, unpack
from quantize.weights import TensorWeights
from tests.conftest import random_tensors

CONFIG = LlamaConfig(64, 96, 2, 4, 2, 16, 50, 64, 1e-5, 1e4)


def fold(config: LlamaConfig = CONFIG, seed: int = 0) -> Fold:
    """Return a fold with exponents at random, up to a factor of 2^1.5."""
    generator = torch.Generator().manual_seed(seed)
    return Fold(
        config,
        {
            place: torch.randint(-12, 13, (n_channels(config, place[1]),), generator=generator).to(torch.int8)
            for place in places(config)
        },
    )


def models() -> tuple[ReferenceModel, ReferenceModel]:
    weights = TensorWeights(random_tensors(CONFIG, torch.bfloat16, 1))
    return ReferenceModel(CONFIG, weights), ReferenceModel(CONFIG, FoldedWeights(weights, fold()))


ROW = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(2))


def test_a_folded_model_computes_what_it_did() -> None:
    one, other = models()
    logits = [model.logits(model.hidden([ROW])[0]) for model in (one, other)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()


def test_only_the_four_matrices_change() -> None:
    one, other = models()
    changed = {
        name
        for name in CONFIG.tensor_shapes()
        if not torch.equal(*(m.weights.load(name).float() for m in (one, other)))
    }
    assert changed == {
        block_tensor(layer, name) for layer in range(2) for pair in PAIRS.values() for name in pair
    }
    specs = other.weights.specs()
    assert {name for name, spec in specs.items() if spec.dtype == torch.float32} == changed
    assert all(other.weights.load(name).dtype == spec.dtype for name, spec in specs.items())


@torch.inference_mode()
def test_statistics_become_those_of_the_folded_model() -> None:
    """As packed for the archive: correlations bit for bit, the diagonal divided."""

    def gathered(model: ReferenceModel) -> dict[str, SecondMoment]:
        found: dict[str, SecondMoment] = {}
        block = model.widen(model.read_block(0))

        def observe(name: str, inputs: torch.Tensor, _start: int) -> None:
            found.setdefault(name, SecondMoment(inputs.shape[1], torch.device("cpu"))).add(inputs)

        model.forward_block(block, next(model.embed([ROW])), [len(ROW)], observe)
        return found

    before, after = (gathered(model) for model in models())
    for place, (_, second) in PAIRS.items():
        derived = unpack(fold().statistics(block_tensor(0, second), pack(before[place].statistics()))).hessian
        anew = after[place].statistics().hessian
        assert derived is not None and anew is not None
        scales = anew.diagonal().sqrt()
        assert ((derived - anew).abs() / (scales[:, None] * scales)).max() < 5e-5


def test_statistics_of_other_inputs_stay() -> None:
    packed = pack(SecondMoment(64, torch.device("cpu")).statistics())
    assert fold().statistics(block_tensor(0, "mlp.gate_proj"), packed) is packed


def cost(D: torch.Tensor, w2: torch.Tensor, s: torch.Tensor) -> float:
    """Return what a block of one step costs: sum D / s^2 times sum w^2 s^2."""
    return float((D / s.square()).sum() * (w2 * s.square()).sum())


def test_factors_cost_least() -> None:
    """Within what half a step costs of the bound that Cauchy and Schwarz set; no single change is better."""
    generator = torch.Generator().manual_seed(3)
    power, weight, output = (torch.rand(64, generator=generator).double() + 0.05 for _ in range(3))
    D = power.sqrt()
    exponents = exponents_of(Channels(power, weight, output)).double()
    least = float((D * weight).sqrt().sum().square())
    found = cost(D, weight, torch.exp2(exponents / STEPS))
    worst = math.cosh(math.log(2) / STEPS) ** 2  # every factor half a step off, s^2 by 2^(1/8)
    assert least <= found < worst * least < cost(D, weight, torch.ones(64))
    for channel in range(64):
        for step in (-2, 2):
            moved = exponents.clone()
            moved[channel] += step
            assert cost(D, weight, torch.exp2(moved / STEPS)) > found


def test_the_outputs_power_stays_on_the_whole() -> None:
    generator = torch.Generator().manual_seed(4)
    power, weight, output = (torch.rand(200, generator=generator) ** 3 + 1e-4 for _ in range(3))
    exponents = exponents_of(Channels(power, weight, output)).double()
    left = (output * torch.exp2(-2 * exponents / STEPS)).sum() / output.sum()
    assert abs(math.log2(left)) <= 1 / STEPS


def test_dead_channels_have_the_mean_and_wild_ones_are_cut() -> None:
    power, weight, output = torch.rand(64) + 0.5, torch.ones(64), 4 * torch.rand(64)
    power[0], weight[1], output[2], weight[3], weight[4] = 0, 0, 0, 1e-30, math.nan
    exponents = exponents_of(Channels(power, weight, output))
    assert exponents.dtype == torch.int8
    assert exponents[0] == exponents[1] == exponents[2] == exponents[4]
    assert exponents[3] - exponents[0] == MOST
    assert not exponents_of(Channels(torch.zeros(8), torch.ones(8), torch.ones(8))).any()


@pytest.mark.parametrize(("name", "n"), [(ATTENTION_MIXED, 32), (MLP_INNER, 96)])
def test_every_channel_has_an_exponent(name: str, n: int) -> None:
    assert n_channels(CONFIG, name) == n


def test_query_heads_share_their_kv_heads_factors() -> None:
    channels = torch.arange(32.0)
    spread = of_query_heads(CONFIG, channels)
    assert torch.equal(spread.reshape(2, 2, 16)[:, 0], spread.reshape(2, 2, 16)[:, 1])
    assert torch.equal(of_kv_heads(CONFIG, spread), channels)
