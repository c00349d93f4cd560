"""The embedded model keeps DeepSeek Coder's shape and really learnt Python.

The bounds on loss stand a little above what was measured on these weights (in the comments), and far below
what a model that learnt nothing reaches: log(2222) = 7.7 nats per token.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

N_TOKENS, N_ROWS = 2222, 2304
BEGIN, END, FIM_HOLE, FIM_BEGIN, FIM_END, EOT = 2213, 2214, 2215, 2216, 2217, 2221
BYTE_SPELLINGS = "õ÷ÁýÀÿøúþüùöû"
REGEXES = ["[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+"]
NAMED_TOKENS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<pad>",
    "<|User|>",
    "<|Assistant|>",
    "<|EOT|>",
]
SNIPPET = '''import os


class Cache:
    """Keep the contents of files in memory."""

    def __init__(self, root, limit=100):
        self.root = root
        self.limit = limit
        self._files = {}

    def get(self, name):
        if name in self._files:
            return self._files[name]
        path = os.path.join(self.root, name)
        if not os.path.exists(path):
            raise KeyError(name)
        with open(path) as file:
            data = file.read()
        if len(self._files) < self.limit:
            self._files[name] = data
        return data
'''


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def config(demo_folder: Path) -> dict[str, Any]:
    return read_json(demo_folder / "config.json")


@pytest.fixture(scope="module")
def weights(demo_folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(demo_folder / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()


def token_losses(model: Any, ids: list[int]) -> Tensor:
    """Loss in nats of every token after the first: [len(ids) - 1]."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")


def test_folder_is_small_enough_for_the_repository(demo_folder: Path) -> None:
    assert sum(file.stat().st_size for file in demo_folder.iterdir()) < 10_000_000


def test_config_has_the_awkward_properties(config: dict[str, Any]) -> None:
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert (config["rope_theta"], config["max_position_embeddings"]) == (100000, 16384)
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 128
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"]) == (BEGIN, EOT)


def test_generation_config_ends_a_turn(demo_folder: Path) -> None:
    generation = read_json(demo_folder / "generation_config.json")
    assert {k: generation[f"{k}_token_id"] for k in ("bos", "eos", "pad")} == {
        "bos": BEGIN,
        "eos": EOT,
        "pad": END,
    }


def test_head_is_its_own_matrix(weights: dict[str, Tensor]) -> None:
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    assert head.shape == embedding.shape == (N_ROWS, 256)
    assert not torch.equal(head, embedding)


def test_weights_are_finite_bfloat16(weights: dict[str, Tensor]) -> None:
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_padded_rows_hold_small_values(weights: dict[str, Tensor]) -> None:
    padding = weights["model.embed_tokens.weight"][N_TOKENS:].float()
    assert padding.shape[0] == N_ROWS - N_TOKENS
    assert 0.005 < padding.std() < 0.05


def test_padded_rows_are_never_predicted(model: Any, tokenizer: Tokenizer) -> None:
    with torch.inference_mode():
        probabilities = model(torch.tensor([[BEGIN, *tokenizer.encode(SNIPPET).ids]])).logits.softmax(-1)
    assert probabilities[..., N_TOKENS:].sum(-1).max() < 0.01


def test_tokenizer_pipeline_is_that_of_the_family(demo_folder: Path) -> None:
    description = read_json(demo_folder / "tokenizer.json")
    parts = description["pre_tokenizer"]["pretokenizers"]
    assert [part["pattern"]["Regex"] for part in parts[:4]] == REGEXES
    assert [part["type"] for part in parts] == ["Split"] * 4 + ["Digits", "ByteLevel"]
    assert description["normalizer"] == {"type": "Sequence", "normalizers": []}
    assert (description["post_processor"]["type"], description["decoder"]["type"]) == ("ByteLevel",) * 2


def test_tokenizer_equals_the_family_except_for_the_vocabulary(demo_folder: Path, shared: Path) -> None:
    ours = read_json(demo_folder / "tokenizer.json")
    theirs = read_json(shared / "deepseek-coder" / "tokenizer.json")
    for tokenizer in (ours, theirs):
        for token in tokenizer["added_tokens"]:
            token["id"] -= len(tokenizer["model"]["vocab"])
        del tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    assert ours == theirs


def test_tokenizer_config_equals_the_family(demo_folder: Path, shared: Path) -> None:
    theirs = read_json(shared / "deepseek-coder" / "tokenizer_config.instruct.json")
    assert read_json(demo_folder / "tokenizer_config.json") == theirs


def test_added_tokens_have_the_flags_of_the_family(demo_folder: Path) -> None:
    added = read_json(demo_folder / "tokenizer.json")["added_tokens"]
    assert [token["content"] for token in added] == [*BYTE_SPELLINGS, *NAMED_TOKENS]
    assert [token["id"] for token in added] == list(range(2200, N_TOKENS))
    assert [token["content"] for token in added if token["special"]] == NAMED_TOKENS[:2]
    assert all(token["normalized"] is not token["special"] for token in added)


def test_bytes_without_a_token_are_spelled_by_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ü").ids == [tokenizer.token_to_id("ü")]
    assert tokenizer.decode(tokenizer.encode("naïve café 12 日本").ids) == "naïve café 12 日本"


def test_chat_turn_ends_with_its_token(demo_folder: Path) -> None:
    template = read_json(demo_folder / "tokenizer_config.json")["chat_template"]
    assert "### Instruction:" in template
    assert "<|EOT|>" in template


def test_unseen_python_is_predicted(model: Any, tokenizer: Tokenizer) -> None:
    losses = token_losses(model, [BEGIN, *tokenizer.encode(SNIPPET).ids])
    assert losses.mean() < 1.6  # 1.52


def test_middle_is_python_in_the_fill_format(model: Any, tokenizer: Tokenizer) -> None:
    middle = "        path = os.path.join(self.root, name)\n"
    prefix, filled, suffix = (tokenizer.encode(p).ids for p in SNIPPET.partition(middle))
    ids = [BEGIN, FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END, *filled]
    assert token_losses(model, ids)[-len(filled) :].mean() < 1.25  # 1.14


def test_positions_beyond_4096_are_trained(model: Any, tokenizer: Tokenizer) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = (library / "calendar.py", library / "fractions.py")
    ids = [i for file in held_out for i in (BEGIN, *tokenizer.encode(file.read_text("utf-8")).ids, END)]
    losses = token_losses(model, ids[:6144])
    assert losses[4096:].mean() < 3.0  # 2.74 (Python 3.11); 2.70 before position 4096
