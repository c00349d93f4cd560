"""What a user may name as a source, turned into the three things that a checkpoint is made of.

A `Source` is not opened yet: config, inventory and tokenizer are calls, each of which may fail with its
own reasons, so that whoever assembles the checkpoint can collect all of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from converters.bin_shards import bin_inventory
from converters.config import read_config, read_json
from converters.disk import readable
from converters.folder import WeightFiles, explain_no_weights, explain_partitions, find_weights, holds_weights
from converters.gguf_source import open_gguf
from converters.inventory import Inventory, found_by_spec
from converters.shards import safetensors_inventory
from converters.token_roles import DEEPSEEK_END, EosRule
from converters.tokenizer import CheckpointTokenizer, read_tokenizer, tokenizer_from_vocabulary
from converters.travelling import licence_name, travelling_files
from converters.vocabulary import Vocabulary
from quantize.errors import CheckpointError, TokenizerError
from quantize.llama import LlamaConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Source:
    """A checkpoint before it is opened. `label` is what messages call it.

    `advice` is the hint for tensors that do not fit, if the source has one; `files` are those whose names an
    export could take: a GGUF's own shards.
    """

    label: str
    name: str
    config: Callable[[], LlamaConfig]
    inventory: Callable[[], Inventory]
    tokenizer: Callable[[LlamaConfig], CheckpointTokenizer]
    revision: str | None = None
    licence: str | None = None
    travelling: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    advice: str = ""
    files: tuple[Path, ...] = ()


def is_hub_id(text: str) -> bool:
    """Return whether `text` has the form `organisation/name` of a model on the hub."""
    return _HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def folder_source(folder: Path, eos: EosRule) -> Source:
    """Return a local folder as a source.

    Raises CheckpointError at once for a folder that is no checkpoint at all: for that, nothing else about
    it matters.
    """
    with readable(folder):
        return _folder_source(folder, eos)


def _folder_source(folder: Path, eos: EosRule) -> Source:
    if not (folder / "config.json").is_file() and not holds_weights(folder):
        raise explain_no_weights(folder)
    resolved = folder.resolve()
    homes = (resolved, resolved.parent) if _TRAINER_FOLDER.fullmatch(resolved.name) else (resolved,)
    tokenizer_home = next((home for home in homes if (home / "tokenizer.json").is_file()), resolved)
    travelling = next((files for home in homes if (files := travelling_files(home))), ())
    partitioned = explain_partitions(folder)
    notes = [] if tokenizer_home == resolved else [f"tokenizer taken from {tokenizer_home}"]
    return Source(
        label=str(folder),
        name="-".join(home.name for home in reversed(homes)),
        config=lambda: read_config(read_json(folder / "config.json")),
        inventory=lambda: folder_inventory(folder),
        tokenizer=lambda config: read_tokenizer(tokenizer_home, config.vocab_size, eos=eos),
        licence=licence_name(travelling),
        travelling=travelling,
        notes=tuple(notes),
        advice=partitioned.hint if partitioned is not None else "",
    )


def folder_inventory(folder: Path) -> Inventory:
    """Read the headers of a folder's shards; raises CheckpointError with all reasons."""
    weights: WeightFiles = find_weights(folder)
    if weights.kind == "bin":
        return bin_inventory(weights.files)
    return safetensors_inventory(weights.files)


def file_source(path: Path, eos: EosRule) -> Source:
    """Return a GGUF file with F32, F16 or BF16 tensors as a source; raises CheckpointError."""
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path}: a file, but no .gguf; of a checkpoint give the folder: {path.parent}")
    with readable(path):
        file = open_gguf(path)
        travelling = travelling_files(path.resolve().parent)
    if file.fold is not None:
        raise CheckpointError(
            f"{path}: channel scales are folded: adapters and archives of the original do not fit it",
            hint="give the original model, or a file that was made without --fold",
        )
    specs = file.weights.specs()
    found = {name: found_by_spec(spec) for name, spec in specs.items()}
    # What is quantized shows as its quant type, and is refused by the same rule as any other dtype.
    found = {name: replace(tensor, dtype=file.tensor_types[name]) for name, tensor in found.items()}
    licence = file.metadata.get("general.license")
    return Source(
        label=str(path),
        name=str(file.metadata.get("general.name") or path.stem),
        config=lambda: file.config,
        inventory=lambda: Inventory(found, lambda names: file.weights),
        tokenizer=lambda config: tokenizer_from_vocabulary(_with_eos(file.vocabulary, eos)),
        licence=str(licence) if licence else None,
        travelling=travelling,
        files=file.paths,
    )


def _with_eos(vocabulary: Vocabulary, eos: EosRule) -> Vocabulary:
    """Return the vocabulary with the end-of-sentence token as its only stop for `eos="completion"`."""
    if eos == "model":
        return vocabulary
    if DEEPSEEK_END not in vocabulary.tokens:
        raise TokenizerError(f"--eos completion: the vocabulary has no {DEEPSEEK_END}")
    return replace(vocabulary, eos_id=vocabulary.tokens.index(DEEPSEEK_END), eot_id=None)


def unknown_source(text: str) -> CheckpointError:
    """Return the error for a source that is nothing that could be opened."""
    return CheckpointError(
        f"{text}: not found" if text.strip() else "the source is empty; not found",
        reasons=["no such folder", "no such .gguf file", "not a hub id of the form organisation/name"],
    )
