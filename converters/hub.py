"""A model on the hub, by its id: which files are wanted, at which commit, and what can go wrong.

A branch or tag moves, so its commit is what provenance names. Only the files of a checkpoint are fetched,
into huggingface_hub's own cache: a download that was broken off goes on where it stopped, and a second run
fetches nothing. Tokens, mirrors and offline mode are huggingface_hub's (HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE).
"""

import errno
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from converters.config import read_json
from converters.folder import NO_WEIGHTS, refuse_two_sets, shard_names
from converters.low_disk import RemoteFiles, remote_inventory
from converters.sources import Source, folder_source
from converters.token_roles import EosRule
from quantize.errors import CheckpointError, DscqError

_SMALL = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|(?i:licen[sc]e.*|notice.*|readme\.md)"
)
# Names of the libraries that have carried huggingface_hub's requests; their errors mean: not reached.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


@dataclass(frozen=True)
class Listing:
    """A model's files at one commit, name -> bytes (None: not said). All names are in the top folder."""

    repo: str
    commit: str
    files: Mapping[str, int | None]


def hub_source(
    repo: str, revision: str | None, eos: EosRule, *, low_disk: bool, headers_only: bool, quiet: bool
) -> Source:
    """Return a model of the hub as a source, after fetching its files.

    With `low_disk` only the small files are fetched now; the headers of the shards are read by range
    requests, and each shard comes when a tensor of it is loaded. `headers_only` does the same for whoever
    will load nothing, but fetches `.bin` shards, whose headers cannot be read from afar. Without a
    connection a complete copy in the cache will do, and a note says so. Raises CheckpointError with what
    to do about it for a model or revision that does not exist, a gated model, a full disk, no connection.
    """
    if quiet:
        disable_progress_bars()
    try:
        with hub_errors(repo, revision):
            listing = _list(repo, revision)
    except NotReachedError as error:
        return _from_cache(repo, revision, eos, low_disk, error)
    with hub_errors(repo, revision):
        small = [name for name in listing.files if _SMALL.fullmatch(name)]
        shards = _shards(listing)
        from_afar = low_disk or (headers_only and all(".safetensors" in name for name in shards))
        wanted = small if from_afar else [*small, *shards]
        _check_room(listing, wanted)
        # By the user's name of it, so that the cache finds it by that name when there is no connection.
        asked = listing.commit if from_afar else revision
        folder = Path(snapshot_download(repo, revision=asked, allow_patterns=wanted))
    source = _snapshot(folder, repo, eos)
    if not from_afar:
        return source
    remote = RemoteFiles(repo, listing.commit, tuple(shards))
    return replace(source, inventory=lambda: remote_inventory(remote, lambda: hub_errors(repo, revision)))


class NotReachedError(CheckpointError):
    """The hub could not be asked: no connection, offline mode, or the server is down."""


def _list(repo: str, revision: str | None) -> Listing:
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size for file in info.siblings or [] if "/" not in file.rfilename}
    return Listing(repo, str(info.sha), files)


def _shards(listing: Listing) -> list[str]:
    """Return the index, if there is one, and the shards: safetensors, or `.bin` if there is nothing else."""
    for suffix, single in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        index = f"{single}.index.json"
        if index in listing.files:
            path = hf_hub_download(listing.repo, index, revision=listing.commit)
            names = shard_names(read_json(Path(path)), index)
            if single in listing.files:
                refuse_two_sets(listing.repo, single, index, names)
            return [index, *names]
        if single in listing.files:
            return [single]
        loose = [name for name in listing.files if name.endswith(f".{suffix}") and _is_weights(name)]
        if loose:
            return sorted(loose)
    found = ", ".join(sorted(listing.files)) or "no files"
    adapter = "adapter_config.json" in listing.files
    raise CheckpointError(
        f"{listing.repo}: no weights; looked for *.safetensors and pytorch_model*.bin, found {found}",
        hint=f"It is an adapter: fetch it with hf download {listing.repo}, and use --lora."
        if adapter
        else "",
    )


def _is_weights(name: str) -> bool:
    return not name.startswith(NO_WEIGHTS)


def _check_room(listing: Listing, wanted: Iterable[str]) -> None:
    """Refuse a download that does not fit on the disk of the cache."""
    absent = [name for name in wanted if not is_cached(listing.repo, name, listing.commit)]
    n_bytes = sum(listing.files.get(name) or 0 for name in absent)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise CheckpointError(
            f"{listing.repo}: the download needs {n_bytes:,} bytes, {cache} has {free:,} free",
            hint="Use --low-disk, or move the cache with HF_HUB_CACHE.",
        )


def is_cached(repo: str, name: str, commit: str) -> bool:
    """Return whether huggingface_hub's cache holds a file at a commit."""
    return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)


def _snapshot(folder: Path, repo: str, eos: EosRule) -> Source:
    """Return a snapshot's folder, which is named after its commit, as a source with the model's own name."""
    return replace(folder_source(folder, eos), label=repo, name=repo.split("/")[-1], revision=folder.name)


def _from_cache(
    repo: str, revision: str | None, eos: EosRule, low_disk: bool, error: NotReachedError
) -> Source:
    """Return the copy in the cache, or raise the error of the connection."""
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if low_disk or not isinstance(config, str):
        raise error
    folder = Path(config).parent
    source = _snapshot(folder, repo, eos)
    return replace(source, notes=(*source.notes, f"the hub was not reached; using the cached {folder.name}"))


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into ones that say what to do."""
    try:
        yield
    except DscqError:
        raise
    except Exception as error:
        known = _explain(error, repo, revision)
        if known is None:
            raise
        raise known from None


def _explain(error: Exception, repo: str, revision: str | None) -> CheckpointError | None:
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo}: a gated model, and this machine has no access to it",
            hint=f"Ask for access on {constants.ENDPOINT}/{repo}, then: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo}: no such folder, and no such model on {constants.ENDPOINT} (or a private one)",
            hint="Check the spelling; for a private model: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        known = ", ".join(_references(repo))
        return CheckpointError(
            f"{repo}: no revision {revision!r}", hint=f"It has: {known}, or a full commit." if known else ""
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo}: no valid hub id: {error}")
    return _explain_transfer(error, repo)


def _explain_transfer(error: Exception, repo: str) -> CheckpointError | None:
    """Explain what goes wrong under way: the disk, the server, the connection."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{repo}: the disk is full: {error.filename or constants.HF_HUB_CACHE}",
            hint="What was fetched is kept. Use --low-disk, or move the cache with HF_HUB_CACHE.",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NotReachedError(
            f"{repo}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            hint="Unset HF_HUB_OFFLINE, or give a folder that holds the model.",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        kind = NotReachedError if status >= 500 else CheckpointError
        return kind(f"{repo}: the hub answered {status}: {str(error).splitlines()[0]}")
    carried_by = type(error).__module__.split(".")[0]
    if carried_by in _TRANSPORTS or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return NotReachedError(
            f"{repo}: no such folder, and {constants.ENDPOINT} cannot be reached ({type(error).__name__})",
            hint="Check the connection and run again (what was fetched is kept), or give a local folder.",
        )
    return None


def _references(repo: str) -> list[str]:
    """Return the names of a model's branches and tags; nothing if even that fails."""
    try:
        references = HfApi().list_repo_refs(repo)
    except Exception:  # the revision's own error is what the user should see
        return []
    return [reference.name for reference in (*references.branches, *references.tags)]
