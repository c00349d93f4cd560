"""The search of scales, the linears of an input together, and the target for moved inputs."""

import itertools

import pytest
import torch

from quantize.errors import HessianError, UsageError
from quantize.solver import scales as search
from quantize.solver.descend import loss
from quantize.solver.factor import Order, prepare
from quantize.solver.grid import affine_grid
from quantize.solver.linears import Effort, QuantizedLinear, Settings, prepare_input, quantize_linears
from quantize.solver.scales import best_scale, group_index, plain_scales, round_searched, search_scales
from quantize.solver.target import shifted_target


def problem(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, k) and a Hessian whose columns are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=generator) * 0.02
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    X = torch.randn(4 * k, k, generator=generator) @ mix * torch.rand(k, generator=generator).add(0.1)
    return W, X.T @ X / len(X)


def one(W: torch.Tensor, H: torch.Tensor, settings: Settings) -> QuantizedLinear:
    return quantize_linears({"w": W}, H, settings)["w"]


def plain_error(W: torch.Tensor, H: torch.Tensor, settings: Settings) -> float:
    """The same share after plain rounding to scales from the range."""
    group = group_index(W.shape[1], settings.group_size)
    grid = affine_grid(*plain_scales(W, group, settings.bits, settings.symmetric), group, settings.bits)
    lost, energy = (loss(W, got, H).double().sum() for got in (grid.values(grid.nearest(W)), 0 * W))
    return float(lost / energy)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_chosen_scale_is_the_best_of_the_candidates(symmetric: bool) -> None:
    """Every candidate is rounded by itself, with torch; the compiled search must find the same least loss."""
    W, H = problem(70, 32)
    factor = prepare(H, order="natural")
    scale, zero = search._range(W, 3, symmetric, torch.tensor(search.LADDER))
    best, at = search.choose(W, factor.feedback, factor.weights, scale, zero, 3)
    losses = search._losses(W, factor.feedback, factor.weights, scale, zero, 3)
    same = losses.argmin(0)
    _, left = search.least(W, factor.feedback, factor.weights, scale, zero, 3)
    torch.testing.assert_close(left, losses.amin(0))
    assert torch.equal(best, scale[same, torch.arange(70)])
    assert torch.equal(at, zero[same, torch.arange(70)])
    assert len(set(same.tolist())) > 3
    found, _ = best_scale(W, factor.feedback, factor.weights, 3, symmetric)
    assert torch.equal(found, found.half().float())


def test_zero_points_are_never_zero() -> None:
    """Readers disagree about a zero-point of 0; all-positive weights would ask for it."""
    W, H = problem(16, 32)
    W = torch.cat([W.abs(), -W.abs(), W * 0])
    for settings in (Settings(4, 8, symmetric=False), Settings(2, 32, symmetric=False, effort="fast")):
        result = one(W, H, settings)
        assert int(result.zeros.min()) >= 1
        assert int(result.zeros.max()) <= 2**settings.bits - 1
        assert torch.equal(result.weights()[32:], torch.zeros(16, 32))
        assert result.error < plain_error(W, H, settings)


@pytest.mark.parametrize(
    ("desc_act", "order"), [(False, "group"), (False, "natural"), (False, "activation"), (True, "group")]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_effort_is_a_smaller_error(desc_act: bool, order: Order, symmetric: bool) -> None:
    W, H = problem(96, 128)
    efforts: tuple[Effort, ...] = ("fast", "default", "high")
    results = [one(W, H, Settings(3, 32, symmetric, desc_act, order, effort)) for effort in efforts]
    fast, default, high = results
    assert (
        plain_error(W, H, Settings(3, 32, symmetric))
        > 1.3 * fast.error
        > 1.3 * default.error
        > 1.3 * high.error
    )
    for result in results:
        assert int(result.codes.max()) <= 7
        lost = float(loss(W, result.weights(), H).double().sum())
        energy = float(loss(W, torch.zeros_like(W), H).double().sum())
        assert lost / energy == pytest.approx(result.error, rel=1e-4)


def test_desc_act_counts_groups_along_the_diagonal() -> None:
    W, H = problem(8, 40)
    result = one(W, H, Settings(4, 16, desc_act=True))
    by_size = torch.argsort(H.diagonal(), descending=True, stable=True)
    assert result.g_idx[by_size].tolist() == [i // 16 for i in range(40)]
    assert one(W, H, Settings(4, 16)).g_idx.tolist() == [i // 16 for i in range(40)]
    assert result.scales.shape == (8, 3)
    assert one(W, H, Settings(4, 0)).scales.shape == (8, 1)


def test_shapes_dtypes_and_repetition() -> None:
    W, H = problem(70, 48)
    weights = {"q": W, "k": W[:3].bfloat16()}
    first, again = (quantize_linears(weights, H, Settings(4, 16)) for _ in range(2))
    for name, N in (("q", 70), ("k", 3)):
        result = first[name]
        assert (result.codes.dtype, result.codes.shape) == (torch.uint8, (N, 48))
        assert (result.scales.dtype, result.zeros.dtype) == (torch.float16, torch.uint8)
        assert result.g_idx.dtype == torch.int32
        assert torch.equal(result.codes, again[name].codes)
        assert torch.equal(result.scales, again[name].scales)
        assert result.error == again[name].error
    alone = one(W[:3].bfloat16(), H, Settings(4, 16))
    assert torch.equal(alone.codes, first["k"].codes)


def test_searched_scales_beat_those_of_the_range() -> None:
    W, H = problem(128, 64)
    group = group_index(64, 16)
    plain = affine_grid(*plain_scales(W, group, 3, True), group, 3)
    searched = affine_grid(*search_scales(W, H, group, 3, True), group, 3)
    losses = [float(loss(W, grid.values(grid.nearest(W)), H).sum()) for grid in (plain, searched)]
    assert losses[1] < losses[0]


def test_groups_that_are_scattered_are_refused_by_the_walk() -> None:
    W, H = problem(4, 32)
    with pytest.raises(ValueError, match="lie together"):
        round_searched(W, prepare(H, order="activation"), group_index(32, 8), 4, True)


def test_every_wrong_setting_is_named_at_once() -> None:
    W, H = problem(4, 8)
    settings = Settings(bits=5, group_size=-1, effort="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fast, default, high") as caught:
        quantize_linears({"a": W[:, :4], "b": W / 0}, H, settings)
    assert len(caught.value.reasons) == 5


def test_a_raised_damping_is_in_the_log() -> None:
    _, H = problem(4, 24)
    H[3], H[:, 3] = H[5], H[:, 5]
    H[3, 3] = H[5, 5] * (1 - 1e-3)
    assert any("damping" in line for line in prepare_input(H, Settings(4, 8, damp=0.0)).factor.log)


def test_the_shifted_target_is_the_ridge_solution() -> None:
    """Against least squares on the inputs themselves."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    seen = x + 0.3 * torch.randn(400, 12, generator=generator) + 0.1 * x.roll(1, 1)
    W = torch.randn(5, 12, generator=generator)
    H, C = seen.T @ seen / 400, seen.T @ x / 400
    exact = torch.linalg.lstsq(seen.double(), (x @ W.T).double()).solution.T.float()
    full = shifted_target(W, H, C, alpha=1.0, damp=0.0)
    torch.testing.assert_close(full, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shifted_target(W, H, C, 0.5, 0.0), (W + exact) / 2, rtol=1e-3, atol=1e-3)
    assert torch.equal(shifted_target(W, H, C, 0.0), W)
    torch.testing.assert_close(shifted_target(W, H, H, 1.0), W)
    ridge = 0.1 * float(H.diagonal().mean())
    rows = torch.cat([seen, (400 * ridge) ** 0.5 * torch.eye(12)])
    wanted = torch.cat([x @ W.T, (400 * ridge) ** 0.5 * W.T])
    pulled = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(shifted_target(W, H, C, 1.0, 0.1), pulled, rtol=1e-3, atol=1e-3)


def test_the_shifted_target_leaves_dead_columns_and_refuses_nonsense() -> None:
    W, H = problem(4, 8)
    H[2], H[:, 2] = 0.0, 0.0
    C = H * 0.9
    assert torch.equal(shifted_target(W, H, C)[:, 2], W[:, 2])
    with pytest.raises(UsageError, match="alpha"):
        shifted_target(W, H, C, alpha=1.5)
    with pytest.raises(HessianError, match="damping"):
        shifted_target(W, H - 5 * torch.ones(8, 8), C)


@pytest.mark.parametrize("signed", [False, True])
def test_least_loss_over_all_scales_and_codes_is_not_beaten(signed: bool) -> None:
    """Three columns, 2 bits, every code and the best real scale for it: a bound for any grid of one group."""
    W, H = problem(60, 3, seed=7)
    result = one(W, H, Settings(2, 3, effort="high", damp=0.0, signed_scales=signed))
    bound = torch.full((60,), float("inf"))
    for codes in itertools.product(range(4), repeat=3):
        shape = torch.tensor(codes, dtype=torch.float32) - 2
        curvature = float(shape @ H @ shape)
        slope = W @ H @ shape if signed else (W @ H @ shape).clamp(min=0)
        gain = slope.square() / curvature if curvature else torch.zeros(60)
        bound = torch.minimum(bound, loss(W, torch.zeros_like(W), H) - gain)
    reached = loss(W, result.weights(), H)
    assert bool((reached >= bound - 1e-3 * loss(W, torch.zeros_like(W), H)).all())
    assert float(reached.mean()) < 1.5 * float(bound.mean())


@pytest.mark.parametrize("order", ["group", "activation"])
def test_signed_scales_put_the_odd_level_where_it_is_needed(order: Order) -> None:
    W, H = problem(96, 64, seed=8)
    plain, signed = (one(W, H, Settings(3, 16, order=order, signed_scales=on)) for on in (False, True))
    assert bool((plain.scales > 0).all())
    negative = float((signed.scales < 0).float().mean())
    assert 0.2 < negative < 0.8
    assert signed.error < 0.95 * plain.error
    lost = float(loss(W, signed.weights(), H).sum() / loss(W, torch.zeros_like(W), H).sum())
    assert lost == pytest.approx(signed.error, rel=1e-4)
