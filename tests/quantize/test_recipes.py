"""The recipes: who gets more bits, what rows allow, and what cannot do without importances."""

import pytest
from gguf import LlamaFileType

from quantize.codecs import CODECS
from quantize.recipes import (
    ALIASES,
    RECIPES,
    Choice,
    Place,
    fitted,
    mixed,
    requires_importances,
)

ROLES = (
    "token_embd",
    "output",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


def place(
    role: str, layer: int = 0, n_layers: int = 24, sharing: int = 1, *, measured: bool = False
) -> Place:
    return Place(role, layer, n_layers, sharing, measured)


def quant(recipe: str, *args: object, **kwargs: object) -> str:
    return mixed(RECIPES[recipe], place(*args, **kwargs), 4096).quant  # type: ignore[arg-type]


def raised(recipe: str, role: str, n_layers: int, **kwargs: bool) -> list[int]:
    """The layers of a role that do not get the recipe's default type."""
    default = RECIPES[recipe].default
    return [i for i in range(n_layers) if quant(recipe, role, i, n_layers, **kwargs) != default]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_number_of_its_name_and_types_that_can_be_written(name: str) -> None:
    recipe = RECIPES[name]
    prefix = "ALL" if name == "F32" else "MOSTLY"
    assert LlamaFileType[f"{prefix}_{name}"].value == recipe.file_type
    types = {recipe.default, recipe.output, *(c.quant for cases in recipe.mix.values() for c in cases)}
    assert all(CODECS[kind].writable for kind in types)
    assert set(recipe.mix) <= set(ROLES)


def test_every_recipe_of_llama_quantize_is_there() -> None:
    numbers = {recipe.file_type for recipe in RECIPES.values()}
    # 4 to 6 and 33 to 35 are gone; 36 to 41 are read only.
    assert numbers == set(range(33)) - {4, 5, 6}
    assert set(ALIASES.values()) <= set(RECIPES)


@pytest.mark.parametrize(
    ("n_layers", "layers"),
    [
        (24, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]),
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (62, [*range(7), *range(9, 52, 3), *range(54, 62)]),
    ],
)
def test_the_layers_that_use_more_bits(n_layers: int, layers: list[int]) -> None:
    for recipe in ("Q4_K_M", "Q5_K_M"):
        assert raised(recipe, "attn_v", n_layers) == raised(recipe, "ffn_down", n_layers) == layers
        assert raised(recipe, "ffn_up", n_layers) == raised(recipe, "attn_q", n_layers) == []


def test_the_first_layers() -> None:
    assert raised("Q4_K_S", "attn_v", 32) == raised("Q4_K_S", "ffn_down", 32) == [0, 1, 2, 3]
    assert raised("Q4_K_S", "attn_v", 62) == [0, 1, 2, 3]
    assert raised("Q4_K_S", "ffn_down", 62) == list(range(7))
    assert [quant("Q3_K_M", "attn_v", i) for i in range(4)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert [quant("Q3_K_M", "ffn_down", i) for i in range(3)] == ["Q5_K", "Q4_K", "Q4_K"]
    assert raised("IQ3_XS", "ffn_gate", 24) == raised("IQ3_XS", "ffn_up", 24) == list(range(3, 21))


@pytest.mark.parametrize(
    ("recipe", "alone", "shared"),
    [("Q2_K", "Q3_K", "Q4_K"), ("Q2_K_S", "Q2_K", "Q4_K"), ("IQ4_XS", "IQ4_XS", "Q5_K"),
     ("IQ3_S", "IQ3_S", "Q4_K"), ("IQ2_M", "IQ3_S", "Q4_K"), ("IQ1_S", "Q2_K", "Q4_K"),
     ("Q4_K_S", "Q5_K", "Q5_K")],
)  # fmt: skip
def test_attn_v_that_many_heads_share(recipe: str, alone: str, shared: str) -> None:
    assert [quant(recipe, "attn_v", sharing=n) for n in (1, 3, 4, 32)] == [alone, alone, shared, shared]


@pytest.mark.parametrize(
    ("recipe", "role", "without", "measured"),
    [("Q4_0", "ffn_down", "Q4_0", "Q4_1"), ("Q5_0", "ffn_down", "Q5_0", "Q5_1"),
     ("IQ4_NL", "ffn_down", "Q5_K", "IQ4_NL"), ("IQ3_XXS", "attn_v", "IQ3_S", "IQ3_XXS"),
     ("IQ3_XXS", "ffn_down", "Q4_K", "IQ3_XXS"), ("Q4_K_M", "ffn_down", "Q6_K", "Q6_K")],
)  # fmt: skip
def test_an_imatrix_changes_some_types(recipe: str, role: str, without: str, measured: str) -> None:
    assert quant(recipe, role) == without
    assert quant(recipe, role, measured=True) == measured


@pytest.mark.parametrize(
    ("recipe", "output", "token_embd"),
    [("Q4_0", "Q6_K", "Q4_0"), ("Q8_0", "Q8_0", "Q8_0"), ("F16", "F16", "F16"), ("Q4_K_M", "Q6_K", "Q4_K"),
     ("IQ3_XXS", "Q5_K", "IQ3_S"), ("IQ2_S", "Q5_K", "IQ3_S"), ("IQ2_XS", "Q5_K", "Q2_K"),
     ("IQ1_M", "Q5_K", "Q2_K"), ("IQ3_M", "Q6_K", "IQ3_S")],
)  # fmt: skip
def test_output_and_embedding(recipe: str, output: str, token_embd: str) -> None:
    assert (quant(recipe, "output"), quant(recipe, "token_embd")) == (output, token_embd)


def test_an_output_whose_rows_are_no_whole_blocks() -> None:
    assert mixed(RECIPES["Q2_K"], place("output"), 5504).quant == "Q8_0"
    assert mixed(RECIPES["Q4_0"], place("output"), 5504).quant == "Q6_K"  # and that falls back


def test_attn_v_of_a_70b_model() -> None:
    assert quant("Q2_K", "attn_v", n_layers=80, sharing=8) == "Q5_K"
    assert quant("IQ3_XXS", "attn_v", n_layers=80, sharing=8) == "Q5_K"
    assert quant("IQ2_M", "attn_v", n_layers=80, sharing=8) == "Q4_K"
    assert quant("Q2_K", "attn_v", n_layers=80, sharing=1) == "Q3_K"
    assert quant("Q2_K", "attn_v", n_layers=81, sharing=8) == "Q4_K"


@pytest.mark.parametrize(
    ("meant", "fallback"),
    [("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"),
     *((name, "IQ4_NL") for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
                                     "IQ4_XS"))],
)  # fmt: skip
def test_rows_that_are_no_whole_blocks_fall_back(meant: str, fallback: str) -> None:
    choice = Choice(meant, "as asked")
    assert fitted(choice, 5632) is choice
    assert fitted(choice, 5504) == Choice(
        fallback,
        f"as asked; {meant} falls back to {fallback}: 5504 columns are not a multiple of 256",
        falls_back=True,
    )
    assert fitted(choice, 5500).quant == "F16"


def test_small_blocks_and_floats_fall_back_to_f16_or_not_at_all() -> None:
    assert [fitted(Choice(name, ""), 40).quant for name in ("Q8_0", "Q4_0", "IQ4_NL")] == ["F16"] * 3
    assert [fitted(Choice(name, ""), 41).quant for name in ("F32", "BF16")] == ["F32", "BF16"]


def test_reasons() -> None:
    def reason(recipe: str, role: str) -> str:
        return mixed(RECIPES[recipe], place(role, sharing=8), 4096).reason

    assert reason("Q4_K_M", "attn_v") == "as recipe Q4_K_M: attn_v of the layers that use more bits"
    assert reason("Q4_K_M", "ffn_up") == "as recipe Q4_K_M"
    assert reason("Q4_K_M", "output") == "as recipe Q4_K_M: output"
    assert reason("Q2_K", "attn_v") == "as recipe Q2_K: attn_v shared by 4 or more query heads"
    assert reason("IQ4_XS", "ffn_down") == (
        "as recipe IQ4_XS: ffn_down of the first eighth of the layers without an imatrix"
    )
    assert reason("Q8_0", "output") == reason("F16", "attn_q") == "as asked"


def test_what_needs_importances() -> None:
    needy = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    for name in CODECS:
        assert requires_importances(RECIPES["IQ3_M"], "ffn_up", name) == (name in needy)
        # What the embedding and the output can do without is less: only those without which ggml stops.
        assert requires_importances(RECIPES["IQ3_M"], "output", name) == (
            name in {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
        )
    assert requires_importances(RECIPES["Q2_K_S"], "ffn_up", "Q2_K")
    assert not requires_importances(RECIPES["Q2_K"], "ffn_up", "Q2_K")
    assert not requires_importances(RECIPES["Q2_K_S"], "token_embd", "Q2_K")
