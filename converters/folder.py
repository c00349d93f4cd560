"""A checkpoint folder: where its weights are, and which folders only look like one.

The order is that of transformers, except that nothing is chosen silently between two sets of weights:

    model.safetensors                         one shard
    model.safetensors.index.json              the shards that it names
    *.safetensors (no adapter, no optimizer)  shards without an index
    pytorch_model.bin, .bin.index.json        the same for torch's own format, if there is no safetensors

A training run leaves folders that hold a model in pieces (ZeRO, FSDP), an adapter instead of a model, or
a row of checkpoints. Each is recognised and refused with the command or the path that helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converters.config import read_json
from quantize.errors import CheckpointError

NO_WEIGHTS = ("adapter_", "optimizer", "scheduler", "training_args", "rng_state", "consolidated")
_LISTED = 10


@dataclass(frozen=True)
class WeightFiles:
    """The shards of a checkpoint, in their order."""

    kind: Literal["safetensors", "bin"]
    files: tuple[Path, ...]


def find_weights(folder: Path) -> WeightFiles:
    """Return the shards in a folder; raises CheckpointError with every reason, or with what it is instead."""
    single = folder / "model.safetensors"
    found = _indexed(folder, "model.safetensors.index.json", single) or _files(folder, "*.safetensors")
    if found:
        return WeightFiles("safetensors", tuple(found))
    binary = _indexed(folder, "pytorch_model.bin.index.json", folder / "pytorch_model.bin")
    found = binary or _files(folder, "pytorch_model*.bin")
    if found:
        return WeightFiles("bin", tuple(found))
    raise explain_no_weights(folder)


def holds_weights(folder: Path) -> bool:
    """Return whether there is anything in the folder that `find_weights` would take for weights."""
    patterns = ("*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
    return any(_files(folder, pattern) for pattern in patterns)


def _indexed(folder: Path, index_name: str, single: Path) -> list[Path]:
    """Return the shards that the index names, else the single file, else nothing."""
    index = folder / index_name
    if not index.is_file():
        return [single] if single.is_file() else []
    names = shard_names(read_json(index), index_name)
    if single.is_file():
        refuse_two_sets(str(folder), single.name, index_name, names)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        reasons = [f"{name}: named by {index_name}, but not in the folder" for name in absent]
        raise CheckpointError("shards are missing", reasons=reasons)
    return [folder / name for name in names]


def refuse_two_sets(where: str, single: str, index_name: str, names: Sequence[str]) -> None:
    """Raise CheckpointError for a single file beside an index that does not name it: which one is meant?"""
    if single not in names:
        raise CheckpointError(
            f"{where}: two sets of weights, {single} and the shards of {index_name}",
            hint="Remove the one that is out of date.",
        )


def shard_names(index: dict[str, object], index_name: str) -> list[str]:
    """Return the distinct shards of an index file's `weight_map`, sorted; raises CheckpointError.

    A name with a folder in it is refused: an index must not point outside of its own folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_name}: no weight_map (tensor name -> shard)")
    names = sorted({str(name) for name in weight_map.values()})
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{index_name}: expected plain file names, found {', '.join(strange)}")
    return names


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith(NO_WEIGHTS))


def explain_no_weights(folder: Path) -> CheckpointError:
    """Return the error for a folder without weights: what it is instead, and what to do."""
    for explain in (explain_partitions, _sharded_by_fsdp, _adapter, _run_with_checkpoints, _gguf):
        error = explain(folder)
        if error is not None:
            return error
    names = sorted(path.name for path in folder.iterdir())
    content = ", ".join(names[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
    return CheckpointError(
        f"{folder}: no weights; looked for *.safetensors and pytorch_model*.bin, found {content or 'nothing'}"
    )


def explain_partitions(folder: Path) -> CheckpointError | None:
    """Return the error for ZeRO partitions, whether the folder holds a `global_stepN` or is one, or None."""
    steps = sorted(folder.glob("global_step*/*_states.pt"))
    if steps:
        root, tag = folder, steps[-1].parent.name
    elif any(folder.glob("*_optim_states.pt")) or any(folder.glob("*zero_pp_rank*")):
        root, tag = folder.parent, folder.name
    else:
        return None
    script = root / "zero_to_fp32.py"
    text = script.read_text("utf-8", "replace") if script.is_file() else ""
    # Scripts of before 2024 write one file of the given name, later ones shards into the given folder.
    destination = "pytorch_model.bin" if text and "output_dir" not in text else "."
    where = "" if text else " (the script is DeepSpeed's deepspeed/utils/zero_to_fp32.py)"
    return CheckpointError(
        f"{folder}: only ZeRO partitions ({tag}), no whole weights",
        hint=f"Join them first: cd {root} && python zero_to_fp32.py . {destination} -t {tag}{where}",
    )


def _sharded_by_fsdp(folder: Path) -> CheckpointError | None:
    parts = sorted(folder.glob("*/*.distcp")) or sorted(folder.glob("*.distcp"))
    if not parts:
        return None
    pieces = parts[0].parent
    target = pieces.parent if pieces != folder else folder.parent
    return CheckpointError(
        f"{folder}: only FSDP shards ({pieces.name}), no whole weights",
        hint=f"Join them first: accelerate merge-weights {pieces} {target}",
    )


def _adapter(folder: Path) -> CheckpointError | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path") or "BASE"
    return CheckpointError(
        f"{folder}: a LoRA adapter, not a model",
        hint=f"Give its base as the model and the adapter beside it: {base} --lora {folder}",
    )


def _run_with_checkpoints(folder: Path) -> CheckpointError | None:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if not found:
        return None
    found.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    return CheckpointError(
        f"{folder}: no weights of its own, but {len(found)} checkpoints of a training run",
        reasons=[str(path) for path in found],
        hint=f"Give one of them, for example the latest: {found[0]}",
    )


def _gguf(folder: Path) -> CheckpointError | None:
    files = _files(folder, "*.gguf")
    if not files:
        return None
    listed: Sequence[str] = [str(file) for file in files]
    return CheckpointError(
        f"{folder}: GGUF files, no checkpoint", reasons=listed, hint="Give the file itself, not its folder."
    )
