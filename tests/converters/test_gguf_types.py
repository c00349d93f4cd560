"""The types of a whole model: the family's real shapes by llama-quantize's sizes, overrides, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.config import read_config
from converters.imatrix import Importances
from converters.plan import ConvertOptions
from converters.targets.gguf_types import GgufTypes
from quantize.codecs import codec
from quantize.llama import EMBEDDING, HEAD, LlamaConfig, block_tensor
from quantize.recipes import RECIPES

SMALL = LlamaConfig(256, 512, 8, 4, 4, 64, 1000, 4096, 1e-6, 1e5)


def measured(config: LlamaConfig) -> Importances:
    """Importances of every matrix that llama-imatrix measures: neither the embedding nor the output."""
    shapes = config.tensor_shapes().items()
    rows = {name: torch.ones(shape[1]) for name, shape in shapes if len(shape) > 1 and "layers" in name}
    return Importances(rows, "imatrix.dat", "", 0)


def types(recipe: str, config: LlamaConfig = SMALL, **options: Any) -> GgufTypes:
    return GgufTypes(config, RECIPES[recipe], ConvertOptions(Path("out"), **options))


def quants(found: GgufTypes, name: str) -> list[str]:
    """The types of one kind of matrix, layer by layer."""
    return [found.choices[block_tensor(i, name)].quant for i in range(found.config.n_layers)]


# Bits per weight and MiB of tensor data, with an imatrix.
SIZES = {
    "1.3b-base": {
        "Q2_K": (3.319, 533), "Q3_K_M": (4.177, 670), "IQ4_XS": (4.416, 709), "Q4_K_S": (4.829, 775),
        "Q4_K_M": (5.183, 832), "Q5_K_M": (5.945, 954), "Q6_K": (6.954, 1116), "Q8_0": (8.502, 1365),
    },
    "5.7bmqa-base": {
        "Q2_K": (3.005, 2042), "Q3_K_M": (3.899, 2650), "IQ4_XS": (4.309, 2928), "Q4_K_S": (4.581, 3113),
        "Q4_K_M": (4.813, 3271), "Q5_K_M": (5.662, 3847), "Q6_K": (6.564, 4460), "Q8_0": (8.501, 5777),
    },
    "6.7b-base": {
        "Q2_K": (3.007, 2416), "Q3_K_M": (3.915, 3146), "IQ4_XS": (4.296, 3452), "Q4_K_S": (4.578, 3679),
        "Q4_K_M": (4.844, 3893), "Q5_K_M": (5.678, 4562), "Q6_K": (6.564, 5274), "Q8_0": (8.501, 6831),
    },
    "33b-base": {
        "Q2_K": (2.964, 11782), "Q3_K_M": (3.861, 15345), "IQ4_XS": (4.284, 17027), "Q4_K_S": (4.545, 18065),
        "Q4_K_M": (4.784, 19016), "Q5_K_M": (5.647, 22444), "Q6_K": (6.563, 26087), "Q8_0": (8.501, 33788),
    },
}  # fmt: skip


@pytest.mark.parametrize(("model", "recipe"), [(m, r) for m, sizes in SIZES.items() for r in sizes])
def test_the_family_has_llama_quantizes_sizes(shared: Path, model: str, recipe: str) -> None:
    text = (shared / "deepseek-coder" / f"config.{model}.json").read_text("utf-8")
    config = read_config(json.loads(text))
    choices = types(recipe, config, importances=measured(config)).choices
    n_bytes = 0
    for name, shape in config.tensor_shapes().items():
        n_rows = shape[0] if len(shape) > 1 else 1
        n_bytes += n_rows * codec(choices[name].quant).row_bytes(shape[-1])
    bits_per_weight, mebibytes = SIZES[model][recipe]
    assert round(8 * n_bytes / config.n_parameters, 3) == bits_per_weight
    assert round(n_bytes / 2**20) == mebibytes


def test_the_1_3b_falls_back_in_ffn_down_alone(shared: Path) -> None:
    config = read_config(json.loads((shared / "deepseek-coder" / "config.1.3b-base.json").read_text("utf-8")))
    found = types("Q4_K_M", config)
    more = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert quants(found, "mlp.down_proj") == ["Q8_0" if i in more else "Q5_0" for i in range(24)]
    assert {name for name, choice in found.choices.items() if choice.falls_back} == {
        block_tensor(i, "mlp.down_proj") for i in range(24)
    }
    assert found.choices[block_tensor(0, "mlp.down_proj")].reason == (
        "as recipe Q4_K_M: ffn_down of the layers that use more bits; Q6_K "
        "falls back to Q8_0: 5504 columns are not a multiple of 256"
    )
    assert found.choices[HEAD].quant == "Q6_K"


@pytest.mark.parametrize("recipe", RECIPES)
def test_pure_is_the_default_type_everywhere(recipe: str) -> None:
    matrices = {
        choice.quant for name, choice in types(recipe, pure=True).choices.items() if "norm" not in name
    }
    assert matrices == {RECIPES[recipe].default}


def test_the_first_override_that_matches_counts_and_moves_no_other_layer() -> None:
    plain = quants(types("Q4_K_M"), "self_attn.v_proj")
    overrides = ((r"blk\.[01]\.attn_v", "Q8_0"), ("ATTN_(v|q)", "Q5_0"), (r"blk\.2\.attn_q", "Q4_0"))
    found = types("Q4_K_M", tensor_types=overrides[:1])
    assert quants(found, "self_attn.v_proj") == ["Q8_0", "Q8_0", *plain[2:]]
    assert quants(found, "mlp.down_proj") == quants(types("Q4_K_M"), "mlp.down_proj")
    found = types("Q4_K_M", tensor_types=overrides)
    assert quants(found, "self_attn.v_proj") == ["Q8_0"] * 2 + ["Q5_0"] * 6
    assert quants(found, "self_attn.q_proj") == ["Q5_0"] * 8
    assert found.choices[block_tensor(0, "self_attn.v_proj")].reason == r"override blk\.[01]\.attn_v=Q8_0"
    assert found.notes() == [
        r"override blk\.[01]\.attn_v=Q8_0: 2 tensors",
        "override ATTN_(v|q)=Q5_0: 14 tensors",
        r"override blk\.2\.attn_q=Q4_0: 0 tensors",
    ]
    (fault,) = found.faults()
    assert fault == (
        r"--tensor-type blk\.2\.attn_q=Q4_0: no matrix is left that it matches; names are like "
        "blk.0.ffn_down.weight, and the first pattern that matches counts"
    )


def test_overrides_win_over_pure_and_never_touch_vectors() -> None:
    found = types("Q4_K_M", pure=True, tensor_types=(("ffn|norm", "Q6_K"),))
    assert quants(found, "mlp.up_proj") == ["Q6_K"] * 8
    assert quants(found, "self_attn.v_proj") == ["Q4_K"] * 8
    assert quants(found, "input_layernorm") == ["F32"] * 8
    assert found.faults() == []


def test_an_override_falls_back_too() -> None:
    odd = replace(SMALL, intermediate_size=5504)
    choice = types("Q8_0", odd, tensor_types=(("ffn_down", "Q6_K"),)).choices[
        block_tensor(3, "mlp.down_proj")
    ]
    assert (choice.quant, choice.falls_back) == ("Q8_0", True)
    assert choice.reason.startswith("override ffn_down=Q6_K; Q6_K falls back to Q8_0: 5504 columns")


def test_output_and_embedding_have_options_of_their_own() -> None:
    options: dict[str, Any] = {"output_tensor_type": "Q8_0", "token_embedding_type": "Q4_0"}
    found = types("Q4_K_M", tensor_types=(("token|output|ffn", "Q5_0"),), pure=True, **options)
    assert (found.choices[HEAD].quant, found.choices[EMBEDDING].quant) == ("Q8_0", "Q4_0")
    assert found.choices[HEAD].reason == "--output-tensor-type"
    assert types("F16", **options).choices[EMBEDDING].quant == "Q4_0"
    assert types("F16", **options).faults() == []


def test_those_options_must_fit() -> None:
    odd = replace(SMALL, hidden_size=320)
    options: dict[str, Any] = {"output_tensor_type": "Q6_K", "token_embedding_type": "Q5_0"}
    assert types("Q4_K_M", odd, **options).faults() == [
        "--output-tensor-type Q6_K: 320 columns are not a multiple of 256; choose a type of smaller blocks"
    ]


def test_a_tied_embedding_is_the_output() -> None:
    tied = replace(SMALL, tied_head=True)
    assert types("Q4_K_M", tied).choices[EMBEDDING].quant == "Q6_K"
    assert types("IQ2_XXS", tied).choices[EMBEDDING].quant == "Q5_K"
    assert types("Q4_K_M", tied, output_tensor_type="Q8_0").choices[EMBEDDING].quant == "Q8_0"
    both: dict[str, Any] = {"output_tensor_type": "Q8_0", "token_embedding_type": "Q5_0"}
    assert types("Q4_K_M", tied, **both).choices[EMBEDDING].quant == "Q5_0"
    assert HEAD not in types("Q4_K_M", tied).choices


def test_floats_have_no_mix_and_no_overrides() -> None:
    assert types("F16", pure=True, tensor_types=(("ffn", "Q6_K"),)).faults() == [
        "--tensor-type ffn=Q6_K: only recipes that quantize have overrides",
        "--pure: only recipes that quantize have a mix",
    ]


def test_types_that_need_an_imatrix_are_refused_all_at_once() -> None:
    assert types("IQ2_M").faults() == [
        f"IQ2_S needs an imatrix: {role}: give one with --imatrix, make one with --calibrate, "
        "or choose a larger recipe"
        for role in ("attn_q of 8 layers", "attn_k of 8 layers", "ffn_gate of 8 layers", "ffn_up of 8 layers",
                     "ffn_down of 7 layers")
    ]  # fmt: skip
    assert types("IQ2_M", importances=measured(SMALL)).faults() == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_who_needs_an_imatrix(recipe: str) -> None:
    needs_one = recipe in ("Q2_K_S", "IQ3_XXS", "IQ3_XS") or recipe.startswith(("IQ1", "IQ2"))
    assert bool(types(recipe).faults()) == needs_one
    assert types(recipe, importances=measured(SMALL)).faults() == []


def test_an_imatrix_that_lacks_what_is_needed() -> None:
    all_but_two = measured(SMALL)
    rows = {name: row for name, row in all_but_two.rows.items() if "layers.3.mlp.up" not in name}
    lacking = replace(all_but_two, rows=rows)
    assert types("IQ2_M", importances=lacking).faults() == [
        "IQ2_S needs an imatrix: ffn_up of 1 layer: imatrix.dat has no entry for blk.3.ffn_up.weight"
    ]
    assert types("Q4_K_M", importances=lacking).faults() == []
    assert types("Q4_K_M", importances=lacking).notes() == [
        "importances of 55 tensors from imatrix.dat (55 entries)",
        "no importances for token_embd.weight, blk.3.ffn_up.weight, output.weight",
    ]


def test_the_embedding_never_has_importances() -> None:
    found = types("IQ2_XXS", pure=True, importances=measured(SMALL))
    assert found.faults() == [
        f"IQ2_XXS needs an imatrix: {name}.weight, which an imatrix seldom has: give it another type, "
        f"{option} Q4_K"
        for name, option in (("token_embd", "--token-embedding-type"), ("output", "--output-tensor-type"))
    ]
    with_types = types(
        "IQ2_XXS",
        pure=True,
        importances=measured(SMALL),
        token_embedding_type="Q2_K",
        output_tensor_type="Q5_K",
    )
    assert with_types.faults() == []


def test_an_imatrix_that_nobody_uses_is_noted() -> None:
    assert types("Q8_0", importances=measured(SMALL)).notes() == [
        "the imatrix is not used: no type of Q8_0 looks at importances"
    ]
    assert types("Q8_0", importances=measured(SMALL)).importance_users() == []
