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
from safetensors.torch import save_file

from converters.cli import main
from converters.config import read_config
from quantize.llama import LlamaConfig

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
