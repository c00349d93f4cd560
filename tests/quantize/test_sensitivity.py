"""Tokens' weights are squared gradients of sampled labels, as plain differentiation has them."""

import pytest
import torch
from torch.nn import functional

from quantize.llama import EMBEDDING, FINAL_NORM, HEAD, block_tensor
from quantize.reference import INPUTS, ReferenceModel, rotary_tables
from quantize.sensitivity import (
    TokenWeights,
    chunk_tokens_for,
    draw,
    fisher_kl,
    mean_gradients,
    sample_rows,
    token_weights,
)
from quantize.weights import TensorWeights
from tests.quantize.test_first_tokens import CONFIG, weights

ROWS = [torch.tensor([5, 1, 2, 3, 9]), torch.tensor([7, 7, 4]), torch.tensor([30, 9, 9, 12])]


def plain_squares(model: ReferenceModel, rows: list[torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """Return |g|^2 by (layer, linear) over all rows, by differentiating the whole model at once."""
    load, found = model.weights.load, dict[tuple[int, str], list[torch.Tensor]]()
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        outputs: dict[tuple[int, str], torch.Tensor] = {}

        def times(x: torch.Tensor, layer: int, name: str, kept: dict = outputs) -> torch.Tensor:  # type: ignore[type-arg]
            y = functional.linear(x, load(block_tensor(layer, name)).float())
            y.retain_grad()
            kept[layer, name] = y
            return y

        state = load(EMBEDDING).float()[row].requires_grad_()
        tables = rotary_tables(CONFIG, len(row), torch.device("cpu"))
        for layer in range(CONFIG.n_layers):
            gains = [load(block_tensor(layer, f"{name}_layernorm")) for name in ("input", "post_attention")]
            x = model._norm(state, gains[0])
            q, k, v = (times(x, layer, f"self_attn.{name}_proj") for name in "qkv")
            state = state + times(model._mix(q, k, v, tables), layer, "self_attn.o_proj")
            x = model._norm(state, gains[1])
            inner = functional.silu(times(x, layer, "mlp.gate_proj")) * times(x, layer, "mlp.up_proj")
            state = state + times(inner, layer, "mlp.down_proj")
        logits = functional.linear(model._norm(state, load(FINAL_NORM)), load(HEAD).float())
        labels = draw(logits.detach().softmax(-1), generator)[:, 0]
        functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        for place, y in outputs.items():
            assert y.grad is not None
            found.setdefault(place, []).append(y.grad.square().sum(-1))
    return {place: torch.cat(parts) for place, parts in found.items()}


@pytest.mark.parametrize("chunk", [4, 8, 100])
def test_weights_are_squared_gradients_shared_by_the_linears_of_an_input(chunk: int) -> None:
    model = ReferenceModel(CONFIG, weights())
    found = token_weights(model, ROWS, chunk)  # labels are drawn row by row, whatever the chunks
    squares = plain_squares(model, ROWS)
    for layer in range(CONFIG.n_layers):
        for inputs in dict.fromkeys(INPUTS.values()):
            members = [squares[layer, name] for name, seen in INPUTS.items() if seen == inputs]
            expected = torch.stack([each / each.mean() for each in members]).mean(0)
            own = found.of(layer, inputs)
            assert own is not None
            assert torch.allclose(own, expected, rtol=2e-3, atol=1e-5)
            assert float(own.mean()) == pytest.approx(1, rel=1e-5)
        for name in INPUTS:
            assert found.gradients[layer, name] == pytest.approx(float(squares[layer, name].mean()), rel=1e-3)
    assert found.of(CONFIG.n_layers, "head_input") is None


def test_mean_gradients_leave_first_tokens_out() -> None:
    model = ReferenceModel(CONFIG, weights())
    found, squares = mean_gradients(model, ROWS).means, plain_squares(model, ROWS)
    later = torch.cat([torch.arange(len(row)) > 0 for row in ROWS])
    assert found.keys() == squares.keys()
    for place, each in squares.items():
        assert found[place] == pytest.approx(float(each[later].mean()), rel=2e-3)
        assert found[place] != pytest.approx(float(each.mean()), rel=1e-2)
    alone = [row[:1] for row in ROWS]  # nothing but first tokens
    expected = {place: float(each.mean()) for place, each in plain_squares(model, alone).items()}
    assert mean_gradients(model, alone).means == pytest.approx(expected, rel=2e-3)


def test_gradients_at_the_embedding_are_those_of_plain_differentiation() -> None:
    """And they tell what an error in the rows of tokens costs."""
    model, generator = ReferenceModel(CONFIG, weights()), torch.Generator().manual_seed(3)
    rows = [torch.randint(0, CONFIG.vocab_size, (48,), generator=generator) for _ in range(40)]
    found = mean_gradients(model, rows).embedding
    assert found.n_tokens == 40 * 47 and found.hessian is not None
    weighed = token_weights(model, rows, 200).embedding
    assert weighed.hessian is not None
    assert torch.allclose(found.hessian, weighed.hessian, atol=1e-4 * float(found.hessian.max()))
    tensors = {name: weights().load(name) for name in weights().specs()}
    before = log_probabilities(model, rows)
    ratios = []
    for _ in range(4):
        error = torch.randn(tensors[EMBEDDING].shape, generator=generator) * 0.005
        error[torch.stack(rows)[:, 0]] = 0  # first tokens are left out
        other = ReferenceModel(CONFIG, TensorWeights(tensors | {EMBEDDING: tensors[EMBEDDING] + error}))
        after = log_probabilities(other, rows)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        moved = error[torch.cat(rows)]
        ratios.append(float(((moved @ found.hessian) * moved).sum(1).mean()) / 2 / kl)
    assert all(0.4 < ratio < 1.6 for ratio in ratios)


def test_a_sample_is_the_beginnings_of_evenly_spread_rows() -> None:
    rows = [torch.full((length,), i) for i, length in enumerate([600, 2048, 2048, 600, 512, 2048, 600, 512])]
    some = sample_rows(rows, 2048)
    assert [(int(row[0]), len(row)) for row in some] == [(0, 512), (2, 512), (4, 512), (6, 512)]
    assert [len(row) for row in sample_rows(rows, 1 << 20)] == [512] * 8
    short = [torch.full((10,), i) for i in range(100)]
    assert sum(len(row) for row in sample_rows(short, 205)) == 210


def test_labels_are_drawn_by_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    labels = draw(p.expand(20000, -1), torch.Generator().manual_seed(0))
    assert labels.shape == (20000, 1)
    shares = torch.bincount(labels[:, 0], minlength=6) / 20000
    assert torch.allclose(shares, p, atol=0.015)
    assert bool((shares[p == 0] == 0).all())


def test_progress_counts_both_ways_of_every_chunk() -> None:
    seen: list[tuple[int, int]] = []
    token_weights(ReferenceModel(CONFIG, weights()), ROWS, 5, on_block=lambda *done: seen.append(done))
    assert seen == [(step, 12) for step in range(1, 13)]


def test_a_token_that_nothing_depends_on_weighs_nothing() -> None:
    """With an output matrix of zeros no state matters; then tokens count alike."""
    tensors = {name: weights().load(name) for name in weights().specs()}
    tensors[HEAD] = torch.zeros_like(tensors[HEAD])
    found = token_weights(ReferenceModel(CONFIG, TensorWeights(tensors)), ROWS, 100)
    assert all(bool((each == 1).all()) for each in found.weights.values())


def test_a_chunk_fits_a_quarter_of_the_memory() -> None:
    assert chunk_tokens_for(30, 576, 8 << 30) == (8 << 30) // 4 // (4 * 576 * 31)
    assert chunk_tokens_for(62, 7168, 1 << 30) == 512


def test_gradients_tell_the_kl_divergence_of_an_error() -> None:
    """Of a small error in one linear at a time, by the weighted Hessian.

    Tokens are taken to add up independently. At v they do not: attention sums what is alike.
    """
    model = ReferenceModel(CONFIG, weights())
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, CONFIG.vocab_size, (48,), generator=generator) for _ in range(12)]
    found = token_weights(model, rows, 1000)
    tensors = {name: weights().load(name) for name in weights().specs()}
    ratios: dict[str, float] = {}
    hessians, before = weighted_hessians(model, rows, found), log_probabilities(model, rows)
    for layer in range(CONFIG.n_layers):
        for name, inputs in INPUTS.items():
            place = block_tensor(layer, name)
            error = torch.randn(tensors[place].shape, generator=generator) * 0.01
            other = ReferenceModel(CONFIG, TensorWeights(tensors | {place: tensors[place] + error}))
            after = log_probabilities(other, rows)
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            energy = float(((error @ hessians[layer, inputs]) * error).sum())
            predicted = fisher_kl(energy, len(error), found.gradients[layer, name])
            ratios[place] = predicted / kl
    others = [ratio for place, ratio in ratios.items() if "v_proj" not in place]
    assert all(0.45 < ratio < 1.6 for ratio in others)
    assert 0.8 < sorted(others)[len(others) // 2] < 1.2
    assert all(0.15 < ratio < 1.2 for place, ratio in ratios.items() if "v_proj" in place)


def weighted_hessians(
    model: ReferenceModel, rows: list[torch.Tensor], found: TokenWeights
) -> dict[tuple[int, str], torch.Tensor]:
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    states = list(model.embed(rows))
    with torch.no_grad():
        for layer in range(CONFIG.n_layers):
            block = model.widen(model.read_block(layer))

            def see(name: str, x: torch.Tensor, _: int, layer: int = layer) -> None:
                seen.setdefault((layer, name), []).append(x)

            states = [model.forward_block(block, state, [len(state)], see) for state in states]
    weighted = {}
    for place, parts in seen.items():
        x, weights = torch.cat(parts), found.of(*place)
        assert weights is not None
        weighted[place] = (x * weights[:, None]).T @ x / len(x)
    return weighted


def log_probabilities(model: ReferenceModel, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.log_softmax(model.logits(torch.cat(model.hidden(rows))).double(), -1)
