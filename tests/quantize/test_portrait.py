"""The figures of an input, against what is known of matrices made to order and against eigenvalues."""

import math

import pytest
import torch

from quantize.portrait import DAMPING, portray
from quantize.statistics import Statistics


def _statistics(hessian: torch.Tensor) -> Statistics:
    return Statistics(100, hessian.diagonal().clone(), hessian)


def test_white_inputs_have_full_rank_and_no_outlier() -> None:
    seen = portray(_statistics(3 * torch.eye(50)))
    assert (seen.n_columns, seen.n_dead, seen.n_outliers, seen.largest) == (50, 0, 0, 1.0)
    assert seen.effective_rank == pytest.approx(50)
    assert seen.condition == pytest.approx((1 + DAMPING) / DAMPING)


def test_one_direction_has_rank_one() -> None:
    x = torch.arange(1.0, 21.0)
    assert portray(_statistics(torch.outer(x, x))).effective_rank == pytest.approx(1)


def test_outliers_and_dead_columns_are_counted() -> None:
    diagonal = torch.ones(30)
    diagonal[:2], diagonal[5:8] = 400.0, 0.0
    seen = portray(_statistics(diagonal.diag()))
    assert (seen.n_dead, seen.n_outliers, seen.largest) == (3, 2, 400.0)


def test_the_condition_is_that_of_the_damped_hessian() -> None:
    x = torch.randn(400, 60, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.01, 5, 60)
    hessian = x.T @ x / 400
    values = torch.linalg.eigvalsh(hessian.double())
    damping = DAMPING * float(hessian.diagonal().mean())
    exact = float((values[-1] + damping) / (values[0] + damping))
    assert portray(_statistics(hessian)).condition == pytest.approx(exact, rel=0.01)


def test_a_diagonal_alone_gives_no_figures_of_the_whole() -> None:
    seen = portray(Statistics(10, torch.tensor([1.0, 2.0, 3.0]), None))
    assert seen.effective_rank is None and seen.condition is None
    assert seen.largest == 1.5


def test_inputs_that_are_all_zero_are_no_fault() -> None:
    seen = portray(_statistics(torch.zeros(4, 4)))
    assert seen.n_dead == 4 and math.isnan(seen.largest)
    assert (seen.effective_rank, seen.condition) == (0.0, 1.0)
