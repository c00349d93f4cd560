"""Rotary positions: one pair of numbers, three spellings in `config.json`.

    written by              where theta is                  where the scaling is
    ----------------------  ------------------------------  -------------------------------------------
    transformers 4.31-4.42  rope_theta                      rope_scaling: {type, factor}
    transformers 4.43-4.57  rope_theta                      rope_scaling: {rope_type, factor}
    transformers 5          rope_parameters.rope_theta      rope_parameters: {rope_type, factor}

Files that were saved again by another version hold several of them at once, `type` beside `rope_type`
included. Every statement is collected with the place it stands in; statements that disagree are refused,
because each reader of such a file takes another one, without a word.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_THETA = 10000.0
_LARGEST = 1e30  # any theta or factor beyond is a slip, and f32 frequencies end near it
_BLOCKS = ("rope_scaling", "rope_parameters")
_PLAIN_TYPES = ("default",)
_LINEAR = "linear"

Statements = dict[str, Any]  # place in the config, e.g. "rope_scaling.type" -> the value found there


@dataclass(frozen=True)
class Rope:
    """Base of the frequencies, and the linear factor that positions are divided by (1.0: none)."""

    theta: float
    factor: float


def read_rope(config: Mapping[str, Any]) -> tuple[Rope, list[str]]:
    """Return the rope of a `config.json` and all reasons (empty when it is supported) against it."""
    types, factors, thetas = _types(config), _stated(config, "factor"), _thetas(config)
    reasons = [*_shape_reasons(config), *_number_reasons({**factors, **thetas})]
    reasons += [*_disagreement("type", types), *_disagreement("theta", thetas)]
    reasons += _disagreement("factor", factors)
    if not reasons:
        reasons += _type_reasons(types, factors)
    if reasons:
        return Rope(DEFAULT_THETA, 1.0), reasons
    return Rope(_only(thetas, DEFAULT_THETA), _only(factors, 1.0)), []


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in _BLOCKS:
        if isinstance(config.get(name), Mapping):
            yield name, config[name]


def _stated(config: Mapping[str, Any], key: str) -> Statements:
    return {f"{name}.{key}": block[key] for name, block in _blocks(config) if block.get(key) is not None}


def _types(config: Mapping[str, Any]) -> Statements:
    return {**_stated(config, "type"), **_stated(config, "rope_type")}


def _thetas(config: Mapping[str, Any]) -> Statements:
    top = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    return {**top, **_stated(config, "rope_theta")}


def _only(statements: Statements, default: float) -> float:
    return float(next(iter(statements.values()), default))


def _disagreement(what: str, statements: Statements) -> list[str]:
    if len(set(map(str, map(_comparable, statements.values())))) < 2:
        return []
    found = ", ".join(f"{place} = {value!r}" for place, value in statements.items())
    return [f"rope {what}: {found} disagree; keep the one that the model was trained with"]


def _comparable(value: object) -> object:
    """Return numbers as floats, so that 4 and 4.0 are the same statement."""
    return float(value) if type(value) in (int, float) else value  # type: ignore[arg-type]


def _number_reasons(statements: Statements) -> Iterator[str]:
    for place, value in statements.items():
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            yield f"{place}: found {value!r}; expected a positive number"


def _shape_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _BLOCKS:
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            yield f"{name}: found {config[name]!r}; expected an object or null"
    places = {"partial_rotary_factor": config.get("partial_rotary_factor")}
    for place, value in {**places, **_stated(config, "partial_rotary_factor")}.items():
        if value not in (None, 1, 1.0):
            yield f"{place}: found {value!r}; supported: 1.0 (all of a head is rotated)"


def _type_reasons(types: Statements, factors: Statements) -> Iterator[str]:
    place, kind = next(iter(types.items()), ("rope type", "default"))
    stated_factor = next(iter(factors.items()), None)
    if kind not in (*_PLAIN_TYPES, _LINEAR):
        yield f"{place}: found {kind!r}; supported: 'linear', 'default' (no scaling)"
    elif kind == _LINEAR and stated_factor is None:
        yield f"{place}: 'linear' without a factor; expected a number such as 4.0 beside it"
    elif kind != _LINEAR and stated_factor is not None and stated_factor[1] != 1:
        yield f"{stated_factor[0]} = {stated_factor[1]!r}, but the rope type is {kind!r}; expected 'linear'"
