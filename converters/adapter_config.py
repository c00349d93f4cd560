"""`adapter_config.json` of PEFT: how the update is scaled, and what rules a merge out.

PEFT's LoRA has grown many variants that share this file. Each has a key of its own that is null, false or
empty in plain LoRA; a value there means that W + s B A is not what was trained.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Key -> what it stands for. All of them are falsy for plain LoRA.
_VARIANTS = {
    "use_dora": "DoRA (a learned magnitude per column)",
    "fan_in_fan_out": "layers that store their weight transposed",
    "lora_bias": "a trained bias",
    "layer_replication": "repeated layers",
    "target_parameters": "updates of bare parameters",
    "trainable_token_indices": "single retrained rows of the embedding",
    "use_qalora": "QA-LoRA (pooled inputs)",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA (acts on a part of the text only)",
    "arrow_config": "routing between adapters",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# These start from other base weights than the checkpoint's; the rest starts from zero or scales A alone.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The scaling of an adapter: alpha, and for some modules, by pattern, another one."""

    lora_alpha: float
    rank_stabilised: bool
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def alpha(self, module: str) -> float:
        """Return a module's alpha: the first pattern that matches the end of its dotted name decides."""
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.lora_alpha


def read_adapter_config(config: Mapping[str, Any]) -> tuple[AdapterConfig, list[str]]:
    """Return the scaling and every reason (empty: none) why the adapter cannot be merged."""
    reasons = [*_kind_reasons(config), *_number_reasons(config)]
    if reasons:
        return AdapterConfig(1.0, False), reasons
    patterns = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    return AdapterConfig(float(config["lora_alpha"]), bool(config.get("use_rslora")), patterns), []


def _kind_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type: found {kind!r}; supported: 'LORA'"
    if config.get("bias", "none") != "none":
        yield f"bias: found {config['bias']!r}; supported: 'none'"
    for key, meaning in _VARIANTS.items():
        if config.get(key):
            yield f"{key}: {meaning} cannot be merged as a plain update"
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights: {start!r} changes the base weights too; "
            "save the adapter as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _number_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        yield f"alpha_pattern: found {patterns!r}; expected an object"
        return
    places = {"lora_alpha": config.get("lora_alpha")}
    places |= {f"alpha_pattern[{key!r}]": value for key, value in patterns.items()}
    for place, value in places.items():
        if type(value) not in (int, float):
            yield f"{place}: found {value!r}; expected a number"
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"alpha_pattern: {pattern!r} is no regular expression: {error}"
