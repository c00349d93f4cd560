"""A folder in GPTQ's format, read without any code of the project that writes one.

Codes lie along the inputs of `qweight`, zero-points along the outputs of `qzeros`, both as one string of bits
from the lowest bit of the first word on, whatever the width. The weight of output n and input k is
scales[g, n] * (code - zero) with g = g_idx[k]; version 1 of the format stores zero - 1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from quantize.weights import TensorSpec, Weights

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the fields of `bits` bits, int32 (rows, n * 32 / bits), of int32 words (rows, n)."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    fields = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    return torch.from_numpy(fields @ (1 << np.arange(bits, dtype=np.int32)))


@dataclass(frozen=True)
class GptqWeights:
    """A checkpoint's weights, with those linears that the folder holds dequantized in f32 in their place."""

    checkpoint: Weights
    folder: Path

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the checkpoint's tensors."""
        return self.checkpoint.specs()

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor: f32 (N, K) of a quantized linear; all else must be the checkpoint's, rounded."""
        config = json.loads((self.folder / "config.json").read_text("utf-8"))["quantization_config"]
        [path] = self.folder.glob("*.safetensors")
        with safe_open(path, "pt") as file:
            stem = name.removesuffix("weight")
            if f"{stem}qweight" in file.keys():  # noqa: SIM118  (the file is no mapping)
                less_one = config.get("checkpoint_format", "gptq") == "gptq"
                parts = {part: file.get_tensor(stem + part) for part in PARTS}
                return dequantize(**parts, bits=config["bits"], zeros_less_one=less_one)
            stored: torch.Tensor = file.get_tensor(name)
        plain = self.checkpoint.load(name)
        if not torch.equal(stored.float(), plain.to(stored.dtype).float()):
            raise ValueError(f"{path}: {name} is neither quantized nor the checkpoint's")
        return stored


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    zeros_less_one: bool,
) -> torch.Tensor:
    """Return the weights, f32 (N, K).

    qweight (K * bits / 32, N), qzeros (G, N * bits / 32), g_idx (K,) are int32, scales (G, N) f16.
    """
    codes, zeros = unpack_bits(qweight.T, bits), unpack_bits(qzeros, bits).T + int(zeros_less_one)
    group = g_idx.long()
    return scales.float().T[:, group] * (codes - zeros[:, group]).float()
