"""GPTQ's real readers, in a process and an environment of their own.

AutoGPTQ wants transformers 4, GPTQModel transformers 5, and neither can live beside dscq. So this file is
run by another environment's Python (`converters.runtimes.gptq_readers` starts it) and imports nothing of
dscq. It speaks files: a JSON request named on the command line, tensors and raw numbers in and out, and one
line of JSON for each step on standard output.

    {"do": "dequantize", "reader": "autogptq", "tensors": FILE, "cases": [...], "out": FILE}
        For each case, the weight that the reader makes of CASE.qweight, .qzeros, .scales, .g_idx: (K, N).
    {"do": "forward", "reader": "gptqmodel", "folder": FOLDER, "rows": [[ids], ...], "texts": [...],
     "logits": FILE, "n_threads": 2}
        The folder's own tokenizer on the texts, and all rows' logits, raw f32 (tokens, vocab), one after
        the other.

AutoGPTQ computes in f32 on its torch path; GPTQModel, through transformers, in f16 or bf16.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

PIECE = 512
"""Positions that are run at once, with a cache of keys and values: their logits are all that is held."""
OUT = sys.stdout
PACKAGES = {"autogptq": "auto-gptq", "gptqmodel": "gptqmodel"}


def autogptq_weight(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return f32 (K, N): AutoGPTQ's product with the identity, by the module that it would choose."""
    from auto_gptq.utils.import_utils import dynamically_import_QuantLinear

    kind = dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=case["desc_act"],
        group_size=case["group_size"],
        bits=case["bits"],
        disable_exllama=True,
        disable_exllamav2=True,
    )
    k, n = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    module = kind(case["bits"], case["group_size"], k, n, False, weight_dtype=torch.float32)
    module.load_state_dict({**tensors, "scales": tensors["scales"].float()})
    module.post_init()
    weight: torch.Tensor = module(torch.eye(k))
    return weight


def gptqmodel_weight(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (K, N) in the dtype of the scales: GPTQModel's own dequantization."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    k, n = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    arguments = {name: case[name] for name in ("bits", "group_size", "sym", "desc_act")}
    module = TorchLinear(**arguments, in_features=k, out_features=n)
    module.load_state_dict({**tensors, "scales": tensors["scales"].to(getattr(torch, case["dtype"]))})
    if case["format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits=case["bits"], pack_dtype=torch.int32)
    module.eval()
    weight: torch.Tensor = module.dequantize_weight().detach()
    return weight


def dequantize(request: dict[str, Any]) -> None:
    """Write every case's weight, or why there is none."""
    from safetensors.torch import load_file, save_file

    make = {"autogptq": autogptq_weight, "gptqmodel": gptqmodel_weight}[request["reader"]]
    everything, made = load_file(request["tensors"]), {}
    for case in request["cases"]:
        prefix = case["name"] + "."
        tensors = {key.removeprefix(prefix): t for key, t in everything.items() if key.startswith(prefix)}
        try:
            made[case["name"]] = make(case, tensors).contiguous()
        except Exception as error:
            say({"refused": case["name"], "why": f"{type(error).__name__}: {error}"})
    save_file(made, request["out"])


def autogptq_model(folder: str) -> Any:
    """Load a folder with AutoGPTQ, in f32."""
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        folder,
        device="cpu",
        use_safetensors=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        torch_dtype=torch.float32,
    ).model


def gptqmodel_model(folder: str) -> Any:
    """Load a folder with transformers and GPTQModel behind it, as users do, in the dtype of its config.

    The kernel that GPTQModel takes by itself on a CPU, torch_fused, ignores zero-points.
    """
    from transformers import AutoModelForCausalLM, GPTQConfig

    stated = json.loads(Path(folder, "config.json").read_text("utf-8"))["quantization_config"]
    chosen = (
        {}
        if stated.get("sym", True)
        else {"quantization_config": GPTQConfig(stated["bits"], backend="torch")}
    )
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto", **chosen)


def forward(request: dict[str, Any]) -> None:
    """Tokenize the texts, then run the rows and write their logits."""
    load = {"autogptq": autogptq_model, "gptqmodel": gptqmodel_model}[request["reader"]]
    try:
        say(tokenize(request["folder"], request["texts"]))
    except Exception as error:  # the weights may be right all the same
        say({"tokenizer_fault": f"{type(error).__name__}: {error}"})
    model = load(request["folder"]).eval()
    say({"dtype": str(model.dtype), "n_vocab": model.config.vocab_size})
    with Path(request["logits"]).open("wb") as out, torch.no_grad():
        for row in request["rows"]:
            run_row(model, row, out)


def tokenize(folder: str, texts: list[str]) -> dict[str, Any]:
    """Return each text's ids by the folder's own tokenizer, BOS included where that adds it, and roles."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {"ids": ids, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}


def run_row(model: Any, row: list[int], out: BinaryIO) -> None:
    """Write the logits of one row, a piece of it at a time."""
    cache = None
    for start in range(0, len(row), PIECE):
        piece = torch.tensor([row[start : start + PIECE]])
        answer = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        out.write(answer.logits[0].float().contiguous().numpy().tobytes())
        say({"done": piece.shape[1]})


def say(message: dict[str, Any]) -> None:
    """Write one line of JSON where the parent reads it, whatever the readers print to standard output."""
    OUT.write(json.dumps(message) + "\n")
    OUT.flush()


def main() -> None:
    """Do what the request says."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(request.get("n_threads", 1))
    names = (PACKAGES[request["reader"]], "transformers", "torch")
    say({"version": ", ".join(f"{name} {version(name)}" for name in names)})
    {"dequantize": dequantize, "forward": forward}[request["do"]](request)
    say({"finished": True})


if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
