"""The allocation of bits against exhaustive search, and its promises on models of real size."""

import itertools
import math
import random

import pytest

from quantize import allocate as module
from quantize.allocate import Option, allocate
from quantize.errors import PlanError


def anything(rng: random.Random, matrices: int, most: int) -> list[list[Option]]:
    """Options in any order: some dominated, some off the hull, some twice."""
    return [
        [
            Option(
                rng.randrange(1, 60) * rng.choice((1, 10)), rng.choice((rng.random(), rng.randrange(4) / 4))
            )
            for _ in range(rng.randint(1, most))
        ]
        for _ in range(matrices)
    ]


def least(options: list[list[Option]], budget: int) -> float:
    """The least loss of all choices within the budget."""
    return min(
        math.fsum(option.loss for option in each)
        for each in itertools.product(*options)
        if sum(option.bits for option in each) <= budget
    )


@pytest.mark.parametrize("seed", range(60))
def test_small_allocations_are_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    options = anything(rng, rng.randint(1, 6), 5)
    cheapest = sum(min(option.bits for option in each) for each in options)
    richest = sum(max(option.bits for option in each) for each in options)
    for budget in (cheapest, *(rng.randint(cheapest, richest) for _ in range(6)), richest, 2 * richest):
        result = allocate(options, budget)
        chosen = [each[i] for each, i in zip(options, result.choice, strict=True)]
        assert result.bits == sum(option.bits for option in chosen) <= budget
        assert result.loss == pytest.approx(math.fsum(option.loss for option in chosen))
        assert result.loss == pytest.approx(least(options, budget), rel=1e-12, abs=1e-15)
        assert result.exact
        assert result.bound == result.loss


def model(seed: int, layers: int, noise: float = 0.1) -> list[list[Option]]:
    """Matrices as a model has them: loss falls by four with each bit, sensitivities of several decades."""
    rng = random.Random(seed)
    options = []
    for _, size in itertools.product(range(layers), (4, 1, 1, 4, 11, 11, 11)):
        weights, weight = size * 2**20, 10 ** rng.uniform(-2, 1)
        bpw = sorted(rng.uniform(2.1, 8.2) for _ in range(17))
        options.append(
            [Option(int(b * weights), weight * 4**-b * math.exp(rng.gauss(0, noise))) for b in bpw]
        )
    return options


@pytest.mark.parametrize("bpw", [2.6, 3.5, 4.25, 5.0, 6.5])
def test_a_model_is_allocated_within_half_a_percent_below_the_budget(bpw: float) -> None:
    options = model(1, 30)
    budget = int(bpw * 30 * 43 * 2**20)
    result = allocate(options, budget)
    assert 0.995 * budget < result.bits <= budget
    assert result.bound <= result.loss < result.bound * 1.0005


def test_a_budget_for_the_richest_everywhere_gives_it() -> None:
    options = model(2, 4, noise=0)
    result = allocate(options, 9 * 4 * 43 * 2**20)
    assert result.choice == (16,) * 28
    assert result.exact


def test_bits_that_save_nothing_are_not_spent() -> None:
    options = [[Option(10, 1.0), Option(20, 0.5), Option(30, 0.5), Option(40, 0.7)]]
    assert allocate(options, 100).choice == (1,)


def test_thinned_choices_stay_within_the_budget_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options, budget = model(3, 6), int(4.1 * 6 * 43 * 2**20)
    exact = allocate(options, budget)
    assert exact.exact
    monkeypatch.setattr(module, "MOST", 8)
    thinned = allocate(options, budget)
    assert thinned.bits <= budget
    assert thinned.bound <= exact.loss <= thinned.loss < 1.01 * exact.loss
    assert not thinned.exact


def test_what_cannot_be_shared_out_is_an_error() -> None:
    with pytest.raises(PlanError, match="take 30 bits, the budget is 29"):
        allocate([[Option(10, 1.0)], [Option(20, 1.0), Option(30, 0.5)]], 29)
    with pytest.raises(PlanError, match="matrix 0 has no option") as caught:
        allocate([[], [Option(1, float("nan")), Option(1, float("inf"))]], 29)
    assert len(caught.value.reasons) == 3
    assert allocate([], 0).choice == ()
