"""Calibration and conversion on a pretended GPU: from a checkpoint to folders, no device meets another."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.exl2_measure import measure
from converters.exl2_source import open_exl2
from converters.gptq_source import open_gptq
from converters.pipeline import convert
from converters.plan import ConvertOptions, Request
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from quantize.weights import Weights
from tests.conftest import MakeCheckpoint
from tests.pretend_gpu import pretended_gpu

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor
    kind: str = "completion"


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return open_checkpoint(make_checkpoint(**SHAPE))


def test_folders_are_made_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    here = _made(checkpoint, tmp_path / "here", "cpu")
    with pretended_gpu():
        there = _made(checkpoint, tmp_path / "there", "cuda:0")
    for mine, its in zip(here, there, strict=True):
        for name in mine.specs():
            W, ours, theirs = (each.load(name).float() for each in (checkpoint.weights, mine, its))
            # Sums in another order now and then make another code: as good a one.
            assert float((theirs - W).norm()) == pytest.approx(float((ours - W).norm()), rel=0.03), name


def _made(checkpoint: Checkpoint, folder: Path, device: str) -> list[Weights]:
    """Calibrate and convert on a device; return the weights of both folders."""
    generator = torch.Generator().manual_seed(1)
    rows = [Row(torch.randint(0, 900, (60,), generator=generator)) for _ in range(6)]
    how = CalibrateOptions(folder / "stats", device=device)
    archive = calibrate_checkpoint(checkpoint, rows, {"name": "random"}, how)
    layouts = measure(archive, checkpoint.weights, folder / "layouts", n_threads=1, device=device)
    options = ConvertOptions(folder / "out", archive=archive, device=device, measurement=layouts)
    gptq, exl2 = convert(checkpoint, [Request("gptq", "4bit-32g"), Request("exl2", "4.5")], options)
    return [open_gptq(gptq.place).weights, open_exl2(exl2.place).weights]
