"""The predicted losses of all of a model's matrices under every quant type: made once, kept in the archive.

They depend on the model, the statistics and the encoders, and on nothing that a size or a recipe says. So the
first plan takes a while, about that of encoding 96 rows of each matrix under every type, and the next takes
none. A file of the archive's folder has them, `type-losses-KEY.json` (readers of archives pass over it):

    key      of the model and the statistics (their hashes), encoders, solver, constants and way of rounding
    kl       the checkpoint's name of each matrix -> quant type -> nats
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from converters.checkpoint import Checkpoint
from converters.disk import write_whole
from converters.hessians import Hessians, check_hessians
from converters.imatrix import Importances
from converters.plan import ConvertOptions
from converters.stats.archive import Archive
from converters.stream import one_thread_per_worker
from quantize import type_errors
from quantize.codecs import ENCODING
from quantize.errors import ArchiveError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from quantize.reference import INPUTS
from quantize.sensitivity import fisher_kl
from quantize.solver import SOLVING
from quantize.solver.block_factor import DAMP, BlockFactor, prepare_blocks
from quantize.solver.blocks import compensated_types
from quantize.type_errors import Rounding, predict_types, predicted_kl, token_frequencies, usable_types

Losses = Mapping[str, Mapping[str, float]]
"""Nats by the checkpoint's name of a matrix and by quant type."""
OnTensor = Callable[[int, int], None]
_Shared = tuple[torch.Tensor, BlockFactor | None]
_VERSION = 4


def kept_losses(options: ConvertOptions) -> Losses | None:
    """Return what an earlier plan found for the options' archive and way of rounding, if it did."""
    path, key = _place(options)
    try:
        found = json.loads(path.read_text("utf-8"))
        kl = {
            str(name): {str(quant): float(nats) for quant, nats in each.items()}
            for name, each in found["kl"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # as good as none: it is made anew
    whole = set(kl) == set(_matrices(_archive(options).config))
    return kl if found["key"] == key and whole else None


def measured_losses(
    checkpoint: Checkpoint, options: ConvertOptions, on_tensor: OnTensor = lambda *_: None
) -> Losses:
    """Predict the loss of every matrix under every type it can have, and keep them in the archive's folder.

    Options that compensate have the rows' first tokens, unless tokens count by their gradients anyway.
    `on_tensor` is called with (done, in all). Raises ArchiveError for an archive that has diagonals alone,
    HessianError, and OutputError where the folder cannot be written.
    """
    archive, names = _archive(options), _matrices(checkpoint.config)
    check_hessians(archive)
    work = _Work(checkpoint, archive, options)
    losses: dict[str, dict[str, float]] = {}
    with one_thread_per_worker(), ThreadPoolExecutor(options.n_threads) as pool:
        for name, kl in zip(names, pool.map(work.predict, names), strict=True):
            losses[name] = kl
            on_tensor(len(losses), len(names))
    path, key = _place(options)
    write_whole(path, json.dumps({"key": key, "kl": losses}, indent=1).encode())
    return losses


class _Work:
    def __init__(self, checkpoint: Checkpoint, archive: Archive, options: ConvertOptions) -> None:
        self.checkpoint, self.compensate = checkpoint, options.compensate
        self.hessians: Hessians[bool, _Shared] = Hessians(archive, _prepared, first=options.first_tokens)
        self.rows = {} if options.importances is None else options.importances.rows
        self.frequencies = token_frequencies(archive.token_counts())
        self.gradients, self.knows_embedding = archive.gradients() or {}, archive.knows_embedding
        self.measured = {*archive.linears(), *([EMBEDDING] if self.knows_embedding else [])}

    @torch.inference_mode()
    def predict(self, name: str) -> dict[str, float]:
        """Return a matrix's nats by type; from any thread."""
        W, importance = self.checkpoint.weights.load(name).float(), self.rows.get(name)
        types = usable_types(W.shape[1], measured=importance is not None)
        H, factor = self.hessians.prepared(name, self.compensate) if name in self.measured else (None, None)
        kind = _kind(name, self.checkpoint.config)
        weights, rows = self._weights(kind, W), type_errors.ROWS
        found = predict_types(W, types, Rounding(factor, importance), H, weights, rows)
        return predicted_kl(kind, found, self._whole(name, kind, found.energy, W.shape[0]))

    def _whole(self, name: str, kind: str, energy: float, n_outputs: int) -> float | None:
        """Return the nats that all of a matrix's energy stands for, where gradients say it."""
        if kind == type_errors.EMBEDDING:
            return energy / 2 if self.knows_embedding else None
        gradient = self.gradients.get(name)
        return None if gradient is None else fisher_kl(energy, n_outputs, gradient)

    def _weights(self, kind: str, W: torch.Tensor) -> torch.Tensor | None:
        if kind == type_errors.OUTPUT:
            return self.frequencies
        if kind == type_errors.EMBEDDING and self.knows_embedding:
            return self.frequencies
        if kind == type_errors.EMBEDDING:
            return self.frequencies / W.square().sum(1).clamp(min=1e-30)
        return None


def _prepared(
    H: torch.Tensor, damp_scale: float, compensate: bool, name: str
) -> tuple[_Shared, tuple[str, ...]]:
    factor = prepare_blocks(H, damp=DAMP * damp_scale, name=name) if compensate else None
    return (H, factor), () if factor is None else factor.log


def _kind(name: str, config: LlamaConfig) -> str:
    """Return a matrix's kind; an embedding that is the output matrix too counts as that, as in recipes."""
    if name == HEAD or (name == EMBEDDING and config.tied_head):
        return type_errors.OUTPUT
    if name == EMBEDDING:
        return type_errors.EMBEDDING
    return next(linear for linear in INPUTS if name.endswith(f".{linear}.weight"))


def _matrices(config: LlamaConfig) -> list[str]:
    return [name for name, shape in config.tensor_shapes().items() if len(shape) > 1]


def _archive(options: ConvertOptions) -> Archive:
    if options.archive is None:
        raise ArchiveError("losses are predicted from statistics, and there are none", hint="give --stats")
    return options.archive


def _place(options: ConvertOptions) -> tuple[Path, str]:
    """Return where the losses lie, and their key."""
    archive = _archive(options)
    members = {name: member.sha256 for name, member in sorted(archive.manifest.members.items())}
    if archive.variant:
        members["variant"] = archive.variant
    decided = {
        "versions": [_VERSION, ENCODING, SOLVING, type_errors.ROWS, dict(type_errors.SENSITIVITY)],
        "model": archive.manifest.request.model,
        "members": members,
        "compensated": list(compensated_types()) if options.compensate else [],
        "importances": _digest(options.importances),
    }
    key = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
    return archive.folder / f"type-losses-{key[:16]}.json", key


def _digest(importances: Importances | None) -> str:
    digest = hashlib.sha256()
    for name, row in sorted({} if importances is None else importances.rows.items()):
        digest.update(name.encode() + row.float().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
