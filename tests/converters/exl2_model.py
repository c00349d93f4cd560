"""One decoder block of the embedded model, its archive, and what its layouts cost: for the EXL2 tests."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.exl2_measure import measure
from converters.exl2_measurement import NAME, Measurement
from converters.plan import ConvertOptions
from converters.stats.archive import Archive
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint


@dataclass(frozen=True)
class Row:
    ids: torch.Tensor
    kind: str = "completion"


@dataclass(frozen=True)
class Model:
    """A checkpoint with everything that an EXL2 folder is made from."""

    checkpoint: Checkpoint
    archive: Archive
    measurement: Measurement
    file: Path
    source: Path

    def options(self, folder: Path, **others: object) -> ConvertOptions:
        """Return the options of a conversion into a folder."""
        given = {"archive": self.archive, "measurement": self.measurement, "hash_tensors": True}
        return ConvertOptions(folder, **{"effort": "fast", **given, **others})  # type: ignore[arg-type]


def one_block(demo: Path, folder: Path) -> Path:
    """Make a checkpoint of the embedded model's first block."""
    folder.mkdir()
    tensors = load_file(demo / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((demo / "config.json").read_text("utf-8")) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    return folder


def make_model(demo: Path, folder: Path) -> Model:
    """Cut, calibrate and measure."""
    source = one_block(demo, folder / "demo-block")
    checkpoint = open_checkpoint(source)
    generator = torch.Generator().manual_seed(1)
    rows = [Row(torch.randint(0, 2300, (160,), generator=generator)) for _ in range(6)]
    stats = CalibrateOptions(folder / "stats")
    archive = calibrate_checkpoint(checkpoint, rows, {"name": "random"}, stats)
    file = folder / NAME
    return Model(checkpoint, archive, measure(archive, checkpoint.weights, file, n_threads=1), file, source)
