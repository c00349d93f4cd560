"""IQ2 and IQ3 under compensation: against enumerated points, and a plain statement of the walk."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from quantize.codecs import codec, grids
from quantize.codecs.fields import FieldCodec
from quantize.solver import point_kernels
from quantize.solver.block_factor import BlockFactor, PointFactor, prepare_blocks
from quantize.solver.blocks import encode_compensated
from quantize.solver.descend import loss
from quantize.solver.points import POINT_SHAPES, PointPart, book, solve_points
from tests.quantize.test_solver_blocks import problem

TYPES = tuple(POINT_SHAPES)
Case = tuple[torch.Tensor, torch.Tensor, BlockFactor]


@pytest.fixture(scope="module")
def case() -> Case:
    """70 rows of one super-block."""
    W, H = problem(70, 256, seed=5)
    return W, H, prepare_blocks(H)


def solved(name: str, case: Case, tries: int = 1) -> PointPart:
    """Return the case's super-block as the walk leaves it."""
    W, _, factor = case
    kind = codec(name)
    assert isinstance(kind, FieldCodec)
    return solve_points(kind, W, factor.importance, factor.steps[0], tries)


def group(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a Hessian (n, n), targets (n, 64) of a group, in units of the scale, and their signs."""
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((3 * n, n))
    goal = generator.standard_normal((n, 64))
    return (X.T @ X / n).astype(np.float32), goal, np.where(goal < 0, -1, 1).astype(np.float32)


def diagonal_of(blocks: torch.Tensor) -> torch.Tensor:
    """Return the matrix with blocks (G, n, n) on its diagonal."""
    count, n, _ = blocks.shape
    return (torch.eye(count)[:, None, :, None] * blocks[:, :, None, :]).reshape(count * n, count * n)


def costs(A: np.ndarray, miss: np.ndarray) -> np.ndarray:
    """Return miss A miss, in f64, of misses (..., n, 64)."""
    found: np.ndarray = np.einsum("...il,ij,...jl->...l", miss, A.astype(np.float64), miss)
    return found


@pytest.mark.parametrize("name", TYPES)
def test_a_book_has_every_point_by_its_halves(name: str) -> None:
    pages, points = book(name), grids.values(name)
    assert set(pages.number.astype(int)) == set(range(len(points)))
    assert (pages.first % 4 == 0).all()
    fronts = np.repeat(np.arange(len(pages.halves)), np.diff(pages.first))
    halves = pages.values[pages.halves]
    made = np.concatenate([halves[fronts], halves[pages.second]], axis=1)
    assert np.array_equal(made, points[pages.number.astype(int)])
    assert np.array_equal(halves[pages.second], pages.tails)


@pytest.mark.parametrize("name", TYPES)
def test_the_place_is_the_best_of_all_points(name: str) -> None:
    points = grids.values(name)
    A, goal, signs = group(points.shape[1])
    goal *= points.max() / 2
    h = (A @ goal).astype(np.float32)
    values, pages = np.empty_like(h), book(name)
    chosen = point_kernels.place(A, signs, h, pages, point_kernels.make_room(pages), values).astype(int)
    assert np.array_equal(values, points[chosen].T * signs)
    every = costs(A, goal - points[:, :, None] * signs)
    least, found = every.min(0), every[chosen, np.arange(64)]
    np.testing.assert_allclose(found, least, rtol=1e-3, atol=1e-4 * costs(A, goal).max())
    assert (chosen == every.argmin(0)).mean() > 0.98


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("n", [4, 8])
def test_signs_turn_where_that_loses_less(n: int, parity: bool) -> None:
    A, goal, signs = group(n, seed=1)
    values = (signs * np.random.default_rng(2).uniform(0.2, 2, (n, 64))).astype(np.float32)
    before, found, turned = costs(A, goal - values), values.copy(), signs.copy()
    room = np.empty((n + 3, 64), np.float32)
    point_kernels.flip(A, (A @ goal).astype(np.float32), parity, turned, found, room)
    after = costs(A, goal - found)
    assert np.array_equal(np.sign(found), turned)
    assert np.array_equal(abs(found), abs(values))
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < 0.99 * before).any()
    if parity:
        pairs = [(i, k) for i in range(n) for k in range(i)]
        turns = np.ones((len(pairs) + 1, n, 1))
        for at, pair in enumerate(pairs):
            turns[at, pair] = -1
        best = costs(A, goal - turns * values).min(0)
        np.testing.assert_allclose(after, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sub", "n"), [(16, 8), (32, 8), (32, 4)])
def test_the_factor_is_the_hessian(sub: int, n: int, case: Case) -> None:
    step = case[2].steps[0]
    factor = step.by_points(sub, n)
    M, D = factor.feedback.T, diagonal_of(factor.conditional)
    expected = step.hessian[factor.order][:, factor.order]
    torch.testing.assert_close(M @ D @ M.T, expected, rtol=1e-4, atol=1e-5)
    for k in range(0, 256, n):
        torch.testing.assert_close(M[k : k + n, k : k + n], torch.eye(n), rtol=0, atol=1e-5)
        assert not M[k + n :, k : k + n].any()
    octets = factor.order.reshape(-1, 8)
    assert bool((octets == octets[:, :1] + torch.arange(8)).all())
    assert bool((factor.order.reshape(-1, sub) // sub == factor.order[::sub, None] // sub).all())
    assert step.by_points(sub, n) is factor


def walk(name: str, case: Case, start: PointPart) -> Iterator[tuple[int, np.ndarray]]:
    """State the walk in f64 and plainly; yield each group's first column, and its weights of a row.

    `start` has d and the integers. Only for the types of eight weights a point.
    """
    factor: PointFactor = case[2].steps[0].by_points(start.shape.sub, 8)
    feedback, conditional = factor.feedback.double().numpy(), factor.conditional.double().numpy()
    points, weights = grids.values(name).astype(np.float64), case[0].double().numpy()
    scales = (start.d[:, None] * start.shape.unit * (1 + 2 * start.steps)).double().numpy()
    for row in range(len(weights)):
        errors = np.zeros(256)
        for k in range(0, 256, 8):
            columns, A = factor.order[k : k + 8].numpy(), conditional[k // 8]
            goal = weights[row, columns] + feedback[k : k + 8, :k] @ errors[:k]
            signs = np.where(goal < 0, -1.0, 1.0)
            if start.shape.parity and signs.prod() < 0:
                signs[np.argmin(A.diagonal() * goal**2)] *= -1
            scale = scales[row, columns[0] // start.shape.sub]
            found = best_point(A, goal, signs * points, scale, start.shape.parity)
            errors[k : k + 8] = weights[row, columns] - found
            yield columns[0], found


def best_point(A: np.ndarray, goal: np.ndarray, points: np.ndarray, scale: float, parity: bool) -> np.ndarray:
    """Return the best of the points times the scale, signs turned where that loses less."""
    misses = goal - scale * points
    found = scale * points[np.einsum("pi,ij,pj->p", misses, A, misses).argmin()]

    def lost(turn: np.ndarray) -> float:
        return float((goal - turn * found) @ A @ (goal - turn * found))

    best = np.ones(8)
    for i in range(8):
        for k in range(i) if parity else [i]:
            turn = np.ones(8) if parity else best.copy()
            turn[[i, k]] *= -1
            best = turn if lost(turn) < lost(best) else best
    turned: np.ndarray = found * best
    return turned


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_the_walk_is_its_plain_statement(name: str, case: Case) -> None:
    few = case[0][:6].contiguous(), case[1], case[2]
    part = solved(name, few)
    values, expected = part.values().numpy(), np.empty((6, 256))
    for at, (column, found) in enumerate(walk(name, few, part)):
        expected[at // 32, column : column + 8] = found
    same = np.isclose(values, expected, rtol=1e-4, atol=1e-6).mean()
    assert same > 0.97  # after a near-tie that falls to the other side, a row goes another way
    mine, theirs = (loss(few[0], torch.tensor(v).float(), few[1]).sum() for v in (values, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", TYPES)
def test_an_octet_alone_is_near_the_best_of_all_points_and_signs(name: str) -> None:
    """Octets that have nothing to do with each other, each with all points and signs enumerated."""
    W, _ = problem(8, 256, seed=6)
    A = torch.from_numpy(group(8, seed=3)[0])
    H = diagonal_of(A.expand(32, 8, 8))
    factor = prepare_blocks(H, damp=0.0)
    kind, points = codec(name), torch.from_numpy(grids.values(name))
    assert isinstance(kind, FieldCodec)
    part = solve_points(kind, W, factor.importance, factor.steps[0], 1)
    scale = part.d * part.shape.unit * (1 + 2 * part.steps[:, 0])
    goal = W[:, :8] / scale[:, None]
    signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1)
    if part.shape.parity:
        signs = signs[signs.prod(1) > 0]
    best = torch.stack([least(A, row, points, signs.float()) for row in goal]) * scale**2
    first = loss(W[:, :8], part.values()[:, :8], A)
    assert bool((first >= best * (1 - 1e-4)).all())
    assert float(first.sum()) < 1.35 * float(best.sum())


def least(A: torch.Tensor, goal: torch.Tensor, points: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the least loss of an octet (8,) over signs (T, 8) and all points, or pairs of points."""
    n = points.shape[1]
    gradient = A @ goal
    halves = []
    for start in range(0, 8, n):
        signed = signs[:, None, start : start + n] * points
        inside = A[start : start + n, start : start + n]
        halves.append(((signed @ inside * signed).sum(2) - 2 * signed @ gradient[start : start + n], signed))
    if n == 8:
        return halves[0][0].amin() + goal @ gradient
    (cost, one), (other_cost, other) = halves
    cross = 2 * torch.einsum("spi,ij->spj", one, A[:4, 4:])
    found = [
        (c[:, None] + o[None] + x @ q.T).amin()
        for c, o, x, q in zip(cost, other_cost, cross, other, strict=True)
    ]
    return torch.stack(found).amin() + goal @ gradient


@pytest.mark.parametrize("name", TYPES)
def test_improving_never_raises_the_loss(name: str, case: Case) -> None:
    W, _, factor = case
    H, part = factor.steps[0].hessian, solved(name, case)
    first = before = loss(W, part.values(), H)
    for _ in range(3):
        part.improve((W - part.values()) @ H, H, 1)
        after = loss(W, part.values(), H)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert float(before.sum()) < 0.95 * float(first.sum())
    assert torch.equal(part.kind.decode(part.blocks(), 256), part.values())


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ3_S"])
def test_what_is_added_to_the_weights_is_what_is_reported(name: str, case: Case) -> None:
    """Two rounds go on from the first's moves: the same as two calls, each with its own gradient."""
    W, _, factor = case
    H, once, twice = factor.steps[0].hessian, solved(name, case), solved(name, case)
    twice.improve((W - twice.values()) @ H, H, 2)
    for _ in range(2):
        once.improve((W - once.values()) @ H, H, 1)
    assert float((once.values() != twice.values()).float().mean()) < 0.01  # near-ties: other sums


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S"])
def test_d_is_refitted_to_the_best_half(name: str, case: Case) -> None:
    W, _, factor = case
    H, part = factor.steps[0].hessian, solved(name, case)
    part.d = (part.d * 1.1).half().float()
    values, before = part.values(), loss(W, part.values(), H)
    shift = part.refit((W - values) @ H, H)
    torch.testing.assert_close(shift, (part.values() - values) @ H, rtol=1e-3, atol=1e-6)
    after, halves = loss(W, part.values(), H), part.d.half()
    assert bool((after < before).all())
    for toward in (torch.inf, -torch.inf):
        beside = torch.nextafter(halves, torch.full_like(halves, toward)).float()
        other = part.values() * (beside / part.d)[:, None]
        assert bool((loss(W, other, H) >= after * (1 - 1e-4)).all())


@pytest.mark.parametrize("name", TYPES)
def test_scales_beside_lose_less(name: str, case: Case) -> None:
    W, _, factor = case
    H = factor.steps[0].hessian
    few, many = (float(loss(W, solved(name, case, tries).values(), H).sum()) for tries in (1, 5))
    assert many < 0.98 * few
    assert torch.equal(solved(name, case, 5).steps.clamp(0, 15), solved(name, case, 5).steps)


@pytest.mark.parametrize("name", [name for name, shape in POINT_SHAPES.items() if shape.parity])
def test_signs_stay_even_in_number(name: str, case: Case) -> None:
    W, _, factor = case
    part = solved(name, case, 3)
    part.improve((W - part.values()) @ factor.steps[0].hessian, factor.steps[0].hessian, 2)
    ones = np.unpackbits(part.signs.numpy().reshape(-1, 1), axis=1).sum(1)
    assert (ones % 2 == 0).all()
    assert len(set(ones.tolist())) == 5
    kept = part.kind.unpack(part.blocks()).signs
    assert torch.equal(kept.reshape(-1), part.signs.reshape(-1))


def test_weights_as_large_as_a_half_allows_stay_finite() -> None:
    W, H = problem(4, 256)
    for name in TYPES:
        data = encode_compensated(codec(name), W * 1e7, prepare_blocks(H))
        assert bool(torch.isfinite(codec(name).decode(data, 256)).all())
