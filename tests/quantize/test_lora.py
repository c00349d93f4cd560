"""The LoRA sum: by hand in f64, rounded once, on every dtype."""

import math

import pytest
import torch

from quantize.lora import merge, scaling


def matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((12, 20), (4, 20), (12, 4))
    W, A, B = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return W, A, B


def test_scaling() -> None:
    assert scaling(8, 16, rank_stabilised=False) == 2.0
    assert scaling(16, 16, rank_stabilised=True) == 4.0
    assert scaling(8, 16, rank_stabilised=True) == 16 / math.sqrt(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    W, A, B = matrices(dtype)
    exact = W.double() + 0.37 * (B.double() @ A.double())
    merged = merge(W, A, B, 0.37)
    assert merged.dtype == dtype
    # One rounding of the stored dtype, beside a few of f32 in the sum itself.
    unit = torch.finfo(dtype).eps / 2
    allowed = exact.abs() * unit + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert bool(((merged.double() - exact).abs() <= allowed).all())


def test_an_update_below_the_base_dtypes_step_is_not_lost_in_the_sum() -> None:
    """In bf16 1 + 2^-9 + 2^-9 is 1 if each term is added by itself, and 1 + 2^-7 is the next number."""
    W = torch.ones(1, 1, dtype=torch.bfloat16)
    A, B = torch.tensor([[1.0], [1.0], [1.0]]), torch.full((1, 3), 2**-9)
    assert float(merge(W, A, B, 1.0)) == 1 + 2**-7


def test_an_untrained_adapter_changes_nothing() -> None:
    W, A, B = matrices(torch.bfloat16)
    assert torch.equal(merge(W, A, torch.zeros_like(B), 2.0), W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_not_written_to(dtype: torch.dtype) -> None:
    W, A, B = matrices(dtype)
    before = W.clone()
    assert not torch.equal(merge(W, A, B, 1.0), before)
    assert torch.equal(W, before)
