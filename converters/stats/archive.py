"""A statistics archive, opened: statistics by the checkpoint's tensor names, read when they are asked for.

Opening looks at the manifest and at the length of every member. A member's hash is checked when it is first
read, and then its tensors are views of the mapped file, so that an archive of 6 GB costs nothing but what
is used.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from converters.checkpoint import Checkpoint
from converters.imatrix import Importances
from converters.stats import members
from converters.stats.fingerprint import differences, fingerprint
from converters.stats.manifest import SENSITIVE, Manifest, read_manifest
from converters.stats.members import HEAD, ROWS, Rows, block_member
from quantize import llama
from quantize.errors import ArchiveError
from quantize.llama import LlamaConfig, block_tensor
from quantize.reference import HEAD_INPUT, INPUTS
from quantize.statistics import PackedStatistics, Statistics, unpack

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Archive:
    """An archive that is whole, which several threads may read.

    `checked` are the members whose hash was found right.
    """

    folder: Path
    manifest: Manifest
    checked: set[str] = field(default_factory=set)

    @property
    def config(self) -> LlamaConfig:
        """The figures of the model that was calibrated."""
        return LlamaConfig(**self.manifest.request.model["config"])

    @property
    def diagonal_only(self) -> bool:
        """Whether the archive has no Hessians."""
        return bool(self.manifest.request.options["diagonal_only"])

    @property
    def sensitive(self) -> bool:
        """Whether tokens count by their gradients, and not alike."""
        return self.manifest.request.options.get("tokens") == SENSITIVE

    @cached_property
    def knows_embedding(self) -> bool:
        """Whether there are statistics for an embedding that is not the output matrix too."""
        if self.config.tied_head:
            return False
        self._check(HEAD)
        return f"{members.EMBEDDING}.diagonal" in members.member_names(self.folder / HEAD)

    def linears(self) -> list[str]:
        """Return the checkpoint's names of all matrices whose inputs the archive has statistics of."""
        config = self.config
        names = [block_tensor(layer, name) for layer in range(config.n_layers) for name in INPUTS]
        return [*names, llama.EMBEDDING if config.tied_head else llama.HEAD]

    def statistics(self, name: str, device: str = "cpu") -> Statistics:
        """Return on a device the statistics of a matrix's input, by its tensor's name in the checkpoint.

        The embedding stands for a tied head. Otherwise it has no input, and its statistics are those of the
        gradient at its output (quantize/sensitivity.py). Raises ArchiveError for a matrix that has none and
        for a damaged file.
        """
        return unpack(self.packed(name), device)

    def packed(self, name: str) -> PackedStatistics:
        """Return the same as it is stored: views of the mapped file."""
        member, inputs = self._place(name)
        tensors = self._tensors(member, members.statistic_names(inputs, self.diagonal_only))
        n_tokens, diagonal = tensors[f"{inputs}.n_tokens"], tensors[f"{inputs}.diagonal"]
        return PackedStatistics(int(n_tokens), diagonal, tensors.get(f"{inputs}.correlations"))

    def identity(self, name: str) -> str:
        """Return what tells the statistics of a matrix's input from all others; equal ones are the same.

        Raises ArchiveError for a matrix that has none.
        """
        member, inputs = self._place(name)
        return f"{self.manifest.members[member].sha256} {inputs}"

    @property
    def variant(self) -> str:
        """What was made of the statistics that are stored, if they are not given as they are."""
        return ""

    def importances(self) -> Importances:
        """Return the diagonals as an imatrix: what the quant types' searches are weighed with."""
        rows = {name: self.packed(name).diagonal for name in self.linears()}
        corpus = str(self.manifest.request.corpus.get("name", ""))
        return Importances(rows, self.folder.name, corpus, self.manifest.n_rows)

    def token_counts(self) -> torch.Tensor:
        """Return how often each token occurs in the rows of text, int64 (vocab_size,)."""
        return self._tensors(HEAD, ["token_counts"])["token_counts"]

    def gradients(self) -> dict[str, float] | None:
        """Return the mean |g|^2 at each linear's output by its tensor's name; None where it is not known.

        It is over the tokens' weights where the archive is `sensitive`, else over all but first tokens; noise
        has no part in it.
        """
        self._check(HEAD)
        if members.GRADIENTS not in members.member_names(self.folder / HEAD):
            return None
        found = members.gradients_of(self._tensors(HEAD, [members.GRADIENTS])[members.GRADIENTS])
        return {block_tensor(layer, name): value for (layer, name), value in found.items()}

    def rows(self) -> Rows:
        """Return the rows of token ids that were calibrated with."""
        tensors = self._tensors(ROWS, ["ids", "lengths", "kinds"])
        kinds = tuple(self.manifest.kinds[number] for number in tensors["kinds"].tolist())
        return Rows(tensors["ids"], tensors["lengths"], kinds)

    def check_model(self, checkpoint: Checkpoint, *, values: bool = True) -> None:
        """Raise ArchiveError, with every reason, unless this is the model that was calibrated.

        Without `values` only figures and shapes are compared, and no weight is read.
        """
        if reasons := differences(self.manifest.request.model, fingerprint(checkpoint, values=values)):
            raise ArchiveError(
                f"{self.folder}: statistics of another model than {checkpoint.provenance.name}",
                reasons=reasons,
                hint="calibrate this model, or give the archive that was made from it",
            )

    def verify(self) -> None:
        """Check the hash of every member; raises ArchiveError that names all which are damaged."""
        reasons = []
        for name in self.manifest.members:
            try:
                self._check(name)
            except ArchiveError as error:
                reasons.append(error.message)
        if reasons:
            raise ArchiveError(
                f"{self.folder}: damaged", reasons=reasons, hint="calibrate again with --fresh"
            )

    def _place(self, name: str) -> tuple[str, str]:
        """Return the member and the input that belong to a tensor's name."""
        config, block = self.config, _BLOCK.fullmatch(name)
        if block is not None and block[2] in INPUTS and int(block[1]) < config.n_layers:
            return block_member(int(block[1])), INPUTS[block[2]]
        if name == llama.HEAD or (config.tied_head and name == llama.EMBEDDING):
            return HEAD, HEAD_INPUT
        if name == llama.EMBEDDING and self.knows_embedding:
            return HEAD, members.EMBEDDING
        known = f"{', '.join(INPUTS)} of layers 0 to {config.n_layers - 1}, and {llama.HEAD}"
        raise ArchiveError(f"{self.folder}: no statistics for {name}", hint=f"there are those for {known}")

    def _tensors(self, member: str, names: list[str]) -> dict[str, torch.Tensor]:
        self._check(member)
        return members.read_member(self.folder / member, names)

    def _check(self, name: str) -> None:
        if name in self.checked:
            return
        path = self.folder / name
        try:
            found = members.file_hash(path)
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from None
        if found != self.manifest.members[name].sha256:
            hint = "copy the archive again, or calibrate again with --fresh"
            raise ArchiveError(f"{path}: damaged: its sha256 is not the one in the manifest", hint=hint)
        self.checked.add(name)


def open_archive(folder: Path) -> Archive:
    """Open a statistics archive.

    Raises ArchiveError for a folder that is none, an archive of another version, and, with every reason,
    for members that are missing or of another length.
    """
    manifest = read_manifest(folder)
    archive = Archive(folder, manifest)
    if reasons := _member_reasons(archive):
        raise ArchiveError(
            f"{folder}: damaged", reasons=reasons, hint="copy it again, or calibrate again with --fresh"
        )
    return archive


def _member_reasons(archive: Archive) -> list[str]:
    manifest = archive.manifest
    try:
        wanted = [block_member(layer) for layer in range(archive.config.n_layers)]
    except (KeyError, TypeError) as error:
        return [f"the manifest's model is incomplete: {error}"]
    if "diagonal_only" not in manifest.request.options:
        return ["the manifest's options lack diagonal_only"]
    reasons = [
        f"the manifest lists no {name}" for name in [*wanted, HEAD, ROWS] if name not in manifest.members
    ]
    for name, member in manifest.members.items():
        path = archive.folder / name
        if not path.is_file():
            reasons.append(f"{name} is missing")
        elif (found := path.stat().st_size) != member.n_bytes:
            reasons.append(f"{name} has {found} bytes, expected {member.n_bytes}")
    return reasons
