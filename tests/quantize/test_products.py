"""Products in f32 against f64, and where there are no tokens."""

import pytest
import torch

from quantize.products import add_columns_product_, linear


@pytest.mark.parametrize("n_tokens", [1, 7, 300])
def test_products_are_those_of_f64_to_the_precision_of_f32(n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (
        torch.randn(n_tokens, 200, generator=generator),
        torch.randn(90, 200, generator=generator),
    )
    wanted = inputs.double() @ weight.double().T
    # bf16 or TF32 anywhere inside would be a thousand times further off.
    assert (linear(inputs, weight).double() - wanted).norm() < 1e-6 * wanted.norm()
    # Views, as heads and panels are.
    assert torch.allclose(
        linear(inputs[:, :50], weight[:, :50]), inputs[:, :50] @ weight[:, :50].T, atol=1e-4
    )


def test_no_tokens_have_an_empty_product() -> None:
    assert linear(torch.empty(0, 5), torch.ones(3, 5)).shape == (0, 3)


def test_columns_are_added_from_the_first_on() -> None:
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    total = torch.ones(3, 8)
    add_columns_product_(total, inputs.T.contiguous(), 4)
    assert torch.allclose(total, 1 + (inputs.T @ inputs)[4:7, 4:], atol=1e-4)
