"""Adapters: the merged weights are PEFT's own, and whatever cannot be merged is refused with all reasons."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.adapter import read_adapter
from converters.checkpoint import open_checkpoint
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING, HEAD

MakeCheckpoint = Callable[..., Path]
ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = [*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model: Any, seed: int = 1) -> None:
    """Give every trainable tensor values; PEFT starts B at zero, which would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_((0.05 * noise).to(parameter.dtype))


def dtype_of(folder: Path) -> torch.dtype:
    """The dtype of the stored weights; the small checkpoints' config always says bfloat16."""
    dtype: torch.dtype = load_file(folder / "model.safetensors")[HEAD].dtype
    return dtype


def train_with_peft(base: Path, folder: Path, **settings: Any) -> None:
    """Save an adapter with random weights, as PEFT writes it."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype_of(base))
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        randomise(model)
        model.save_pretrained(folder)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype_of(base))
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION},
    "all linear": {"r": 8, "lora_alpha": 8, "target_modules": ALL_LINEAR, "lora_dropout": 0.1},
    "rank-stabilised": {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 6},
        "alpha_pattern": {r"layers\.0\..*_proj": 32, "down_proj": 3},
    },
    "one layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "saved modules": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_merged_weights_are_bit_for_bit_those_of_peft(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    base, adapter = make_checkpoint("base", dtype), tmp_path / "my-adapter"
    train_with_peft(base, adapter, **settings)
    expected = merged_by_peft(base, adapter)
    checkpoint = open_checkpoint(base, lora=adapter)
    plain = open_checkpoint(base).weights
    changed = 0
    for name in checkpoint.weights.specs():
        loaded = checkpoint.weights.load(name)
        assert loaded.dtype == checkpoint.weights.specs()[name].dtype == dtype
        assert torch.equal(loaded, expected[name]), name
        changed += not torch.equal(loaded, plain.load(name))
    assert changed > 0
    assert checkpoint.provenance.adapter == "my-adapter"


def test_an_updated_embedding_is_that_of_peft(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In f32 bit for bit; PEFT rounds the embedding's update before the sum, so bf16 may differ by a step."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}
    base, adapter = make_checkpoint("base", torch.float32), tmp_path / "adapter"
    train_with_peft(base, adapter, **settings)
    assert any(".base_layer." in name for name in load_file(adapter / "adapter_model.safetensors"))
    expected = merged_by_peft(base, adapter)
    weights = open_checkpoint(base, lora=adapter).weights
    for name in weights.specs():
        torch.testing.assert_close(weights.load(name), expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(weights.load(EMBEDDING), open_checkpoint(base).weights.load(EMBEDDING))


def test_an_adapter_in_a_bin_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base, adapter = make_checkpoint("base"), tmp_path / "adapter"
    train_with_peft(base, adapter, **SETTINGS["attention"])
    weights = open_checkpoint(base, lora=adapter).weights
    expected = {name: weights.load(name) for name in weights.specs()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    weights = open_checkpoint(base, lora=adapter).weights
    assert all(torch.equal(weights.load(name), expected[name]) for name in weights.specs())


def test_a_trainers_adapter_folder_is_named_after_its_run(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "my-run" / "checkpoint-30")
    assert read_adapter(adapter).name == "my-run-checkpoint-30"


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def plain_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Write an adapter of rank 2 for the first q_proj of the small checkpoints (64 x 64)."""
    folder.mkdir(parents=True)
    own = {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 64), f"{Q_PROJ}.lora_B.weight": torch.ones(64, 2)}
    save_file(own if tensors is None else tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def reasons_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3'; supported: 'LORA'"),
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"bias": "all"}, "bias: found 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base"),
        ({"lora_alpha": None}, "lora_alpha: found None"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj']: found 'x'"),
        ({"alpha_pattern": {"q_(": 1}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern: found [1]"),
    ],
)
def test_adapters_of_another_kind(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in reasons_of(plain_adapter(tmp_path / "a", **config))


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    tensors = {
        f"{Q_PROJ}.lora_A.weight": torch.ones(2, 64),
        f"{Q_PROJ}.lora_magnitude_vector": torch.ones(64),
    }
    text = reasons_of(plain_adapter(tmp_path / "a", tensors, use_dora=True, bias="lora_only"))
    for words in (
        "use_dora",
        "bias: found 'lora_only'",
        "only one of lora_A and lora_B",
        "lora_magnitude_vector",
    ):
        assert words in text


def test_quantized_adapter_tensors_are_refused(tmp_path: Path) -> None:
    tensors = {f"{Q_PROJ}.lora_{side}.weight": torch.ones(2, 2, dtype=torch.int8) for side in "AB"}
    assert "tensors stored as I8" in reasons_of(plain_adapter(tmp_path / "a", tensors))


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    assert "no adapter_config.json" in reasons_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    assert "looked for adapter_model.safetensors and adapter_model.bin" in reasons_of(tmp_path)


def refused_with(base: Path, adapter: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base, lora=adapter)
    return caught.value.reasons


def test_an_update_of_something_the_base_does_not_have(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = "base_model.model.model.layers.7.self_attn.q_proj"
    tensors = {f"{other}.lora_A.weight": torch.ones(2, 64), f"{other}.lora_B.weight": torch.ones(64, 2)}
    (reason,) = refused_with(make_checkpoint(), plain_adapter(tmp_path / "a", tensors))
    assert reason == (
        "the adapter changes model.layers.7.self_attn.q_proj.weight, which the model does not have"
    )


@pytest.mark.parametrize(("rows", "rank_of_b", "columns"), [(65, 2, 64), (64, 3, 64), (64, 2, 63)])
def test_an_update_of_another_shape(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, rows: int, rank_of_b: int, columns: int
) -> None:
    pair = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(rows, rank_of_b)}
    adapter = plain_adapter(tmp_path / "a", {f"{Q_PROJ}.{name}": t for name, t in pair.items()})
    (reason,) = refused_with(make_checkpoint(), adapter)
    assert "the adapter's update of model.layers.0.self_attn.q_proj.weight is" in reason


def test_an_adapter_with_an_enlarged_vocabulary(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{name}": torch.ones(2310, 64) for name in (EMBEDDING, HEAD)}
    reasons = refused_with(make_checkpoint(), plain_adapter(tmp_path / "a", tensors))
    assert [reason.split(" is ")[0] for reason in reasons] == [
        f"the adapter's {n}" for n in (HEAD, EMBEDDING)
    ]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_the_embedding_of_a_tied_model_is_not_to_be_touched(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    base = make_checkpoint(tie_word_embeddings=True)
    adapter = plain_adapter(tmp_path / "a", {f"base_model.model.{name}": torch.ones(2304, 64)})
    assert any("in which they are one tensor" in reason for reason in refused_with(base, adapter))


def test_reasons_of_base_and_adapter_come_together(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = make_checkpoint(architectures=["LlamaForCausalLM"])
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base, lora=plain_adapter(tmp_path / "a", use_dora=True))
    assert "use_dora" in str(caught.value)
    assert "tokenizer.json" in str(caught.value)
