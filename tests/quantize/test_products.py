"""Products against f64, by both libraries."""

import pytest
import torch

from quantize import products

SHAPES = [(1, 1, 1), (3, 5, 7), (130, 129, 257), (64, 1000, 48)]


@pytest.fixture(params=["oneDNN", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every product, however small, go through one library."""
    name: str = request.param
    monkeypatch.setattr(products, "_WORTH_IT", 0 if name == "oneDNN" else 1 << 60)
    return name


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_a_product_is_exact_to_f32(library: str, n: int, k: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
    exact = x.double() @ weight.double().T
    assert (products.linear(x, weight) - exact).norm() <= 1e-6 * exact.norm()


def test_leading_dimensions_are_kept(library: str) -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(8, 40)
    torch.testing.assert_close(products.linear(x, weight), x @ weight.T)


def test_products_can_be_made_in_inference_mode(library: str) -> None:
    with torch.inference_mode():
        assert products.linear(torch.randn(70, 300), torch.randn(20, 300)).shape == (70, 20)


def test_onednn_is_for_cpus() -> None:
    assert not products.has_onednn(torch.device("cuda"))
