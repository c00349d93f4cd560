"""The solver on EXL2's grid of scales: against enumeration where that is possible, and against itself."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch

from quantize.codecs.exl2 import Group, decode, encode, step_sizes
from quantize.errors import UsageError
from quantize.layouts import ATTENTION, DOWN, Layout, layout
from quantize.solver import exl2_groups
from quantize.solver.compensate import round_block
from quantize.solver.descend import descend, loss
from quantize.solver.exl2 import Steps, improve, quantize_exl2, quantize_matrix, round_groups
from quantize.solver.exl2_groups import Fitted, search_group
from quantize.solver.factor import Factor, prepare
from quantize.solver.grid import affine_grid
from quantize.solver.linears import Effort
from tests.quantize.test_solver_linears import problem

SIXTEEN = torch.arange(1, 17, dtype=torch.uint8)


def table(m: float) -> torch.Tensor:
    """The sixteen steps of an m."""
    return step_sizes(SIXTEEN[:, None], torch.tensor([m * 256]).half())[:, 0]


def left(target: torch.Tensor, factor: Factor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each output's loss, f32 (N,), once its group is rounded with its step, f32 (N,)."""
    n, k = target.shape
    zero, group = torch.full((n, 1), 2.0 ** (bits - 1)), torch.zeros(k, dtype=torch.int64)
    _, errors = round_block(target, target, factor.feedback, affine_grid(step[:, None], zero, group, bits))
    return ((errors @ factor.feedback).square() * factor.weights).sum(1)


def searched(bits: int, seed: int) -> float:
    """Return the loss after a search, as a multiple of the least loss of all: every scale of each output
    under every 10th half from a third of the range up."""
    W, H = problem(48, 32, seed)
    W *= torch.linspace(0.1, 2, 48)[:, None]
    factor = prepare(H, order="activation")
    target = W[:, factor.order].contiguous()
    scales, m = search_group(target, factor.feedback, factor.weights, bits)
    reached = float(left(target, factor, table(m)[scales.long() - 1], bits).sum())
    top = (target.abs().max() * 2 / (2**bits - 1) / 256).half()
    first, last = (int(half.view(torch.int16)) for half in (top / 3, top))
    best = float("inf")
    for number in range(first, last + 60, 10):
        tried = table(float(torch.tensor([number], dtype=torch.int16).view(torch.float16)))
        every = torch.stack([left(target, factor, step.expand(48), bits) for step in tried])
        best = min(best, float(every.amin(0).sum()))
    return reached / best


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_search_finds_nearly_the_best_scales_of_the_best_maximum(bits: int) -> None:
    ratios = [searched(bits, seed) for seed in range(3)]
    assert min(ratios) > 0.97
    assert sum(ratios) / 3 < 1.03


@pytest.mark.parametrize(("bits", "outlier"), [(3, 1), (8, 1), (8, 5)])
def test_a_sample_of_outputs_decides_for_all(
    monkeypatch: pytest.MonkeyPatch, bits: int, outlier: float
) -> None:
    """Not worse by 2 %, and one output of large weights is not missed."""
    W, H = problem(600, 32)
    W[123] *= outlier
    factor = prepare(H, order="natural")
    lost = []
    for judges in (600, 120):
        monkeypatch.setattr("quantize.solver.exl2_groups.JUDGES", judges)
        scales, m = search_group(W, factor.feedback, factor.weights, bits)
        assert len(set(scales.tolist())) > 3
        lost.append(float(left(W, factor, table(m)[scales.long() - 1], bits).sum()))
    assert lost[1] < 1.02 * lost[0]


def grid_of(W: torch.Tensor, groups: tuple[Group, ...]) -> tuple[torch.Tensor, Steps, torch.Tensor]:
    """Codes and steps of the plain walk, and the Hessian in the stored order."""
    _, H = problem(1, W.shape[1], seed=9)
    factor = prepare(H, order="activation")
    codes, steps = round_groups(W, factor, groups)
    return codes, steps, factor.hessian


def fitted_native_and_not(
    W: torch.Tensor, codes: torch.Tensor, H: torch.Tensor, steps: Steps
) -> tuple[Fitted, Fitted]:
    """Fit the only group of the steps to the codes, both ways."""
    slope, shape = (W - steps.values(codes)) @ H, steps.levels(codes)
    maxima = [float(steps.maxima[0]) * share for share in (1.0, 0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.05)]
    arguments = (slope, shape, shape @ H, steps.scales[:, 0], torch.tensor(maxima).half().tolist())
    return exl2_groups._fit_native(*arguments), exl2_groups._fit(*arguments)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_kernels_choose_what_torch_does(bits: int) -> None:
    """Also at a row of zeros, and where no step of the sixteen is wide enough."""
    W, H = problem(90, 64, seed=bits)
    W[7] = 0
    W[8] *= 1e5
    factor = prepare(H, order="activation")
    group = (W[:, factor.order].contiguous(), factor.feedback, factor.weights)
    ideal = exl2_groups._ideal(*group, bits)
    assert torch.equal(ideal, exl2_groups._ideal_native(*group, bits))
    maxima = [2.0**-24, *torch.tensor([float(ideal[5]) / 256, float(ideal[8]) / 256]).half().tolist()]
    found = exl2_groups._best_scales(*group, ideal, maxima, bits)
    scales, losses = exl2_groups._best_scales_native(*group, ideal, maxima, bits)
    assert torch.equal(scales, found[0])
    assert torch.equal(losses, found[1])
    codes, steps, H = grid_of(W, (Group(bits, 64),))
    one, other = fitted_native_and_not(W, codes, H, steps)
    assert one.maximum == other.maximum
    assert (one.scales != other.scales).float().mean() < 0.03  # sums in another order
    same = one.scales == other.scales
    assert torch.equal(one.sizes[same], other.sizes[same])
    assert torch.equal(one.moved[same], other.moved[same])
    scale = float((W @ H).abs().max())
    assert torch.allclose(one.slope[same], other.slope[same], atol=1e-4 * scale)
    assert int(one.scales[7]) == int(steps.scales[7, 0])


def test_what_is_left_of_the_slope_is_that_of_the_new_steps() -> None:
    W, _ = problem(40, 32, seed=1)
    codes, steps, H = grid_of(W, (Group(3, 32),))
    rough = replace(steps, maxima=(steps.maxima * 1.06).half().float())
    for found in fitted_native_and_not(W, codes, H, rough):
        new = replace(rough, scales=found.scales[:, None], maxima=torch.tensor([found.maximum]))
        assert torch.equal(found.sizes, new.sizes()[:, 0])
        assert torch.allclose(found.moved, new.sizes()[:, 0] - rough.sizes()[:, 0])
        assert torch.allclose(
            found.slope, (W - new.values(codes)) @ H, atol=1e-4 * float((W @ H).abs().max())
        )


def test_refitting_finds_the_best_steps_for_the_codes() -> None:
    """One group: every scale under every maximum near the present one, each loss computed in full."""
    W, _ = problem(40, 32, seed=1)
    codes, steps, H = grid_of(W, (Group(3, 32),))
    rough = replace(steps, maxima=(steps.maxima * 1.06).half().float())
    slope, shape = (W - rough.values(codes)) @ H, rough.levels(codes)
    found = exl2_groups.fit(slope, shape, shape @ H, rough.scales[:, 0], float(rough.maxima[0]), 3)
    fitted = replace(rough, scales=found.scales[:, None], maxima=torch.tensor([found.maximum]))
    reached = float(loss(W, fitted.values(codes), H).sum())
    best, present = float("inf"), float(rough.maxima[0])
    middle = int(torch.tensor([present]).half().view(torch.int16))
    for number in range(middle - 300, middle + 300, 3):
        m = float(torch.tensor([number], dtype=torch.int16).view(torch.float16))
        if 0.9 * present <= m <= 1.1 * present:
            every = [replace(rough, maxima=torch.tensor([m]), scales=s.expand(40, 1)) for s in SIXTEEN]
            losses = torch.stack([loss(W, steps.values(codes), H) for steps in every])
            best = min(best, float(losses.amin(0).sum()))
    assert best * 0.999 <= reached <= best * 1.01
    assert reached < 0.99 * float(loss(W, rough.values(codes), H).sum())


def test_no_round_of_fitting_and_descent_raises_the_loss() -> None:
    W, _ = problem(60, 160, seed=2)
    groups = (Group(5, 32), Group(4, 32), Group(4, 32), Group(2, 48), Group(2, 16))
    codes, steps, H = grid_of(W, groups)
    losses = [float(loss(W, steps.values(codes), H).sum())]
    for _ in range(4):
        codes, steps = improve(W, codes, H, steps)
        losses.append(float(loss(W, steps.values(codes), H).sum()))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    for i, (group, start) in enumerate(zip(groups, (0, 32, 64, 96, 144), strict=True)):
        assert int(codes[:, start : start + group.size].max()) == 2**group.bits - 1, i
    # At the end no single code can be moved to its gain.
    codes = descend(W, codes, H, steps, 30, cuts=(32, 96))
    least = loss(W, steps.values(codes), H)
    tops = torch.tensor([2**group.bits - 1 for group in groups]).repeat_interleave(
        torch.tensor([group.size for group in groups])
    )
    for column in range(0, 160, 7):
        for step in (-1, 1):
            other = codes.int()
            other[:, column] = (other[:, column] + step).clamp(0, int(tops[column]))
            assert bool((loss(W, steps.values(other.to(torch.uint8)), H) >= least * (1 - 1e-5)).all())


def test_least_loss_over_all_codes_and_any_steps_is_not_beaten() -> None:
    """Three columns, 2 bits: every code and the best real step for it bound the loss from below."""
    W, H = problem(60, 3, seed=7)
    factor = prepare(H, damp=0.0, order="activation")
    made = quantize_matrix(W, H, factor, (Group(2, 3),), "high").linear
    nothing = loss(W, torch.zeros_like(W), H)
    bound = torch.full((60,), float("inf"))
    for codes in itertools.product(range(4), repeat=3):
        shape = torch.tensor(codes, dtype=torch.float32) - 2
        curvature = float(shape @ H @ shape)
        gain = (W @ H @ shape).clamp(min=0).square() / curvature if curvature else torch.zeros(60)
        bound = torch.minimum(bound, nothing - gain)
    reached = loss(W, made.weights(), H)
    assert bool((reached >= bound - 1e-3 * nothing).all())
    assert float(reached.mean()) < 1.6 * float(bound.mean())


@pytest.mark.parametrize("which", [ATTENTION[1], DOWN[5], layout((6, 32, 0.2), (5, 64, 0.5), (2, 16, 0.3))])
def test_what_is_returned_is_what_the_file_says(which: Layout) -> None:
    W, H = problem(70, 192, seed=3)
    H[5], H[:, 5] = 0.0, 0.0
    results = {effort: quantize_exl2({"w": W}, H, {"w": which}, effort)["w"] for effort in get_args(Effort)}
    for result in results.values():
        weights = decode(encode(result.linear), 70)
        lost = float(loss(W, weights, H).double().sum())
        assert lost / float(loss(W, torch.zeros_like(W), H).double().sum()) == pytest.approx(
            result.error, rel=1e-6
        )
        assert torch.equal(result.linear.perm, torch.argsort(H.diagonal(), descending=True, stable=True))
        assert result.linear.groups == which.groups(192)
        assert result.log == ()
    assert results["fast"].error > 1.05 * results["default"].error > 1.05 * results["high"].error


def test_linears_of_an_input_are_quantized_each_under_its_layout() -> None:
    W, H = problem(64, 128, seed=4)
    layouts = {"a": ATTENTION[0], "b": ATTENTION[6]}
    both = quantize_exl2({"a": W[:32], "b": W[32:]}, H, layouts)
    alone = quantize_exl2({"b": W[32:]}, H, layouts)["b"]
    assert torch.equal(both["b"].linear.codes, alone.linear.codes)
    assert both["b"].error < 0.2 * both["a"].error


def test_wider_codes_belong_to_the_more_important_inputs() -> None:
    W, H = problem(64, 256, seed=5)
    wide = quantize_exl2({"w": W}, H, {"w": layout((6, 32, 0.125), (3, 32, 0.875))}, "fast")["w"]
    plain = quantize_exl2({"w": W}, H, {"w": layout((3, 32, 1.0))}, "fast")["w"]
    important = wide.linear.perm[:32]
    errors = [(result.linear.weights() - W).square().mean(0) for result in (wide, plain)]
    assert float(errors[0][important].mean()) < 0.05 * float(errors[1][important].mean())
    assert wide.error < (1 - 0.125) * plain.error


def test_weights_of_any_size_have_finite_steps() -> None:
    """Subnormal maxima, weights of nothing, and weights near the end of half precision."""
    W, H = problem(32, 64, seed=6)
    for size, least in ((1e-6, 0.0), (1e-3, 0.0), (1.0, 0.0), (1e5, 0.0), (0.0, 0.0)):
        for bits in (2, 8):
            result = quantize_exl2({"w": W * size}, H, {"w": layout((bits, 32, 1.0))})["w"]
            weights = decode(encode(result.linear), 32)
            assert bool(torch.isfinite(weights).all())
            assert least <= result.error < 1
            if size in (1e-3, 1.0) and bits == 8:
                assert result.error < 2e-4


def test_columns_of_two_widths_are_no_grid() -> None:
    steps = Steps((Group(4, 32), Group(3, 32)), torch.ones(2, 2, dtype=torch.uint8), torch.ones(2))
    with pytest.raises(ValueError, match=r"widths \[3, 4\]"):
        steps.columns(torch.arange(30, 40))


def test_every_reason_is_named_at_once() -> None:
    W, H = problem(8, 64)
    weights = {"a": W[:, :32], "b": W / 0, "c": W, "d": W}
    layouts = {"a": ATTENTION[0], "b": ATTENTION[0], "d": layout((7, 24, 1.0))}
    with pytest.raises(UsageError, match="fast, default, high") as caught:
        quantize_exl2(weights, H, layouts, "best")  # type: ignore[arg-type]
    assert len(caught.value.reasons) == 10
