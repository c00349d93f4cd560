"""A plan as a file to read, edit and give back: the type of every matrix, by GGUF's names.

    model = "deepseek-coder-6.7b-base"      what it was made for; the names decide, not this
    request = "gguf:bpw=3.5"
    bytes = 2949120000                      of all files
    predicted_kl = 0.0731                   nats
    fold = true                             by losses of folded channels: for `convert --fold`

    [types]
    "token_embd.weight" = "Q3_K"

Of these `types` alone is read: the rest says where they come from.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from converters.disk import write_whole
from converters.plan import Plan
from quantize.errors import PlanError


def write_plan(path: Path, model: str, plan: Plan, nats: float | None, *, fold: bool = False) -> None:
    """Write the types of a plan, `fold` for a model whose channels are folded; raises OutputError."""
    # JSON's strings are TOML's basic strings.
    lines = [f"model = {json.dumps(model)}", f"request = {json.dumps(str(plan.request))}"]
    lines.append(f"bytes = {plan.n_bytes}")
    lines += [] if nats is None else [f"predicted_kl = {float(nats)!r}"]
    lines += ["fold = true"] if fold else []
    matrices = (tensor for tensor in plan.tensors if len(tensor.shape) > 1)
    types = [f"{json.dumps(tensor.written_name)} = {json.dumps(tensor.quant)}" for tensor in matrices]
    write_whole(path, ("\n".join([*lines, "", "[types]", *types]) + "\n").encode())


def read_plan(path: Path) -> Mapping[str, str]:
    """Return the types by GGUF's names; raises PlanError for a file that is no plan.

    Whether the names are the model's, and the types any, is for `gguf_budget.plan_faults`.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # bytes that are no text, or a text that is no TOML
        raise PlanError(f"{path}: no plan: {error}", hint="dscq plan writes one") from None
    types = found.get("types")
    if not isinstance(types, dict) or not types:
        raise PlanError(f"{path}: no plan: the table [types] is missing", hint="dscq plan writes one")
    reasons = [f"{name}: {kind!r} is no text" for name, kind in types.items() if not isinstance(kind, str)]
    if reasons:
        raise PlanError(f"{path}: types are texts", reasons=reasons, hint='"output.weight" = "Q6_K"')
    return {name: kind.strip().upper() for name, kind in types.items()}
