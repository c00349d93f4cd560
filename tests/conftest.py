"""Fixtures that every test may use: the shared folder, the embedded model, small random checkpoints."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.cli import main
from converters.config import read_config
from quantize.codecs.gptq import VERSIONS, pack_codes, pack_zeros
from quantize.llama import LlamaConfig
from quantize.solver.linears import Settings, quantize_linears

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "scripts" / "demo-coder"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

# On cores that something else uses too, two threads of OpenMP wait for each other longer than one works.
torch.set_num_threads(1)

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., "Done"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the family's real configs and tokenizer; skips where it is absent."""
    folder = Path(os.environ.get("DSCQ_SHARED", ROOT.parent / "shared")).resolve()
    if not (folder / "deepseek-coder").is_dir():
        pytest.skip(f"DSCQ_SHARED: no folder {folder}/deepseek-coder")
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded model's folder. Read it, never write to it."""
    return DEMO


def random_tensors(config: LlamaConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a random Llama: matrices of deviation 1/sqrt(columns), norms near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (noise / shape[-1] ** 0.5 if len(shape) == 2 else 1 + 0.1 * noise).to(dtype)
    return tensors


def _config(vocab_size: int, overrides: dict[str, Any]) -> dict[str, Any]:
    demo: dict[str, Any] = json.loads((DEMO / "config.json").read_text("utf-8"))
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab_size}
    demo.pop("head_dim", None)
    return demo | small | heads | overrides


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Return a maker of random checkpoint folders with the embedded model's tokenizer.

    `make_checkpoint(name="tiny", dtype=torch.bfloat16, seed=0, edit=None, **config_overrides)` writes one
    safetensors shard, `config.json` and the tokenizer's files; `edit` may change the tensors before.
    """

    def make(
        name: str = "tiny",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
        **overrides: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        demo_rows = json.loads((DEMO / "config.json").read_text("utf-8"))["vocab_size"]
        config = _config(demo_rows, overrides)
        tensors = random_tensors(read_config(config), dtype, seed)
        if edit is not None:
            edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        for file in TOKENIZER_FILES:
            shutil.copy(DEMO / file, folder / file)
        return folder

    return make


def gptq_tensors(
    folder: Path, settings: Settings, version: str, into: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Quantize a checkpoint's decoder linears; `into` gets what every tensor then stands for."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 1 or ".layers." not in name:
            stored[name] = into[name] = tensor.half()
            continue
        generator = torch.Generator().manual_seed(tensor.shape[1])
        X = torch.randn(2 * tensor.shape[1], tensor.shape[1], generator=generator)
        found = quantize_linears({"w": tensor}, X.T @ X / len(X), settings)["w"]
        module, into[name] = name.removesuffix(".weight"), found.weights()
        stored[f"{module}.qweight"] = pack_codes(found.codes, settings.bits)
        stored[f"{module}.qzeros"] = pack_zeros(found.zeros, settings.bits, VERSIONS[version])
        stored[f"{module}.scales"] = found.scales.T.contiguous()
        stored[f"{module}.g_idx"] = found.g_idx
    return stored


@pytest.fixture
def make_gptq(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> MakeCheckpoint:
    """Return a maker of GPTQ folders: `make_gptq(bits=4, group_size=32, symmetric=True, desc_act=False,
    version="gptq", name="gptq", source=None, into=None)`, of a checkpoint folder or a random one.
    """

    def make(
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = True,
        desc_act: bool = False,
        version: str = "gptq",
        name: str = "gptq",
        source: Path | None = None,
        into: dict[str, torch.Tensor] | None = None,
    ) -> Path:
        source = make_checkpoint(f"{name}-source") if source is None else source
        folder = tmp_path / name
        folder.mkdir()
        settings = Settings(bits, group_size, symmetric, desc_act, effort="fast")
        tensors = gptq_tensors(source, settings, version, {} if into is None else into)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        quantization: dict[str, Any] = {"bits": bits}
        quantization |= {"group_size": group_size or -1, "desc_act": desc_act, "sym": symmetric}
        quantization |= {"quant_method": "gptq", "format": version, "checkpoint_format": version}
        (folder / "quantize_config.json").write_text(json.dumps(quantization), "utf-8")
        config = json.loads((source / "config.json").read_text("utf-8"))
        config |= {"quantization_config": quantization, "torch_dtype": "float16"}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        for file in TOKENIZER_FILES:
            shutil.copy(source / file, folder / file)
        return folder

    return make


class Done:
    """What a run of `dscq` left: exit code and both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a runner of `dscq` with arguments, in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dscq", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        streams = capsys.readouterr()
        return Done(int(end.value.code or 0), streams.out, streams.err)

    return call
