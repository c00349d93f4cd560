"""Compile Python functions to machine code on their first call, and keep the code on disk.

Numba's own cache looks only at the file of the function itself; code that was inlined from another module
would go stale unnoticed. So the key of the cache holds a digest of this package's and the solver's sources.
The files lie beside the modules, or in the user's cache folder where that is read-only.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def _sources_digest() -> str:
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), *sorted(here.parents[1].glob("solver/*kernels.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


class _PackageCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _sources_digest())


def native(function: Function) -> Function:
    """Compile a function on its first call, with C's division, and let other threads run meanwhile."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _PackageCache(function)
    return cast(Function, dispatcher)


def fused(function: Function) -> Function:
    """Do what `native` does, and let a product and a sum be one operation: for what has no bits to match."""
    dispatcher = njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)
    dispatcher._cache = _PackageCache(function)
    return cast(Function, dispatcher)


def inlined(function: Function) -> Function:
    """Put a function's code where `native` ones call it: for what is too short to be handed arrays."""
    return cast(Function, njit(nogil=True, error_model="numpy", inline="always")(function))
