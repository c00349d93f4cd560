"""The grids of the IQ1, IQ2 and IQ3 types: the points that eight (or four) neighbouring weights may take.

The points are those of ggml; gguf-py carries them, and from there they are read once per type. A search
also needs, for each combination of codes that is no point, its neighbours: the points at the one to three
smallest distances. They are found once per type, on first use, in well under a second.
"""

from functools import cache
from typing import Any, NamedTuple

import gguf.quants
import numpy as np
import numpy.typing as npt

from quantize.codecs.native import grids as native

# How many different distances count as near (ggml `iq2xs_init_impl`, `iq3xs_init_impl`).
_NEAR = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}


class Grid(NamedTuple):
    """A grid for a search; G points of n weights, and codes packed as digits to the base of the levels.

    `point` is the point of packed codes, or -1; then its neighbours are `members[first:last]`, the nearest
    first. `terms` (G, n) says for each point and weight where in a table (n, levels) the error of that weight
    at that level lies. `levels` are the points' codes (G, n), `values` what a search takes the codes for.
    """

    levels: npt.NDArray[np.int8]
    values: npt.NDArray[np.float32]
    point: npt.NDArray[np.int16]
    first: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    members: npt.NDArray[np.uint16]
    terms: npt.NDArray[np.uint8]


@cache
def values(name: str) -> npt.NDArray[np.float32]:
    """Return the points of a type as what they decode to: float32 (G, 8), or (G, 4) for the IQ3 types."""
    source: Any = getattr(gguf.quants, name)
    source.init_grid()
    return np.ascontiguousarray(source.grid.reshape(source.grid_shape), np.float32)


@cache
def levels(name: str) -> npt.NDArray[np.int8]:
    """Return the points of a type as codes 0, 1, 2, ...: int8 of the shape of `values`."""
    steps = np.array(getattr(gguf.quants, name).grid_map, np.float32)
    return np.searchsorted(steps, values(name)).astype(np.int8)


@cache
def grid(name: str) -> Grid:
    """Return the grid of a type with its neighbours."""
    codes = levels(name)
    n_levels = 3 if codes.shape[1] == 8 else 8
    # -1, 0, 1 for IQ1; odd numbers for the others: 1, 3, 5, ...
    shown = np.arange(-1, 2) if name == "IQ1_S" else 2 * np.arange(n_levels) + 1
    return Grid(codes, shown.astype(np.float32), *native.neighbours(codes, n_levels, _NEAR[name]))


# The first seven signs of eight weights, completed so that their number is even.
PARITY_SIGNS = np.array([s | (s.bit_count() & 1) << 7 for s in range(128)], np.uint8)
