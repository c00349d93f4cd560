"""Names both ways against gguf's own table, and the permutation against its definition."""

import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map

from converters.names import gguf_name, hf_name, is_rotary, permute, unpermute
from quantize.llama import LlamaConfig, block_tensor

CONFIG = LlamaConfig(64, 96, 3, 4, 2, 16, 100, 512, 1e-6, 1e5)


def test_names_are_those_of_ggufs_table() -> None:
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, CONFIG.n_layers)
    for name in CONFIG.tensor_shapes():
        assert gguf_name(name) == table.get_name(name, try_suffixes=(".weight",))
        assert hf_name(gguf_name(name)) == name


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "rope_freqs.weight", ""])
def test_a_foreign_name_is_a_key_error(name: str) -> None:
    with pytest.raises(KeyError):
        gguf_name(name)
    with pytest.raises(KeyError):
        hf_name(name)


def test_only_q_and_k_are_rotary() -> None:
    rotary = [name for name in CONFIG.block_shapes() if is_rotary(block_tensor(11, name))]
    assert rotary == ["self_attn.q_proj", "self_attn.k_proj"]


@pytest.mark.parametrize("n_heads", [1, 2, 7], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize("head_dim", [2, 8, 128])
def test_permutation_follows_its_definition(n_heads: int, head_dim: int) -> None:
    old = torch.arange(n_heads * head_dim * 3).reshape(-1, 3)
    expected = torch.empty_like(old)
    half = head_dim // 2
    for head in range(n_heads):
        for i in range(half):
            for j in (0, 1):
                expected[head * head_dim + 2 * i + j] = old[head * head_dim + j * half + i]
    assert torch.equal(permute(old, head_dim), expected)
    assert torch.equal(unpermute(expected, head_dim), old)


def test_whole_heads_may_be_permuted_one_by_one() -> None:
    rows = torch.randn(4 * 16, 5)
    pieces = torch.cat([permute(rows[i : i + 16], 16) for i in range(0, 64, 16)])
    assert torch.equal(permute(rows, 16), pieces)
