"""A codec is its block layout: rows of numbers to rows of bytes, and back.

GGML stores a matrix row by row, and a row as blocks of `block_size` neighbouring weights that share what
the type says they share (a scale, a minimum). A codec is one small class without state; defining it
with a name registers it, so a new quant type costs one class in the file of its family.

Rows are independent of each other. That is what makes the pipeline simple: any slice of rows may be
encoded at any time by any thread, and the bytes are the same.

Importances are one number per column of the matrix: how much an error in that column matters, as measured
on text (an imatrix). Types that search for their scales weigh the errors with them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

CODECS: dict[str, "Codec"] = {}


class Codec(ABC):
    """One GGML quant type: the class attributes are the layout.

    `ggml_type` is the number in a GGUF's tensor table and `file_type` the one for `general.file_type`
    of a file made of it; `overflow` is a magnitude below which every finite row encodes to finite numbers
    (infinity where there is none). `uses_importance` says whether importances change the bytes,
    `needs_importance` whether the type cannot be written without, and `writable` whether it can at all.
    """

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    file_type: ClassVar[int]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]
    overflow: ClassVar[float] = float("inf")
    uses_importance: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    writable: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            CODECS[cls.name] = cls()

    @property
    def gains_from_gpu(self) -> bool:
        """Whether `encode` has work for a GPU, and does it on the device of the rows."""
        return False

    def row_bytes(self, n_columns: int) -> int:
        """Return the bytes of one row; `n_columns` must be a multiple of `block_size`."""
        return n_columns // self.block_size * self.block_bytes

    @abstractmethod
    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return the blocks, uint8 (N, row_bytes), of finite float rows (N, K); K a multiple of the block.

        `importance` is float (K,), finite and not negative; types that do not use it ignore it, as ggml
        does. Raises UsageError where the type needs it and there is none, or its length is not K.
        """

    @abstractmethod
    def decode(self, blocks: torch.Tensor, n_columns: int) -> torch.Tensor:
        """Return what the blocks, uint8 (N, row_bytes), stand for: float32 (N, n_columns)."""
