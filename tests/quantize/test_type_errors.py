"""The predicted losses of quant types: against the whole matrix encoded, and on average over rows."""

import pytest
import torch

from quantize.codecs import codec
from quantize.errors import UsageError
from quantize.solver.block_factor import prepare_blocks
from quantize.solver.blocks import encode_compensated
from quantize.solver.descend import loss
from quantize.type_errors import (
    EMBEDDING,
    OUTPUT,
    SENSITIVITY,
    Rounding,
    TypeErrors,
    predict_types,
    predicted_kl,
    token_frequencies,
    usable_types,
)
from tests.quantize.test_solver_linears import problem

SOME = ("F16", "Q8_0", "Q6_K", "Q4_K", "IQ4_NL", "Q4_0", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XS")


def test_a_sample_is_near_the_whole_matrix_for_every_type() -> None:
    W, H = problem(320, 256)
    W *= torch.rand(320, generator=torch.Generator().manual_seed(1)).add(0.1)[:, None] ** 2
    rounding = Rounding(prepare_blocks(H), H.diagonal().contiguous())
    found = predict_types(W, SOME, rounding, H, rows=64)
    assert found.energy == pytest.approx(float(loss(W, torch.zeros_like(W), H).sum()), rel=1e-4)
    assert list(found.errors) == list(SOME)
    for quant in SOME[1:]:
        whole = codec(quant).decode(rounding.encode(codec(quant), W), 256)
        exact = float(loss(W, whole, H).sum()) / found.energy
        assert 0.85 * exact < found.errors[quant] < 1.15 * exact, quant


@pytest.mark.parametrize("where", ["all columns", "one column"])
def test_a_row_that_answers_to_a_huge_input_does_not_stand_for_the_others(where: str) -> None:
    """It has nearly all of the energy, and hardly any of the loss: the others must be looked at."""
    W, H = problem(320, 256)
    x = torch.randn(256, generator=torch.Generator().manual_seed(2))
    x = x / x.norm() if where == "all columns" else torch.eye(256)[77]
    W -= torch.outer(W @ x, x)
    W[7] += x * W[7].norm()
    H = H + 1e7 * torch.outer(x, x) * float(H.diagonal().mean())
    rounding = Rounding(prepare_blocks(H), H.diagonal().contiguous())
    energies = loss(W, torch.zeros_like(W), H)
    assert float(energies[7] / energies.sum()) > 0.99
    found = predict_types(W, ("Q4_K", "Q3_K", "Q2_K"), rounding, H, rows=64)
    for quant, error in found.errors.items():
        lost = loss(W, codec(quant).decode(rounding.encode(codec(quant), W), 256), H)
        assert float(lost[7] / lost.sum()) < 0.3
        assert 0.8 < error / (float(lost.sum()) / found.energy) < 1.25, quant


def test_few_rows_are_measured_whole_by_the_right_encoder() -> None:
    W, H = problem(24, 256)
    factor, importance = prepare_blocks(H), H.diagonal().contiguous()
    found = predict_types(W, ("Q3_K", "IQ2_XS", "IQ1_S"), Rounding(factor, importance), H)
    energy = float(loss(W, torch.zeros_like(W), H).double().sum())
    made = {
        "Q3_K": encode_compensated(codec("Q3_K"), W, factor),
        "IQ2_XS": encode_compensated(codec("IQ2_XS"), W, factor),
        "IQ1_S": codec("IQ1_S").encode(W, importance),
    }
    for quant, blocks in made.items():
        lost = float(loss(W, codec(quant).decode(blocks, 256), H).double().sum())
        assert found.errors[quant] == pytest.approx(lost / energy, rel=1e-4)
    plain = predict_types(W, ("Q3_K",), Rounding(None, importance), H)
    assert plain.errors["Q3_K"] > found.errors["Q3_K"]


def test_rows_count_by_their_weights_and_without_h_every_column_alike() -> None:
    W, _ = problem(40, 64)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(3)) ** 3
    found = predict_types(W, ("Q4_0",), Rounding(), weights=weights)
    error = W - codec("Q4_0").decode(codec("Q4_0").encode(W), 64)
    energy = float((weights * W.square().sum(1)).sum())
    assert found.energy == pytest.approx(energy, rel=1e-5)
    assert found.errors["Q4_0"] == pytest.approx(
        float((weights * error.square().sum(1)).sum()) / energy, rel=1e-4
    )


def test_a_type_that_would_overflow_is_left_out() -> None:
    W, _ = problem(8, 64)
    W[3, 5] = 1e5
    found = predict_types(W, ("F16", "Q8_0"), Rounding(), weights=torch.eye(8)[0])
    assert list(found.errors) == ["Q8_0"]


def test_a_matrix_that_gives_nothing_loses_nothing() -> None:
    W, H = problem(8, 64)
    assert predict_types(W * 0, ("Q4_0", "F16"), Rounding(), H) == TypeErrors(0.0, {"Q4_0": 0.0, "F16": 0.0})


def test_usable_types_are_those_that_the_rows_and_the_importances_allow() -> None:
    assert usable_types(96, measured=True) == (
        "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0"
    )  # fmt: skip
    assert usable_types(80, measured=True) == ("F16",)
    every = set(usable_types(256, measured=True))
    assert every - set(usable_types(256, measured=False)) == {"IQ2_XXS", "IQ2_XS", "IQ1_S"}


def test_losses_become_nats_by_kind() -> None:
    found = TypeErrors(3.0, {"Q4_0": 0.25})
    assert predicted_kl("mlp.up_proj", found) == {"Q4_0": SENSITIVITY["mlp.up_proj"] * 0.25}
    assert predicted_kl("mlp.up_proj", found, 0.125) == {"Q4_0": 0.125 * 0.25}
    assert predicted_kl(EMBEDDING, found) == {"Q4_0": SENSITIVITY[EMBEDDING] * 0.25}
    assert predicted_kl(OUTPUT, found) == {"Q4_0": pytest.approx(SENSITIVITY[OUTPUT] * 0.5 * 0.75)}


def test_the_outputs_formula_is_the_kl_of_small_errors_in_logits() -> None:
    """For inputs that hardly move the probabilities, twice the prediction (the constant is a half)."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(50, 32, generator=generator) * 0.02
    X = torch.randn(4000, 32, generator=generator)
    shift = torch.zeros(50)
    shift[:5] = 2.0  # a few tokens are frequent
    noisy = codec("Q4_0").decode(codec("Q4_0").encode(W), 32)
    p, q = (torch.log_softmax(X @ each.T + shift, 1) for each in (W, noisy))
    measured = float((p.exp() * (p - q)).sum(1).mean())
    found = predict_types(W, ("Q4_0",), Rounding(), X.T @ X / 4000, p.exp().mean(0))
    # What all logits' errors have in common moves no probability: about Σ p² of the whole, a twentieth here.
    assert predicted_kl(OUTPUT, found)["Q4_0"] == pytest.approx(SENSITIVITY[OUTPUT] * measured, rel=0.1)


def test_token_frequencies_leave_none_at_zero() -> None:
    found = token_frequencies(torch.tensor([0, 3, 1]))
    assert found.tolist() == pytest.approx([0.5 / 5.5, 3.5 / 5.5, 1.5 / 5.5])


def test_every_reason_is_named_at_once() -> None:
    W, H = problem(8, 64)
    with pytest.raises(UsageError, match="cannot be judged") as caught:
        predict_types(W / 0, ("Q4_K",), Rounding(), H, weights=torch.ones(3))
    assert [reason[:20] for reason in caught.value.reasons] == [
        "expected a matrix of", "3 weights for 8 rows", "64 columns: Q4_K has"
    ]  # fmt: skip
