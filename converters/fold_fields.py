"""What a GGUF's metadata says of a fold (quantize/folding.py): written and read.

dscq.fold                    "channel scales, powers of 2^(1/8)"
dscq.fold.attention_mixed    the exponents, int8, those of layer 0 first: base64, which is quick to write
dscq.fold.mlp_inner          and to read where an array would be taken item by item
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter

from quantize.errors import CheckpointError
from quantize.folding import PAIRS, STEPS, Fold, Place, n_channels
from quantize.llama import LlamaConfig

NOTE = "channel scales are folded: adapters (LoRA) made for the original model do not fit this file"
_KEY = "dscq.fold"
_KIND = f"channel scales, powers of 2^(1/{STEPS})"
_MOST_TEXT = 100


def add_fold(writer: GGUFWriter, fold: Fold) -> None:
    """Add what was done to a file's metadata."""
    writer.add_string(_KEY, _KIND)
    for name in PAIRS:
        exponents = torch.cat([fold.exponents[layer, name] for layer in range(fold.config.n_layers)])
        writer.add_string(f"{_KEY}.{name}", base64.b64encode(exponents.numpy().tobytes()).decode("ascii"))


def read_fold(metadata: Mapping[str, Any], config: LlamaConfig) -> Fold | None:
    """Return what a file's metadata says was done, None if nothing.

    Raises CheckpointError for another kind of folding, or for other than one exponent for each channel.
    """
    if _KEY not in metadata:
        return None
    if metadata[_KEY] != _KIND:
        found = str(metadata[_KEY])[:_MOST_TEXT]
        raise CheckpointError(f"{_KEY} is {found!r}; supported: {_KIND!r}", hint="a newer dscq may read it")
    exponents = dict[Place, torch.Tensor]()
    for name in PAIRS:
        for layer, part in enumerate(_exponents(metadata, name, config)):
            exponents[layer, name] = part
    return Fold(config, exponents)


def _exponents(metadata: Mapping[str, Any], name: str, config: LlamaConfig) -> torch.Tensor:
    """Return the exponents of an input, int8 (n_layers, K)."""
    key, n = f"{_KEY}.{name}", n_channels(config, name)
    try:
        data = base64.b64decode(str(metadata.get(key, "")), validate=True)
    except (binascii.Error, ValueError):
        raise CheckpointError(f"{key} is no base64") from None
    if len(data) != config.n_layers * n:
        raise CheckpointError(f"{key} has {len(data)} bytes, expected {config.n_layers * n}")
    return torch.from_numpy(np.frombuffer(data, np.int8).copy()).reshape(config.n_layers, n)
