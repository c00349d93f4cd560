"""The prediction of layouts' errors against full quantizations, and the sample of rows behind it."""

import pytest
import torch

from quantize.errors import UsageError
from quantize.layout_errors import SHARES, column_losses, predict, sample
from quantize.layouts import ATTENTION, DOWN, GATE_UP, layout
from quantize.solver.descend import loss
from quantize.solver.exl2 import quantize_exl2
from tests.quantize.test_solver_linears import problem

SOME = (ATTENTION[1], ATTENTION[3], ATTENTION[7], ATTENTION[12], ATTENTION[17])


def test_a_sample_is_near_the_full_quantization_for_every_layout() -> None:
    W, H = problem(400, 128)
    W *= torch.rand(400, generator=torch.Generator().manual_seed(1)).add(0.1)[:, None] ** 2
    found = predict({"w": W}, H, {"w": SOME}, rows=64)["w"]
    assert found.energy == pytest.approx(float(loss(W, torch.zeros_like(W), H).sum()), rel=1e-4)
    for each, made in zip(found.errors, SOME, strict=True):
        assert each.layout == made
        assert each.bits == made.total_bits(400, 128)
        full = quantize_exl2({"w": W}, H, {"w": made}, "fast")["w"].error
        assert 0.85 * full < each.error < 1.15 * full
    errors = [each.error for each in found.errors]
    assert errors == sorted(errors, reverse=True)


def test_the_middle_layout_is_measured_itself() -> None:
    W, H = problem(40, 96)
    found = predict({"w": W}, H, {"w": SOME})["w"]
    middle = found.errors[len(SOME) // 2]
    full = quantize_exl2({"w": W}, H, {"w": middle.layout}, "fast")["w"].error
    assert middle.error == pytest.approx(full, rel=1e-4)


def test_all_layouts_of_all_linears_keep_their_order_and_distance() -> None:
    for family in (ATTENTION, GATE_UP, DOWN):
        W, H = problem(64, 256)
        found = predict({"w": W}, H, {"w": family})["w"].errors
        full = [quantize_exl2({"w": W}, H, {"w": each}, "fast")["w"].error for each in family]
        ratios = [each.error / error for each, error in zip(found, full, strict=True)]
        assert min(ratios) > 0.85 and max(ratios) < 1.2, ratios


def test_columns_are_rounded_on_the_best_of_the_steps_tried() -> None:
    generator = torch.Generator().manual_seed(5)
    target, weights = torch.randn(3, 40, generator=generator), torch.rand(40, generator=generator)
    found = column_losses(target, weights, 3, 16)
    for row in range(3):
        for start in range(0, 40, 16):
            x, counts = target[row, start : start + 16], weights[start : start + 16]
            tried = []
            for share in SHARES:
                step = float(x.abs().max()) / 3.5 * share
                levels = torch.tensor([min(max(round(float(v) / step), -4), 3) for v in x])
                tried.append((x - levels * step).square() * counts)
            least = min(tried, key=lambda losses: float(losses.sum()))
            assert torch.allclose(found[row, start : start + 16], least, rtol=1e-4, atol=1e-9)


def test_rows_are_taken_by_their_energy() -> None:
    energies = torch.tensor([0.0, 1, 1, 6, 1, 1, 0, 10.5])
    rows, shares = sample(energies, 5)
    assert rows.tolist() == [3, 7]
    assert shares.tolist() == pytest.approx([0.4, 0.6])
    everything, weights = sample(energies, 8)
    assert everything.tolist() == [1, 2, 3, 4, 5, 7]
    assert weights.tolist() == pytest.approx([e / 20.5 for e in (1, 1, 6, 1, 1, 10.5)])


def test_the_estimate_is_right_on_average() -> None:
    """Any number for each row: the mean over shifted orders is the energy-weighted mean."""
    generator = torch.Generator().manual_seed(2)
    energies, shares = torch.rand(200, generator=generator) ** 4, torch.rand(200, generator=generator)
    estimates = []
    for seed in range(300):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        rows, weight = sample(energies[order], 32)
        assert float(weight.sum()) == pytest.approx(1)
        estimates.append(float((shares[order][rows] * weight).sum()))
    exact = float((shares * energies).sum() / energies.sum())
    assert sum(estimates) / 300 == pytest.approx(exact, abs=0.01)


def test_a_linear_that_gives_nothing_loses_nothing() -> None:
    W, H = problem(8, 64)
    found = predict({"w": W * 0}, H, {"w": SOME})["w"]
    assert found.energy == 0
    assert [each.error for each in found.errors] == [0.0] * len(SOME)


def test_every_reason_is_named_at_once() -> None:
    W, H = problem(8, 64)
    with pytest.raises(UsageError, match="cannot be judged") as caught:
        predict({"a": W, "b": W / 0}, H, {"b": (SOME[0], layout((4, 24, 1.0)))})
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["a", *["b"] * 4]
