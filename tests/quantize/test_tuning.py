"""Scales are trained down the true gradient, and what is written is what was trained."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from quantize.codecs import CODECS
from quantize.codecs.fields import FieldCodec
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import INPUTS, ReferenceModel
from quantize.scaled import Ratios, ScaledMatrix
from quantize.tuning import Settings, _batches, _Training, tune
from quantize.weights import TensorWeights

CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=256,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    vocab_size=60,
    context_length=64,
    rms_norm_eps=1e-6,
    rope_theta=100000.0,
    rope_factor=4.0,
)
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = CONFIG.tensor_shapes().items()
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    return {name: 0.12 * each if each.ndim > 1 else 1 + 0.1 * each for name, each in drawn.items()}


def texts(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 60, (12 + i % 5,), generator=generator) for i in range(count)]


def quantized(kind: str) -> dict[str, ScaledMatrix]:
    codec = CODECS[kind]
    assert isinstance(codec, FieldCodec)
    names = [block_tensor(layer, name) for layer in range(CONFIG.n_layers) for name in INPUTS]
    weights, ones = tensors(), torch.ones(256)
    return {name: ScaledMatrix(codec, codec.encode(weights[name], ones), 256) for name in names}


def decoded(matrices: dict[str, ScaledMatrix]) -> Tensors:
    return tensors() | {
        name: each.kind.decode(each.blocks, each.n_columns) for name, each in matrices.items()
    }


def model(weights: Tensors) -> ReferenceModel:
    return ReferenceModel(CONFIG, TensorWeights(weights))


def kl(weights: Tensors, rows: Sequence[torch.Tensor]) -> float:
    """Return the KL divergence to the original, in nats per token, as a sum over everything."""
    found = []
    for each in (model(tensors()), model(weights)):
        states = each.hidden(rows)
        found.append(torch.cat([torch.log_softmax(each.logits(state), -1) for state in states]).double())
    return float(functional.kl_div(found[1], found[0], reduction="sum", log_target=True)) / len(found[0])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q4_1", "IQ4_XS", "IQ3_XXS"])
def test_a_matrix_is_the_sum_of_what_d_and_dmin_stand_for(kind: str) -> None:
    matrix = next(iter(quantized(kind).values()))
    scaled, based = matrix.parts()
    assert matrix.based is (based is not None) is (kind in ("Q2_K", "Q4_K", "Q4_1"))
    whole = matrix.kind.decode(matrix.blocks, 256).view_as(scaled)
    assert torch.allclose(scaled + (0 if based is None else based), whole, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    d, dmin = (torch.rand(matrix.shape, generator=generator) + 0.5 for _ in range(2))
    moved = matrix.moved(Ratios(d, None if based is None else dmin))
    expected = scaled * d[..., None] + (0 if based is None else based * dmin[..., None])
    found = matrix.kind.decode(moved, 256).view_as(expected)
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    same = matrix.moved(Ratios(torch.ones(matrix.shape), None if based is None else torch.ones(matrix.shape)))
    assert torch.equal(same, matrix.blocks)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_gradients_are_those_of_the_divergence(kind: str) -> None:
    """Of some ratios and gains, by small changes in both directions."""
    matrices, rows = quantized(kind), texts(3)
    weights = decoded(matrices)
    reference = model(tensors())
    training = _Training(model(weights), matrices, Settings(), dict.fromkeys(matrices, 0.0))
    noted: list[torch.Tensor] = []
    training._move = lambda number: noted.extend(  # type: ignore[method-assign]
        each.grad.clone() for each in training.all_ratios() if each.grad is not None
    )
    before = training.step(reference, rows, reference.hidden(rows), 0)
    assert before == pytest.approx(kl(weights, rows), rel=1e-4)
    gradients = dict(zip(map(id, training.all_ratios()), noted, strict=True))

    def slope(name: str, change: torch.Tensor) -> float:
        two = [kl(weights | {name: weights[name] + sign * change}, rows) for sign in (1, -1)]
        return (two[0] - two[1]) / 2

    for name in (block_tensor(0, "self_attn.q_proj"), block_tensor(1, "mlp.down_proj")):
        parts, ratios = matrices[name].parts(), training.ratios[name].all()
        for part, ratio in zip(parts, ratios, strict=False):
            assert part is not None
            found = gradients[id(ratio)]
            step = 0.02 * found / found.norm()
            assert slope(name, (part * step[..., None]).flatten(1)) == pytest.approx(
                float((found * step).sum()), rel=0.03
            )


def test_training_lowers_the_divergence_of_its_text_and_is_repeatable() -> None:
    matrices = quantized("Q2_K")
    weights, seen = decoded(matrices), list[tuple[int, int, float]]()
    settings = Settings(n_steps=60, tokens=240, rate=0.02)
    found = tune(
        model(tensors()), model(weights), matrices, texts(60), settings, lambda *now: seen.append(now)
    )
    assert [(done, total) for done, total, _ in seen] == [(step + 1, 60) for step in range(60)]
    assert tuple(now for _, _, now in seen) == found.losses
    moved = {name: each.kind.decode(each.moved(found.ratios[name]), 256) for name, each in matrices.items()}
    after = weights | moved
    assert kl(after, texts(60)) < 0.9 * kl(weights, texts(60))
    again = tune(model(tensors()), model(weights), matrices, texts(60), settings)
    assert again.losses == found.losses
    assert all(torch.equal(found.ratios[name].d, again.ratios[name].d) for name in matrices)


def test_linears_of_other_types_stay() -> None:
    matrices = {name: each for name, each in quantized("Q3_K").items() if "down_proj" in name}
    weights = decoded(matrices)
    found = tune(model(tensors()), model(weights), matrices, texts(8), Settings(n_steps=2, tokens=60))
    assert found.ratios.keys() == matrices.keys()
    assert kl(weights, texts(8)) == pytest.approx(found.losses[0], rel=0.5)


def test_steps_take_rows_in_turn() -> None:
    rows = [torch.zeros(length, dtype=torch.int64) for length in (10, 10, 10, 10, 35)]
    batches = _batches(rows, Settings(n_steps=7, tokens=30))
    assert len(batches) == 7
    assert all(sum(len(rows[i]) for i in batch) <= 30 or len(batch) == 1 for batch in batches)
    assert sorted(i for batch in batches for i in batch)[:5] != [0] * 5
    first = [i for batch in batches for i in batch][:5]
    assert sorted(first) == [0, 1, 2, 3, 4]
