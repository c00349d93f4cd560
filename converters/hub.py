"""A model on the hub, by its id."""

from pathlib import Path

import huggingface_hub

from converters.sources import Source, folder_source
from converters.token_roles import EosRule


def hub_source(repo: str, revision: str | None, eos: EosRule, *, low_disk: bool, quiet: bool) -> Source:
    """Download a model's snapshot and return it as a source."""
    folder = huggingface_hub.snapshot_download(repo, revision=revision)
    return folder_source(Path(folder), eos)
