"""Recipes: which quant type each matrix of a file gets, as llama.cpp's `llama-quantize` mixes them.

A recipe is a default type and a few exceptions, for not all matrices hurt alike: `attn_v` and `ffn_down` are
the most sensitive, the first and the last layers more than those between, and `attn_v` is small where many
query heads share one key/value head. `Q4_K_M` in words: everything Q4_K, but the output matrix Q6_K, and so
`attn_v` and `ffn_down` in half of the layers.

    recipe   default    output   matrix     type    in
    Q4_K_M   Q4_K       Q6_K     attn_v     Q6_K    the layers that use more bits
                                 ffn_down   Q6_K    the layers that use more bits

The tables below are those of `src/llama-quant.cpp` for the dense Llama architecture, with one difference: a
layer is known by its number. llama-quantize counts the tensors that it has mixed so far, so that one
override there shifts the choice for every later layer.

Rows that are no whole blocks (the 1.3B's 5504 columns in blocks of 256) fall back to a type of blocks of 32
with about as many bits, or, where that does not fit either, to F16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from quantize.codecs import codec

OUTPUT, TOKEN_EMBD = "output", "token_embd"
_LAYERS_OF_70B = 80
_UNFIT_OUTPUT, _UNFIT = "Q8_0", "F16"


@dataclass(frozen=True)
class Place:
    """What a recipe may look at: a matrix's role (`attn_v`, `output`, ...) and where it stands.

    `sharing` is the number of query heads for each key/value head, `measured` whether there is an imatrix.
    """

    role: str
    layer: int
    n_layers: int
    sharing: int
    measured: bool


@dataclass(frozen=True)
class When:
    """A condition, and how a plan words it."""

    text: str
    holds: Callable[[Place], bool]


@dataclass(frozen=True)
class Case:
    """One exception of a recipe: the type of a matrix where all conditions hold."""

    quant: str
    conditions: tuple[When, ...] = ()

    def holds(self, place: Place) -> bool:
        """Return whether the exception applies there."""
        return all(condition.holds(place) for condition in self.conditions)


@dataclass(frozen=True)
class Recipe:
    """A name, its number in `general.file_type`, the default type, the output matrix's, and the exceptions.

    `mix` gives each role its cases; the first that holds decides.
    """

    name: str
    file_type: int
    default: str
    output: str
    mix: Mapping[str, tuple[Case, ...]] = field(default_factory=dict)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return codec(self.default).block_size == 1

    @property
    def is_plain(self) -> bool:
        """Whether every matrix gets the default type."""
        return not self.mix and self.output == self.default == self.name


@dataclass(frozen=True)
class Choice:
    """A type and the reason for it; `falls_back` where the type that was meant does not fit the rows."""

    quant: str
    reason: str
    falls_back: bool = False


def _before(layer: int, of: str) -> When:
    return When(f"of the first {of} layers", lambda place: place.layer < layer)


def _first(share: int, of: str) -> When:
    return When(f"of the first {of} of the layers", lambda place: place.layer < place.n_layers // share)


def _uses_more_bits(place: Place) -> bool:
    """Return whether a layer is in the first or last eighth, or every third between."""
    eighth = place.n_layers // 8
    return place.layer < eighth or place.layer >= 7 * place.n_layers // 8 or (place.layer - eighth) % 3 == 2


def _is_between(place: Place) -> bool:
    return place.n_layers // 8 <= place.layer < 7 * place.n_layers // 8


_EARLY = _first(8, "eighth")
_BETWEEN = When("of the layers between the first and the last eighth", _is_between)
_MORE_BITS = When("of the layers that use more bits", _uses_more_bits)
_SHARED = When("shared by 4 or more query heads", lambda place: place.sharing >= 4)
_MEASURED = When("with an imatrix", lambda place: place.measured)
_UNMEASURED = When("without an imatrix", lambda place: not place.measured)


def _case(quant: str, *conditions: When) -> Case:
    return Case(quant, conditions)


def _legacy(name: str, file_type: int, early_down: str | None = None) -> Recipe:
    """Return a recipe of blocks of 32, whose first `ffn_down` may get a minimum besides the scale."""
    mix = {} if early_down is None else {"ffn_down": (_case(early_down, _MEASURED, _EARLY),)}
    return Recipe(name, file_type, name, "Q6_K", mix)


def _four_bit_i(name: str, file_type: int) -> Recipe:
    mix = {"attn_v": (_case("Q5_K", _SHARED),), "ffn_down": (_case("Q5_K", _EARLY, _UNMEASURED),)}
    return Recipe(name, file_type, name, "Q6_K", mix)


def _two_bit_i(name: str, file_type: int, default: str, *, better: str, attn_output: str | None) -> Recipe:
    """Return a recipe of 1 or 2 bits: the sensitive matrices and the embedding get the `better` type."""
    mix = {
        TOKEN_EMBD: (_case(better),),
        "attn_v": (_case("Q4_K", _SHARED), _case(better)),
        "ffn_down": (_case(better, _EARLY),),
    }
    if attn_output is not None:
        mix["attn_output"] = (_case(attn_output),)
    return Recipe(name, file_type, default, "Q5_K", mix)


_K_RECIPES = (
    Recipe(
        "Q2_K",
        10,
        "Q2_K",
        "Q6_K",
        {
            "attn_v": (_case("Q4_K", _SHARED), _case("Q3_K")),
            "attn_output": (_case("Q3_K"),),
            "ffn_down": (_case("Q3_K"),),
        },
    ),
    Recipe(
        "Q2_K_S",
        21,
        "Q2_K",
        "Q6_K",
        {"attn_v": (_case("Q4_K", _SHARED),), "ffn_down": (_case("Q4_K", _EARLY),)},
    ),
    Recipe("Q3_K_S", 11, "Q3_K", "Q6_K"),
    Recipe(
        "Q3_K_M",
        12,
        "Q3_K",
        "Q6_K",
        {
            "attn_v": (_case("Q5_K", _before(2, "two")), _case("Q4_K")),
            "attn_output": (_case("Q4_K"),),
            "ffn_down": (_case("Q5_K", _first(16, "sixteenth")), _case("Q4_K")),
        },
    ),
    Recipe(
        "Q3_K_L",
        13,
        "Q3_K",
        "Q6_K",
        {role: (_case("Q5_K"),) for role in ("attn_v", "attn_output", "ffn_down")},
    ),
    Recipe(
        "Q4_K_S",
        14,
        "Q4_K",
        "Q6_K",
        {"attn_v": (_case("Q5_K", _before(4, "four")),), "ffn_down": (_case("Q5_K", _EARLY),)},
    ),
    Recipe(
        "Q4_K_M", 15, "Q4_K", "Q6_K", {role: (_case("Q6_K", _MORE_BITS),) for role in ("attn_v", "ffn_down")}
    ),
    Recipe("Q5_K_S", 16, "Q5_K", "Q6_K"),
    Recipe(
        "Q5_K_M", 17, "Q5_K", "Q6_K", {role: (_case("Q6_K", _MORE_BITS),) for role in ("attn_v", "ffn_down")}
    ),
    Recipe("Q6_K", 18, "Q6_K", "Q6_K"),
)

_THREE_BIT_I_RECIPES = (
    Recipe(
        "IQ3_M",
        27,
        "IQ3_S",
        "Q6_K",
        {
            "attn_v": (_case("Q4_K"),),
            "attn_output": (_case("Q4_K"),),
            "ffn_down": (_case("Q4_K", _EARLY),),
        },
    ),
    Recipe("IQ3_S", 26, "IQ3_S", "Q6_K", {"attn_v": (_case("Q4_K", _SHARED),)}),
    Recipe(
        "IQ3_XS",
        22,
        "IQ3_S",
        "Q6_K",
        {
            "attn_v": (_case("Q4_K", _SHARED),),
            "attn_q": (_case("IQ3_XXS"),),
            "attn_k": (_case("IQ3_XXS"),),
            "ffn_gate": (_case("IQ3_XXS", _BETWEEN),),
            "ffn_up": (_case("IQ3_XXS", _BETWEEN),),
        },
    ),
    Recipe(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        "Q5_K",
        {
            TOKEN_EMBD: (_case("IQ3_S"),),
            "attn_v": (_case("Q4_K", _SHARED), _case("IQ3_S", _UNMEASURED)),
            "attn_q": (_case("IQ2_S"),),
            "attn_k": (_case("IQ2_S"),),
            "attn_output": (_case("IQ3_S"),),
            "ffn_down": (_case("Q4_K", _UNMEASURED, _EARLY), _case("Q3_K", _UNMEASURED)),
        },
    ),
)

_TWO_BIT_I_RECIPES = (
    _two_bit_i("IQ2_M", 29, "IQ2_S", better="IQ3_S", attn_output="IQ3_S"),
    # By its name the recipe between IQ2_XS and IQ2_M, and not the quant type IQ2_S.
    _two_bit_i("IQ2_S", 28, "IQ2_XS", better="IQ3_S", attn_output="IQ3_S"),
    _two_bit_i("IQ2_XS", 20, "IQ2_XS", better="Q2_K", attn_output=None),
    _two_bit_i("IQ2_XXS", 19, "IQ2_XXS", better="Q2_K", attn_output=None),
    _two_bit_i("IQ1_M", 31, "IQ1_M", better="Q2_K", attn_output="IQ2_XXS"),
    _two_bit_i("IQ1_S", 24, "IQ1_S", better="Q2_K", attn_output="IQ2_XXS"),
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", 0, "F32", "F32"),
        Recipe("F16", 1, "F16", "F16"),
        Recipe("BF16", 32, "BF16", "BF16"),
        Recipe("Q8_0", 7, "Q8_0", "Q8_0"),
        _legacy("Q5_1", 9),
        _legacy("Q5_0", 8, "Q5_1"),
        _legacy("Q4_1", 3),
        _legacy("Q4_0", 2, "Q4_1"),
        *reversed(_K_RECIPES),
        _four_bit_i("IQ4_NL", 25),
        _four_bit_i("IQ4_XS", 30),
        *_THREE_BIT_I_RECIPES,
        *_TWO_BIT_I_RECIPES,
    )
}

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Names of quant types that, as recipes, stand for a mix."""

_SMALLER_BLOCK = {
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
_ALWAYS_MEASURED = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


def mixed(recipe: Recipe, place: Place, n_columns: int) -> Choice:
    """Return the type that a recipe gives a matrix of rows of `n_columns`, which need not fit its blocks.

    Source: llama.cpp, `llama_tensor_get_type_impl`. Ask with the role `output` for the embedding of a model
    whose output matrix it is.
    """
    if recipe.is_plain:
        return Choice(recipe.default, "as asked")
    as_recipe = f"as recipe {recipe.name}"
    if place.role == OUTPUT:
        if n_columns % codec(recipe.default).block_size:
            return Choice(_UNFIT_OUTPUT, f"{as_recipe}: output of {n_columns} columns")
        return Choice(recipe.output, f"{as_recipe}: output")
    case = next((case for case in recipe.mix.get(place.role, ()) if case.holds(place)), None)
    quant, reason = recipe.default, as_recipe
    if case is not None:
        quant = case.quant
        reason = " ".join((f"{as_recipe}: {place.role}", *(when.text for when in case.conditions)))
    if _is_raised(recipe, place) and quant in ("Q3_K", "Q4_K"):
        return Choice("Q5_K", f"{as_recipe}: attn_v of a 70B model")
    return Choice(quant, reason)


def _is_raised(recipe: Recipe, place: Place) -> bool:
    """Return whether this is the attn_v of Llama's 70B, eight times smaller than attn_q; not below 3 bits."""
    is_70b = place.n_layers == _LAYERS_OF_70B and place.sharing > 1
    return place.role == "attn_v" and is_70b and not recipe.name.startswith(("IQ1", "IQ2"))


def fitted(meant: Choice, n_columns: int) -> Choice:
    """Return the choice, or what it falls back to where rows of `n_columns` are no whole blocks of its type.

    Source: llama.cpp, `tensor_type_fallback`.
    """
    block_size = codec(meant.quant).block_size
    if n_columns % block_size == 0:
        return meant
    quant = _SMALLER_BLOCK.get(meant.quant, _UNFIT)
    if n_columns % codec(quant).block_size:
        quant = _UNFIT
    reason = f"falls back to {quant}: {n_columns} columns are not a multiple of {block_size}"
    return Choice(quant, f"{meant.reason}; {meant.quant} {reason}", falls_back=True)


def requires_importances(recipe: Recipe, role: str, quant: str) -> bool:
    """Return whether a matrix of this role and type cannot be written without importances.

    Source: llama.cpp, `tensor_requires_imatrix`; for the embedding and the output, which an imatrix seldom
    has, only those types whose search cannot do without (`ggml_quantize_requires_imatrix`).
    """
    if role in (OUTPUT, TOKEN_EMBD):
        return codec(quant).needs_importance
    return quant in _ALWAYS_MEASURED or (quant == "Q2_K" and recipe.name == "Q2_K_S")
