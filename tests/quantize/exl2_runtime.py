"""ExLlamaV2's own packing and loading of EXL2 matrices, compiled for the CPU from its package's sources.

`q_matrix.cu` and `pack_tensor.cu` are compiled as they are, but for the launches of kernels, which C++ does
not know and which become calls; exl2_shim/ stands in for CUDA's headers. Nothing of the package is part of
this project: scripts/exllamav2_sources fetches it, the environment variable DSCQ_EXLLAMAV2 names its folder.
"""

import ast
import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantize.codecs.exl2 import Exl2Linear, Exl2Tensors

SHIM = Path(__file__).parent / "exl2_shim"
VARIABLE = "DSCQ_EXLLAMAV2"
LAUNCH = re.compile(r"(\w+(?:<\d+>)?)\s*<<<\s*(\w+)\s*,\s*(\w+)[^>]*>>>")


class Runtime:
    """The runtime of a package's folder, built into another."""

    def __init__(self, package: Path, build: Path) -> None:
        self._library = ctypes.CDLL(str(_build(package, build)))
        self._group_map = _function(package / "ext.py", "make_group_map_py")

    def pack_codes(self, linear: Exl2Linear) -> torch.Tensor:
        """Return q_weight of outputs that need no padding."""
        parts, start = [], 0
        for group in linear.groups:
            codes = linear.codes[:, start : start + group.size].T.to(torch.int16).contiguous()
            words = torch.zeros(group.words, len(linear.codes), dtype=torch.int32)
            sizes = (group.size, group.words, len(linear.codes), group.bits)
            self._library.pack_codes(*_pointers(codes, words), *sizes)
            parts.append(words)
            start += group.size
        return torch.cat(parts)

    def pack_scales(self, linear: Exl2Linear) -> torch.Tensor:
        """Return q_scale of outputs that need no padding."""
        scales = linear.scales.T.to(torch.int16).contiguous()
        words = torch.zeros(scales.shape[0], scales.shape[1] // 8, dtype=torch.int32)
        self._library.pack_scales(*_pointers(scales, words), *scales.shape)
        return words

    def weights(self, tensors: Exl2Tensors) -> torch.Tensor:
        """Return f16 (N, K) as loaded and reconstructed, padding included.

        What `load_weight` and `make_q_matrix` do in Python is said here again: the order of inputs, the
        maxima's division in place, the 16 bits of the permutation.
        """
        maxima = tensors.q_scale_max.clone()
        maxima *= 1 / 256
        invperm = tensors.q_invperm
        perm = torch.argsort(invperm).to(torch.int)
        n_inputs, n_outputs = len(invperm), tensors.q_weight.shape[1]
        weights = torch.full((n_inputs, n_outputs), float("nan"), dtype=torch.float16)
        pointers = _pointers(
            tensors.q_weight.clone(),
            perm.short(),
            invperm.short(),
            tensors.q_scale,
            maxima,
            tensors.q_groups,
            self._group_map(tensors.q_groups, len(tensors.q_weight)),
        )
        counts = (n_inputs, n_outputs, len(maxima))
        self._library.reconstruct(*pointers, *counts, *_pointers(weights))
        return weights.T


def _pointers(*tensors: torch.Tensor) -> list[Any]:
    pointers = []
    for tensor in tensors:
        assert tensor.is_contiguous()
        pointer = ctypes.c_void_p(tensor.data_ptr())
        pointer.tensor = tensor  # type: ignore[attr-defined]  # keeps it until the call is over
        pointers.append(pointer)
    return pointers


def _build(package: Path, build: Path) -> Path:
    cuda = package / "exllamav2_ext" / "cuda"
    sources = [SHIM / "judge.cpp"]
    for name in ("q_matrix", "pack_tensor"):
        text = (cuda / f"{name}.cu").read_text("utf-8")
        sources.append(build / f"{name}.cpp")
        sources[-1].write_text(LAUNCH.sub(r"launch(\2, \3, \1)", text), "utf-8")
    library = build / "runtime.so"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{SHIM}", f"-I{cuda}"]
    done = subprocess.run([*command, *map(str, sources), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def _function(path: Path, name: str) -> Callable[..., torch.Tensor]:
    """Return one function of a module that cannot be imported without a GPU."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            scope: dict[str, Any] = {"torch": torch}
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
            found: Callable[..., torch.Tensor] = scope[name]
            return found
    raise AssertionError(f"no {name} in {path}")
