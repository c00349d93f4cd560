"""Weights that are fetched shard by shard and deleted when they have been used.

A disk with room for two shards is enough for any model. What a shard holds is known from its header, which
a range request of a few kilobytes brings; the shard itself comes when the first of its tensors is loaded.
`specs` lists the tensors shard by shard, so whoever walks through them in that order fetches each shard
once. Two stay on the disk, because a layer may begin in one and end in the next.
"""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, errors, hf_hub_download, try_to_load_from_cache

from converters.inventory import Found, Inventory
from converters.safetensors_header import TORCH_DTYPES, read_header
from converters.shards import map_tensor
from quantize.errors import CheckpointError
from quantize.weights import TensorSpec

_KEPT = 2

Guard = Callable[[], AbstractContextManager[None]]
"""Opens a context in which the hub's errors become the user's."""


@dataclass(frozen=True)
class RemoteFiles:
    """The shards of a model of the hub at one commit."""

    repo: str
    commit: str
    shards: tuple[str, ...]


def remote_inventory(remote: RemoteFiles, guard: Guard) -> Inventory:
    """Read the headers of all shards by range requests; raises CheckpointError for `.bin` shards."""
    shards = [name for name in remote.shards if name.endswith(".safetensors")]
    if not shards:
        raise CheckpointError(
            f"{remote.repo}: --low-disk needs safetensors shards, this model has {', '.join(remote.shards)}",
            hint="Convert without --low-disk.",
        )
    found: dict[str, Found] = {}
    home: dict[str, str] = {}
    with guard():
        for shard in shards:
            for name, tensor in _remote_header(remote, shard).items():
                found[name], home[name] = tensor, shard
    return Inventory(found, lambda names: RemoteWeights(remote, found, home, names, guard))


def _remote_header(remote: RemoteFiles, shard: str) -> dict[str, Found]:
    try:
        header = HfApi().parse_safetensors_file_metadata(remote.repo, shard, revision=remote.commit)
    except errors.SafetensorsParsingError as error:
        raise CheckpointError(f"{shard}: damaged header: {error}") from None
    return {name: Found(tuple(info.shape), info.dtype) for name, info in header.tensors.items()}


class RemoteWeights:
    """Weights whose shards come and go; `close`, or dropping the object, removes what is left of them."""

    def __init__(
        self,
        remote: RemoteFiles,
        found: Mapping[str, Found],
        home: Mapping[str, str],
        names: Sequence[str],
        guard: Guard,
    ) -> None:
        self._remote = remote
        self._home = home
        self._guard = guard
        ordered = sorted(names, key=lambda name: remote.shards.index(home[name]))
        self._specs = {n: TensorSpec(n, found[n].shape, TORCH_DTYPES[found[n].dtype]) for n in ordered}
        self._lock = threading.Lock()
        self._fetched: dict[str, Path] = {}  # the shard used last comes last
        # Where downloads of models belong on this machine, rather than on /tmp, which may be memory.
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="dscq-low-disk-", dir=cache))
        self.close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the specs shard by shard, within a shard in the model's order."""
        return self._specs

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of its shard, which is fetched if it is not on the disk."""
        if name not in self._specs:
            raise KeyError(name)
        with self._lock:  # another thread's load may delete a shard before it is mapped
            file = self._fetch(self._home[name])
            entry = next((entry for entry in read_header(file) if entry.name == name), None)
            spec = self._specs[name]
            if entry is None or (entry.shape, TORCH_DTYPES.get(entry.dtype)) != (spec.shape, spec.dtype):
                raise CheckpointError(f"{file.name}: {name} is not what the header on the hub said")
            return map_tensor(file, entry)

    def _fetch(self, shard: str) -> Path:
        """Return a shard on the disk; makes room for a new one first."""
        file = self._fetched.pop(shard, None) or self._cached(shard)
        if file is None:
            while len(self._fetched) >= _KEPT:
                oldest = next(iter(self._fetched))
                self._fetched.pop(oldest).unlink()
            with self._guard():
                remote = self._remote
                path = hf_hub_download(remote.repo, shard, revision=remote.commit, local_dir=self._folder)
            file = Path(path)
        if file.is_relative_to(self._folder):
            self._fetched[shard] = file
        return file

    def _cached(self, shard: str) -> Path | None:
        """Return a shard that the cache has anyway; it is used in place and stays."""
        path = try_to_load_from_cache(self._remote.repo, shard, revision=self._remote.commit)
        return Path(path) if isinstance(path, str) else None
