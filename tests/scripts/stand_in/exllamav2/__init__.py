"""A stand-in for ExLlamaV2 that answers from this project's own forward, on a CPU: for what drives it, alone.

FAULT in the environment makes it wrong: "rope" loses the factor of the positions, "bos" writes BOS twice,
"crash" does not load.
"""

import dataclasses
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer

from converters.exl2_source import open_exl2
from quantize.reference import ReferenceModel

__version__ = "stand-in"
FAULT = os.environ.get("FAULT", "")


class ExLlamaV2Config:
    """The folder, and what the worker sets."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.max_seq_len = 16384
        self.no_sdpa = False


class ExLlamaV2:
    """A model that has no cache: it runs all tokens again."""

    def __init__(self, config: ExLlamaV2Config) -> None:
        self.config = config

    def load(self) -> None:
        """Open the folder."""
        if FAULT == "crash":
            raise SystemExit("no kernel image is available")
        file = open_exl2(Path(self.config.folder))
        factor = 1.0 if "rope" in FAULT else file.config.rope_factor
        self.model = ReferenceModel(dataclasses.replace(file.config, rope_factor=factor), file.weights)

    def forward(self, ids: torch.Tensor, cache: "ExLlamaV2Cache", cpu_logits: bool = False) -> torch.Tensor:
        """Return the logits (1, n, padded vocabulary) of n new tokens."""
        assert self.config.no_sdpa and ids.device.type == "cpu"
        known = cache.ids[: cache.current_seq_len] + ids[0].tolist()
        assert len(known) <= cache.max_seq_len <= self.config.max_seq_len
        cache.ids, cache.current_seq_len = known, len(known)
        (hidden,) = self.model.hidden([torch.tensor(known)])
        logits = self.model.logits(hidden[-ids.shape[1] :]).half()
        return torch.nn.functional.pad(logits, (0, 32), value=-65504.0)[None]


class ExLlamaV2Cache:
    """The tokens that were seen."""

    def __init__(self, model: ExLlamaV2, max_seq_len: int) -> None:
        assert max_seq_len % 256 == 0
        self.max_seq_len = max_seq_len
        self.current_seq_len = 0
        self.ids = list[int]()


class ExLlamaV2Tokenizer:
    """The folder's tokenizer.json."""

    def __init__(self, config: ExLlamaV2Config) -> None:
        self.bos = open_exl2(Path(config.folder)).vocabulary.bos_id
        self.tokenizer = Tokenizer.from_file(str(Path(config.folder, "tokenizer.json")))

    def encode(self, text: str, add_bos: bool) -> torch.Tensor:
        """Return ids (1, n)."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor([[self.bos] * (2 if "bos" in FAULT else int(add_bos)) + ids])
