"""The two ways from a checkpoint and a calibration text to a GGUF: llama.cpp's tools, and `dscq`.

    theirs   llama-imatrix on an F32 GGUF and the text, then llama-quantize --imatrix
    ours     the same text in the same chunks of 512 tokens into a statistics archive, with noise if that is
             asked for, then `convert --stats`

Every file stays in the work folder under a name that says what it is, so that an interrupted benchmark goes
on. `tools` is the folder of llama-imatrix and llama-quantize (`scripts/llama_cpp_tools`).
"""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.checkpoint import Checkpoint
from converters.corpus.noise import noise_rows
from converters.folding import folded
from converters.pipeline import convert, first_tokens_known
from converters.plan import ConvertOptions
from converters.stats.archive import Archive
from converters.stats.members import TokenRow
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from converters.targets import parse_request
from converters.tune import tune_file
from converters.type_losses import kept_losses, measured_losses
from quantize.solver.linears import Effort
from quantize.tuning import Settings

CHUNK = 512
PINNED = "F16"


@dataclass(frozen=True)
class Row:
    """A chunk of the calibration text."""

    ids: torch.Tensor
    kind: str = "completion"


@dataclass(frozen=True)
class Chain:
    """What both ways of one model start from; `work` is a folder of the model and the text.

    `weighted` rounds ours to nearest with importances, and gathers diagonals alone; otherwise errors are
    compensated with `effort`, under Hessians in which tokens count by their gradients if `sensitivity`.
    `pinned` has embedding and output matrix in F16, on both sides. With `tune` ours is trained so many steps,
    with `fold` its channels are scaled. For each token of the text the archive has `noise` random ones.
    """

    checkpoint: Checkpoint
    text: Path
    tools: Path
    work: Path
    n_chunks: int
    weighted: bool = False
    effort: Effort = "default"
    pinned: bool = False
    sensitivity: bool = False
    tune: int = 0
    fold: bool = False
    noise: float = 0.0

    def their_imatrix(self) -> Path:
        """Return llama-imatrix's file for the text."""
        path = self.work / "theirs-imatrix.gguf"
        if not path.exists():
            source = self.made("F32", ConvertOptions(self.work, force=True), "source")
            partial = path.with_suffix(".partial")
            arguments = ["-m", str(source), "-f", str(self.text), "-o", str(partial), "--no-ppl", "-t", "2"]
            arguments += ["-c", str(CHUNK), "--chunks", str(self.n_chunks)]
            subprocess.run([str(self.tools / "llama-imatrix"), *arguments], check=True, capture_output=True)
            partial.replace(path)
        return path

    def their_file(self, recipe: str) -> Path:
        """Return llama-quantize's file."""
        path = self.work / f"theirs{self._suffix}-{recipe}.gguf"
        if not path.exists():
            source = self.made("BF16", ConvertOptions(self.work, force=True), "source")
            partial = path.with_suffix(".partial")
            command = [str(self.tools / "llama-quantize"), "--imatrix", str(self.their_imatrix())]
            if self.pinned:
                command += ["--token-embedding-type", PINNED, "--output-tensor-type", PINNED]
            subprocess.run(
                [*command, str(source), str(partial), recipe, "2"], check=True, capture_output=True
            )
            partial.replace(path)
        return path

    def archive(self) -> Archive:
        """Return the statistics archive of the text, in the chunks of llama-imatrix, and of noise."""
        ids = torch.tensor(self.checkpoint.tokenizer.encode(self.text.read_text("utf-8")))
        rows: list[TokenRow] = [Row(part) for part in torch.split(ids, CHUNK)[: self.n_chunks]]
        n_text = sum(len(row.ids) for row in rows)
        rows += noise_rows(self.checkpoint.tokenizer, CHUNK, n_text * self.noise, 0)
        name = "stats" if self.weighted else f"hessians{'-sensitivity' * self.sensitivity}"
        name += self._noisy
        options = CalibrateOptions(
            self.work / name, diagonal_only=self.weighted, sensitivity=self.sensitivity
        )
        return calibrate_checkpoint(self.checkpoint, rows, {"name": self.text.name}, options)

    def our_file(self, recipe: str) -> Path:
        """Return our file of a recipe, or of a budget: size=101635008."""
        role = "ours" if self.weighted else f"compensated-{self.effort}{'-sensitivity' * self.sensitivity}"
        role += "-folded" * self.fold + self._noisy
        path = self._place(role, recipe)
        made = path if path.exists() else self._made_ours(recipe, role)
        return self._tuned(made, self._place(f"{role}-tuned-{self.tune}", recipe)) if self.tune else made

    def _made_ours(self, recipe: str, role: str) -> Path:
        if not self.fold:
            return self.made(recipe, self.options(recipe), role)
        checkpoint, options = folded(self.checkpoint, first_tokens_known(self.checkpoint, self._unpriced()))
        chain = replace(self, checkpoint=checkpoint)
        return chain.made(recipe, chain._priced(options, recipe), role)

    def _tuned(self, path: Path, output: Path) -> Path:
        if not output.exists():
            tune_file(path, self.checkpoint, self.archive(), output, Settings(n_steps=self.tune))
        return output

    def options(self, recipe: str) -> ConvertOptions:
        """Return how ours is converted."""
        return self._priced(self._unpriced(), recipe)

    def _unpriced(self) -> ConvertOptions:
        archive = self.archive()
        options = ConvertOptions(self.work, force=True, importances=archive.importances())
        if self.pinned:
            options = replace(options, token_embedding_type=PINNED, output_tensor_type=PINNED)
        if self.weighted:
            return options
        return replace(options, archive=archive, compensate=True, effort=self.effort)

    def _priced(self, options: ConvertOptions, recipe: str) -> ConvertOptions:
        """Return the options with what types cost, if a recipe is a budget."""
        if self.weighted or "=" not in recipe:
            return options
        kept = kept_losses(options)
        if kept is None:
            kept = measured_losses(self.checkpoint, first_tokens_known(self.checkpoint, options))
        return replace(options, losses=kept)

    def made(self, recipe: str, options: ConvertOptions, role: str) -> Path:
        """Return a file that dscq writes."""
        path = self._place(role, recipe)
        if not path.exists():
            name = role if role == "source" else f"{role}{self._suffix}"
            provenance = replace(self.checkpoint.provenance, name=name)
            checkpoint = replace(self.checkpoint, provenance=provenance)
            convert(checkpoint, [parse_request(f"gguf:{recipe}")], options)[0].paths[0].replace(path)
        return path

    @property
    def _noisy(self) -> str:
        return f"-noise-{self.noise:g}" if self.noise else ""

    @property
    def _suffix(self) -> str:
        return "-pinned" if self.pinned else ""

    def _place(self, role: str, recipe: str) -> Path:
        suffix = "" if role == "source" else self._suffix
        return self.work / f"{role}{suffix}-{recipe}.gguf"
