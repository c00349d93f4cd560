"""What a GPTQ folder says of its own quantization, from the three files in which it may say it.

    config.json, `quantization_config`     transformers, vLLM; what counts where several are there
    quantize_config.json                   AutoGPTQ, GPTQModel: the same fields
    quantization_config.json               auto-round

Each reader takes another one of them without a word, so those that disagree are refused. Fields whose absence
has one meaning everywhere are optional: `sym` (true), `desc_act` (false), `format` (gptq, the only one
there was before the field).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from converters.config import read_json
from quantize.codecs.gptq import BITS, VERSIONS, Version
from quantize.errors import CheckpointError

MAIN: Final = "config.json"
SIDE_FILES: Final = ("quantize_config.json", "quantization_config.json")
_KINDS: Final[Mapping[str, tuple[type, object]]] = {
    "bits": (int, None),
    "group_size": (int, None),
    "desc_act": (bool, False),
    "sym": (bool, True),
}


@dataclass(frozen=True)
class GptqScheme:
    """How one linear is quantized. `group_size` is -1 for one group a row, as the format has it."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool

    @property
    def name(self) -> str:
        """The quant type in reports: GPTQ-4bit-128g, or GPTQ-4bit-channel for one group a row."""
        return f"GPTQ-{self.bits}bit-" + (f"{self.group_size}g" if self.group_size > 0 else "channel")

    def n_groups(self, n_columns: int) -> int:
        """Number of groups of a row."""
        return -(-n_columns // self.group_size) if self.group_size > 0 else 1


@dataclass(frozen=True)
class GptqConfig:
    """The scheme of the whole model, and `dynamic`: (regular expression, scheme or None) in their order.

    `version` says how zero-points are stored; `fields` is the statement that counts, `stated_in` are
    the places of all.
    """

    scheme: GptqScheme
    version: Version
    dynamic: tuple[tuple[str, GptqScheme | None], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    stated_in: tuple[str, ...] = ()

    @property
    def format_name(self) -> str:
        """The version's name in configs."""
        return next(name for name, version in VERSIONS.items() if version == self.version)

    def scheme_of(self, module: str) -> GptqScheme | None:
        """Return a linear's scheme, None if `dynamic` leaves it unquantized. The first expression counts.

        As in GPTQModel, an expression matches from the module's beginning, not to its end.
        """
        for pattern, scheme in self.dynamic:
            if re.match(pattern, module):
                return scheme
        return self.scheme


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """Return `quantization_config` of a folder's config.json, None where there is none or no such file."""
    if not (folder / MAIN).is_file():
        return None
    stated = read_json(folder / MAIN).get("quantization_config")
    return stated if isinstance(stated, dict) else None


def read_gptq_config(folder: Path) -> GptqConfig:
    """Read and compare all statements; raises CheckpointError with every reason."""
    statements = _statements(folder)
    if not statements:
        raise CheckpointError(
            f"{folder}: nothing says how it is quantized",
            reasons=[f"{MAIN} has no quantization_config", *(f"no {name}" for name in SIDE_FILES)],
        )
    reasons = [reason for place, stated in statements.items() for reason in _faults(place, stated)]
    reasons = reasons or [*_disagreements(statements)]
    stated = next(iter(statements.values()))
    dynamic: tuple[tuple[str, GptqScheme | None], ...] = ()
    if not reasons:
        dynamic, reasons = _dynamic(stated)
    if reasons:
        raise CheckpointError(f"{folder}: its quantization config cannot be used", reasons=reasons)
    version = VERSIONS[_format(stated)]
    return GptqConfig(_scheme(stated), version, dynamic, stated, tuple(statements))


def _statements(folder: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    if (main := quantization_of(folder)) is not None:
        found[f"{MAIN}: quantization_config"] = main
    for name in SIDE_FILES:
        if (folder / name).is_file():
            found[name] = read_json(folder / name)
    return found


def _format(stated: Mapping[str, Any]) -> str:
    return str(stated.get("format") or stated.get("checkpoint_format") or "gptq")


def _scheme(stated: Mapping[str, Any]) -> GptqScheme:
    values = {key: stated.get(key, default) for key, (_, default) in _KINDS.items()}
    return GptqScheme(**values)


def _faults(place: str, stated: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with one statement by itself."""
    method = stated.get("quant_method", "gptq")
    if method != "gptq":
        yield f"{place}: quant_method is {method!r}; supported: 'gptq'"
        return
    formats = {key: stated[key] for key in ("format", "checkpoint_format") if stated.get(key) is not None}
    for key, value in formats.items():
        if value not in VERSIONS:
            yield f"{place}: {key} is {value!r}; supported: {', '.join(map(repr, VERSIONS))}"
    if len(set(map(str, formats.values()))) > 1:
        yield f"{place}: {' but '.join(f'{key} is {value!r}' for key, value in formats.items())}"
    yield from _figure_faults(place, stated)
    if not isinstance(stated.get("dynamic") or {}, dict):
        yield f"{place}: dynamic is {stated['dynamic']!r}; expected an object"


def _figure_faults(place: str, stated: Mapping[str, Any]) -> Iterator[str]:
    for key, (kind, default) in _KINDS.items():
        value: Any = stated.get(key, default)
        is_other = type(value) is not kind  # an int is no bool here, nor a bool an int
        if is_other:
            yield f"{place}: {key} is {value!r}; expected {'true or false' if kind is bool else 'a number'}"
        elif key == "bits" and value not in BITS:
            yield f"{place}: bits is {value}; supported: {', '.join(map(str, BITS))}"
        elif key == "group_size" and value != -1 and value < 1:
            yield f"{place}: group_size is {value}; expected a positive number, or -1 for one group a row"


def _disagreements(statements: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    def values(stated: Mapping[str, Any]) -> dict[str, object]:
        figures = {key: stated.get(key, default) for key, (_, default) in _KINDS.items()}
        return {**figures, "format": _format(stated), "dynamic": stated.get("dynamic") or None}

    (first, stated), *others = statements.items()
    expected = values(stated)
    for place, other in others:
        for key, value in values(other).items():
            if value != expected[key]:
                yield f"{key} is {expected[key]!r} in {first}, but {value!r} in {place}"


def _dynamic(stated: Mapping[str, Any]) -> tuple[tuple[tuple[str, GptqScheme | None], ...], list[str]]:
    """Return GPTQModel's overrides in their order, and what is wrong with them."""
    rows: list[tuple[str, GptqScheme | None]] = []
    reasons: list[str] = []
    whole = {key: stated.get(key, default) for key, (_, default) in _KINDS.items()}
    for written, overrides in (stated.get("dynamic") or {}).items():
        pattern = written.removeprefix("-:").removeprefix("+:")
        try:
            re.compile(pattern)
        except re.error as error:
            reasons.append(f"dynamic: {written!r} is no regular expression: {error}")
        if not isinstance(overrides or {}, dict):
            reasons.append(f"dynamic: {written!r} is {overrides!r}; expected an object")
            continue
        merged = {**whole, **{key: v for key, v in (overrides or {}).items() if key in _KINDS}}
        reasons += _figure_faults(f"dynamic {written!r}", merged)
        rows.append((pattern, None if written.startswith("-:") else _scheme(merged)))
    return tuple(rows), reasons
