"""Quantize a checkpoint with this project's solver, in a process of its own.

    python -m scripts.bench.peers.dscq_worker calibrate SOURCE ROWS ARCHIVE [CONFIG]
    python -m scripts.bench.peers.dscq_worker export SOURCE ARCHIVE OUT CONFIG
    python -m scripts.bench.peers.dscq_worker measure SOURCE ARCHIVE OUT CONFIG
    python -m scripts.bench.peers.dscq_worker exl2 SOURCE ARCHIVE OUT CONFIG
    python -m scripts.bench.peers.dscq_worker quantize SOURCE ARCHIVE OUT CONFIG

ROWS is a JSON list of rows of token ids; CONFIG's `sensitivity` has tokens count by their gradients.
`export` is `dscq convert --to gptq:`, and CONFIG a JSON object of GptqSpec's fields, `effort` and `threads`;
`quantize` runs the solver alone, one linear after the other, with the arguments of its Settings, or with
"plain": true rounds to nearest and reads no archive. OUT is a folder in GPTQ's format. `measure` is the first
part of `dscq convert --to exl2:` and leaves OUT/measurement.json, `exl2` the rest, with CONFIG's `quant`,
`measurement` (its file), `effort` and `threads`. Beside what it writes, `ARCHIVE.json` or `OUT.json`, are the
seconds, imports excluded, and the peak of the resident memory.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.exl2_measure import measure
from converters.exl2_measurement import NAME, measurement_key, read_measurement
from converters.pipeline import convert, first_tokens_known
from converters.plan import ConvertOptions, Request
from converters.stats.archive import Archive, open_archive
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from converters.targets import parse_request
from converters.targets.gptq_spec import GptqSpec
from quantize.codecs.gptq import pack_codes, pack_zeros
from quantize.llama import block_tensor
from quantize.reference import INPUTS
from quantize.solver.grid import affine_grid
from quantize.solver.linears import QuantizedLinear, Settings, quantize_linears
from quantize.solver.scales import group_index, plain_scales


@dataclass(frozen=True)
class Row:
    """A row of the calibration text."""

    ids: torch.Tensor
    kind: str = "completion"


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")


def rounded(W: torch.Tensor, settings: Settings) -> QuantizedLinear:
    """Round one linear to nearest, on positive scales from the range."""
    group = group_index(W.shape[1], settings.group_size)
    scale, zero = plain_scales(W, group, settings.bits, settings.symmetric)
    codes = affine_grid(scale, zero, group, settings.bits).nearest(W.float())
    return QuantizedLinear(codes, scale.half(), zero.to(torch.uint8), group.to(torch.int32), 0.0, 0.0)


def quantized(checkpoint: Checkpoint, archive: Archive | None, settings: Settings) -> dict[str, torch.Tensor]:
    """Return the tensors of the whole model; without an archive, of plain rounding."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(checkpoint.config.n_layers):
        for inputs in dict.fromkeys(INPUTS.values()):
            names = [block_tensor(layer, name) for name, seen in INPUTS.items() if seen == inputs]
            weights = {name: checkpoint.weights.load(name) for name in names}
            if archive is None:
                done = {name: rounded(W, settings) for name, W in weights.items()}
            else:
                H = archive.statistics(names[0]).hessian
                assert H is not None
                done = quantize_linears(weights, H, settings)
            for name, linear in done.items():
                parts = {
                    "qweight": pack_codes(linear.codes, settings.bits),
                    "qzeros": pack_zeros(linear.zeros, settings.bits, 1),
                    "scales": linear.scales.T.contiguous(),
                    "g_idx": linear.g_idx,
                }
                tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    rest = [
        name for name in checkpoint.weights.specs() if f"{name.removesuffix('weight')}scales" not in tensors
    ]
    return tensors | {name: checkpoint.weights.load(name).clone() for name in rest}


def write(out: Path, tensors: Mapping[str, torch.Tensor], bits: int) -> None:
    """Write the folder: just what scripts/quality/gptq_folder.py reads."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), out / "model.safetensors")
    config = {"quantization_config": {"bits": bits, "checkpoint_format": "gptq"}}
    (out / "config.json").write_text(json.dumps(config))


def report(path: Path, started: float) -> None:
    """Write the seconds since the start and the peak of memory beside a folder."""
    measured = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
    Path(f"{path}.json").write_text(json.dumps(measured))


def calibrate(source: str, rows: str, folder: str, config: str = "{}") -> None:
    """Make the statistics archive of the rows."""
    found = [Row(torch.tensor(row)) for row in json.loads(Path(rows).read_text())]
    options = CalibrateOptions(Path(folder), **json.loads(config))
    calibrate_checkpoint(open_checkpoint(source), found, {"name": "rows"}, options)


def quantize(source: str, folder: str, out: str, config: str) -> None:
    """Quantize every linear with these settings of the solver, or plainly."""
    arguments: dict[str, Any] = json.loads(config)
    archive = None if arguments.pop("plain", False) else open_archive(Path(folder))
    settings = Settings(**arguments)
    write(Path(out), quantized(open_checkpoint(source), archive, settings), settings.bits)


def export(source: str, folder: str, out: str, config: str) -> None:
    """Write the folder as `dscq convert --to gptq:` does."""
    arguments: dict[str, Any] = json.loads(config)
    effort, threads = arguments.pop("effort", "default"), arguments.pop("threads")
    options = ConvertOptions(Path(), n_threads=threads, archive=open_archive(Path(folder)), effort=effort)
    convert_one(source, Request("gptq", str(GptqSpec(**arguments))), options, out)


def measure_layouts(source: str, folder: str, out: str, config: str) -> None:
    """Measure what each of EXL2's layouts costs each linear."""
    arguments: dict[str, Any] = json.loads(config)
    checkpoint, archive, threads = open_checkpoint(source), open_archive(Path(folder)), arguments["threads"]
    options = first_tokens_known(checkpoint, ConvertOptions(Path(), archive=archive))
    first = options.first_tokens
    measure(archive, checkpoint.weights, Path(out) / NAME, n_threads=threads, first=first)


def exl2(source: str, folder: str, out: str, config: str) -> None:
    """Write the folder as `dscq convert --to exl2: --measurement` does."""
    arguments: dict[str, Any] = json.loads(config)
    archive = open_archive(Path(folder))
    path = Path(arguments["measurement"])
    measurement = read_measurement(path, archive.config, measurement_key(archive))
    options = ConvertOptions(
        Path(),
        n_threads=arguments["threads"],
        archive=archive,
        effort=arguments.get("effort", "default"),
        measurement=measurement,
    )
    convert_one(source, parse_request(f"exl2:{arguments['quant']}"), options, out)


def convert_one(source: str, request: Request, options: ConvertOptions, out: str) -> None:
    """Convert to one format, from nothing, and name the folder `out`."""
    options = replace(options, folder=Path(f"{out}.exports"), force=True, fresh=True)
    [written] = convert(open_checkpoint(source), [request], options)
    written.place.rename(out)


ACTIONS: Mapping[str, Callable[..., None]] = {
    "calibrate": calibrate,
    "export": export,
    "quantize": quantize,
    "measure": measure_layouts,
    "exl2": exl2,
}


def main() -> None:
    """Do one of them and report."""
    started, (action, *arguments) = time.monotonic(), sys.argv[1:]
    ACTIONS[action](*arguments)
    report(Path(arguments[2]), started)


if __name__ == "__main__":
    main()
