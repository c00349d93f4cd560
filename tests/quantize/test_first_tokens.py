"""The first tokens' inputs are those of the reference forward, and get their share of H."""

import pytest
import torch

from quantize.first_tokens import first_tokens
from quantize.llama import LlamaConfig
from quantize.reference import INPUTS, ReferenceModel, full_f32
from quantize.weights import TensorWeights

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    context_length=64,
    rms_norm_eps=1e-6,
    rope_theta=100000.0,
    rope_factor=4.0,
)


def weights() -> TensorWeights:
    generator = torch.Generator().manual_seed(0)
    shapes = CONFIG.tensor_shapes().items()
    return TensorWeights({name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes})


def test_inputs_are_those_of_rows_in_the_reference_forward() -> None:
    model = ReferenceModel(CONFIG, weights())
    rows = [torch.tensor([5, 1, 2, 3]), torch.tensor([7, 7]), torch.tensor([5, 9, 9])]
    blocks: list[tuple[int, int]] = []
    ids = [int(row[0]) for row in rows]
    found = first_tokens(CONFIG, weights(), ids, lambda *done: blocks.append(done))
    assert blocks == [(1, 2), (2, 2)]
    assert found.counts.tolist() == [2, 1]
    states = list(model.embed(rows))
    with full_f32(), torch.no_grad():
        for layer in range(CONFIG.n_layers):
            block = model.widen(model.read_block(layer))
            for row, state in enumerate(states):
                seen: dict[str, torch.Tensor] = {}

                def see(name: str, x: torch.Tensor, _: int, seen: dict[str, torch.Tensor] = seen) -> None:
                    seen[name] = x

                states[row] = model.forward_block(block, state, [len(state)], see)
                for name in set(INPUTS.values()):
                    own = found.inputs[layer, name][0 if int(rows[row][0]) == 5 else 1]
                    assert torch.allclose(own, seen[name][0], rtol=1e-4, atol=1e-5)


def test_first_tokens_have_their_share_of_the_mean() -> None:
    found = first_tokens(CONFIG, weights(), [5, 7, 5, 5])
    x = found.inputs[1, "mlp_inner"]
    others = torch.randn(96, 48, generator=torch.Generator().manual_seed(1))
    own = torch.stack([x[0], x[1], x[0], x[0]])
    H = (others.T @ others + own.T @ own) / 100
    strengthened, scale = found.strengthen(H, 1, "mlp_inner", 100, share=0.25)
    # The same as if every first token had been there 21 / 4 times more, in a mean over 100 tokens.
    expected = H + own.T @ own / 4 * (0.25 - 0.04)
    assert torch.allclose(strengthened, expected, rtol=1e-4, atol=1e-6)
    assert scale == pytest.approx(float(H.diagonal().mean() / expected.diagonal().mean()))
    unchanged, one = found.strengthen(H, 1, "mlp_inner", 100, share=0.03)
    assert unchanged is H and one == 1.0
