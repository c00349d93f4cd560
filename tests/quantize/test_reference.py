"""The reference forward against transformers' LlamaForCausalLM, which is written by others."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM

from quantize.llama import LlamaConfig
from quantize.reference import MLP_TOKENS, ReferenceModel
from quantize.weights import TensorSpec, TensorWeights

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 8,
    "vocab_size": 61,
    "context_length": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100000.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"n_kv_heads": 2},
    "multi-query": {"n_kv_heads": 1},
    "rope factor 4": {"rope_factor": 4.0},
    "tied head": {"tied_head": True},
    "own head_dim": {"head_dim": 16, "n_kv_heads": 2},
    "large eps, other theta": {"rms_norm_eps": 1e-2, "rope_theta": 500.0},
}


def other_implementation(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' model of the same shape: random weights, far from zero, stored in `dtype`."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        HuggingFaceConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied_head,
            initializer_range=0.3,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.to(dtype).float()
    return model.eval()


def weights_of(model: LlamaForCausalLM, config: LlamaConfig, dtype: torch.dtype) -> TensorWeights:
    state = model.state_dict()
    return TensorWeights({name: state[name].to(dtype) for name in config.tensor_shapes()})


def random_rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, BASE["vocab_size"], (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(**(BASE | VARIANTS[variant]))
    judge = other_implementation(config, dtype)
    model = ReferenceModel(config, weights_of(judge, config, dtype))
    rows = random_rows(40, 1, 17)
    for row, hidden in zip(rows, model.hidden(rows), strict=True):
        with torch.inference_mode():
            wanted = judge(row[None]).logits[0]
        assert wanted.abs().max() > 1  # the comparison below must have something to compare
        assert (model.logits(hidden) - wanted).abs().max() < 1e-4


def test_long_rows_keep_their_positions() -> None:
    config = LlamaConfig(**(BASE | {"rope_factor": 4.0, "n_kv_heads": 2}))
    judge = other_implementation(config, torch.float32)
    model = ReferenceModel(config, weights_of(judge, config, torch.float32))
    row = random_rows(4200)[0]
    assert len(row) > 4 * MLP_TOKENS
    with torch.inference_mode():
        wanted = judge(row[None]).logits[0, 4096:]
    assert (model.logits(model.hidden([row])[0][4096:]) - wanted).abs().max() < 1e-4


def test_a_lost_rope_factor_changes_the_logits() -> None:
    config = LlamaConfig(**(BASE | {"rope_factor": 4.0}))
    weights = weights_of(other_implementation(config, torch.float32), config, torch.float32)
    lost = LlamaConfig(**BASE)
    row = random_rows(64)[0]
    right, wrong = (ReferenceModel(c, weights).hidden([row])[0] for c in (config, lost))
    assert (right - wrong).abs().max() > 0.1


def test_rows_do_not_see_each_other_and_blocks_are_reported() -> None:
    config = LlamaConfig(**BASE)
    weights = weights_of(other_implementation(config, torch.float32), config, torch.float32)
    rows = random_rows(9, 30)
    done: list[tuple[int, int]] = []
    together = ReferenceModel(config, weights).hidden(rows, on_block=lambda n, total: done.append((n, total)))
    alone = ReferenceModel(config, weights).hidden(rows[1:])
    assert torch.equal(together[1], alone[0])
    assert done == [(1, 2), (2, 2)]


def test_one_block_is_loaded_at_a_time() -> None:
    config = LlamaConfig(**BASE)
    source = weights_of(other_implementation(config, torch.float32), config, torch.float32)
    loaded: list[str] = []

    class Recorded:
        def specs(self) -> Mapping[str, TensorSpec]:
            return source.specs()

        def load(self, name: str) -> torch.Tensor:
            loaded.append(name)
            return source.load(name)

    model = ReferenceModel(config, Recorded())
    seen: list[int] = []
    hidden = model.hidden(random_rows(3, 4), on_block=lambda done, total: seen.append(len(loaded)))
    assert seen == [1 + 9, 1 + 18]
    assert len(loaded) == len(set(loaded)) == 1 + 18 + 1
    model.logits(hidden[0])
    model.logits(hidden[1])
    assert loaded.count("lm_head.weight") == 1
    model.drop_head()
    model.logits(hidden[1])
    assert loaded.count("lm_head.weight") == 2


def test_the_process_keeps_its_matmul_precision() -> None:
    config = LlamaConfig(**BASE)
    model = ReferenceModel(
        config, weights_of(other_implementation(config, torch.float32), config, torch.float32)
    )
    torch.set_float32_matmul_precision("high")
    try:
        model.logits(model.hidden(random_rows(2))[0])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
