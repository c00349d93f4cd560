"""Our packed tensors, dequantized by the real readers: their numbers must be ours, bit for bit."""

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.codecs.gptq import BITS, VERSIONS, dequantize, pack_codes, pack_zeros
from quantize.solver.scales import group_index

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "converters" / "runtimes" / "gptq_worker.py"
N, K = 64, 384
GRID = list(itertools.product(BITS, (32, 64, 128, -1), (True, False), (True, False)))
SIGNS = ("plain", "negative")
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def python_of(reader: str) -> Path:
    folder = os.environ.get("DSCQ_GPTQ_READERS")
    if folder is None:
        pytest.skip("DSCQ_GPTQ_READERS names no folder of readers; scripts/gptq_readers makes one")
    python = Path(folder) / reader / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}")
    return python


def make_cases(version_name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Every bits x group x sym x desc_act, with and without negative scales, as (cases, tensors)."""
    generator = torch.Generator().manual_seed(3)
    cases: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for (bits, size, sym, desc_act), signs in itertools.product(GRID, SIGNS):
        name = f"{bits}-{size}-{sym}-{desc_act}-{signs}"
        order = torch.randperm(K, generator=generator) if desc_act else None
        g_idx = group_index(K, max(size, 0), order).to(torch.int32)
        groups = int(g_idx.max()) + 1
        codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
        zeros = torch.full((N, groups), 2 ** (bits - 1), dtype=torch.uint8)
        if not sym:
            zeros = torch.randint(1, 2**bits, (N, groups), dtype=torch.uint8, generator=generator)
        scales = torch.rand(groups, N, generator=generator).half() * 0.05
        if signs == "negative":
            scales *= torch.where(torch.rand(groups, N, generator=generator) < 0.5, -1, 1)
        parts = {"qweight": pack_codes(codes, bits), "scales": scales, "g_idx": g_idx}
        parts["qzeros"] = pack_zeros(zeros, bits, VERSIONS[version_name])
        tensors |= {f"{name}.{key}": part for key, part in parts.items()}
        shape = {"bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act}
        cases.append({"name": name, "format": version_name, "dtype": "float16", **shape})
    return cases, tensors


def ask(python: Path, folder: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    file = folder / "request.json"
    file.write_text(json.dumps(request), "utf-8")
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, WORKER, file], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("reader", "version"), [("autogptq", "gptq"), ("gptqmodel", "gptq"), ("gptqmodel", "gptq_v2")]
)
def test_the_real_readers_see_our_numbers(reader: str, version: str, tmp_path: Path) -> None:
    python = python_of(reader)
    cases, tensors = make_cases(version)
    save_file(tensors, tmp_path / "in.safetensors")
    files = {"tensors": str(tmp_path / "in.safetensors"), "out": str(tmp_path / "out.safetensors")}
    said = ask(python, tmp_path, {"do": "dequantize", "reader": reader, "cases": cases, **files})
    assert [line for line in said if "refused" in line] == []
    theirs = load_file(tmp_path / "out.safetensors")
    wrong = []
    for case in cases:
        qweight, qzeros, scales, g_idx = (tensors[f"{case['name']}.{part}"] for part in PARTS)
        ours = dequantize(qweight, qzeros, scales, g_idx, case["bits"], VERSIONS[version])
        got = theirs[case["name"]]
        assert got.dtype == (torch.float32 if reader == "autogptq" else torch.float16)
        if not torch.equal(got.T, ours.to(got.dtype)):
            wrong.append(case["name"])
    assert wrong == []
