"""Which type each tensor of a GGUF gets: the recipe, what the user wants otherwise, and what the rows allow.

In this order, the first that has a say decides, as in llama-quantize:

    1. vectors (the norms) are F32
    2. `--token-embedding-type` and `--output-tensor-type`, for these two alone; they must fit
    3. `--tensor-type PATTERN=TYPE`, the first whose regular expression is found in the tensor's GGUF name
    4. a plan that was given back, or what a budget was shared out to (`gguf_budget`)
    5. `--pure`: the recipe's default type
    6. the recipe (`quantize.recipes`)

What 3 to 6 choose falls back where the rows are no whole blocks of it. Overrides never touch another
tensor: in llama-quantize they shift the layers that a recipe counts.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from converters.names import gguf_name
from converters.plan import ConvertOptions
from quantize.codecs import CODECS, Codec, codec
from quantize.errors import UsageError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from quantize.recipes import OUTPUT, TOKEN_EMBD, Choice, Place, Recipe, fitted, mixed, requires_importances
from quantize.solver.blocks import compensated_types, compensates_on

_GPU = torch.device("cuda")
_VECTORS = Choice("F32", "vectors are always F32")
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def written_type(text: str, option: str) -> str:
    """Return a quant type's name as it is spelt; raises UsageError for one that cannot be written."""
    name = text.strip().upper()
    if name not in CODECS or not CODECS[name].writable:
        known = ", ".join(kind for kind, each in CODECS.items() if each.writable)
        fault = "is read but not written" if name in CODECS else "is no quant type"
        raise UsageError(f"{option}: {text!r} {fault}", hint=f"known: {known}")
    return name


def suits_gpu(kind: Codec, compensated: bool) -> bool:
    """Return whether a GPU encodes a type: by the type's own search, or with errors compensated."""
    return compensates_on(kind, _GPU) if compensated else kind.gains_from_gpu


@dataclass(frozen=True)
class GgufTypes:
    """The types of one export's tensors.

    `assigned` are types by the checkpoint's names, in place of the recipe's mix; `remarks` are notes on them.
    """

    config: LlamaConfig
    recipe: Recipe
    options: ConvertOptions
    assigned: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @cached_property
    def choices(self) -> Mapping[str, Choice]:
        """Every tensor's type by the checkpoint's names, in the model's order."""
        return {name: self._choose(name, shape) for name, shape in self.config.tensor_shapes().items()}

    def faults(self) -> list[str]:
        """Return every reason why these types cannot be written."""
        return [*self._useless_overrides(), *self._unfit_options(), *self._missing_importances()]

    def compensated(self) -> frozenset[str]:
        """Return the checkpoint's names of the tensors that are rounded with Hessians: those of their inputs,
        for the embedding that of its gradients."""
        archive = self.options.archive
        if archive is None or not self.options.compensate:
            return frozenset()
        kinds, measured = compensated_types(), archive.linears()
        measured += [EMBEDDING] if archive.knows_embedding else []
        return frozenset(name for name in measured if self.choices[name].quant in kinds)

    def notes(self) -> list[str]:
        """Return what the overrides did, which matrices the importances serve, and what no GPU encodes."""
        notes = [
            f"override {pattern}={quant}: {len(self._overridden(number))} tensors"
            for number, (pattern, quant) in enumerate(self.options.tensor_types)
        ]
        if self.options.importances is not None:
            notes += self._importance_notes()
        if self.options.compensate:
            count, effort = len(self.compensated()), self.options.effort
            notes.append(f"{count} tensors are rounded with error compensation, effort {effort}")
        notes += self.remarks
        return notes + (self._device_notes() if self.options.on_gpu else [])

    def importance_users(self) -> list[str]:
        """Return the names of the tensors whose bytes depend on the importances that there are."""
        importances = self.options.importances
        if importances is None:
            return []
        return [name for name in self._searched() if name in importances.rows]

    def pinned(self, name: str) -> bool:
        """Return whether an option says what a matrix becomes."""
        tied = self._is_tied(name) and self.options.output_tensor_type is not None
        return tied or self._named(name) is not None or self._override_of(name) is not None

    def _choose(self, name: str, shape: tuple[int, ...]) -> Choice:
        if len(shape) == 1:
            return _VECTORS
        return self._named(name) or fitted(self._meant(name, shape[-1]), shape[-1])

    def _named(self, name: str) -> Choice | None:
        """Return what an option for this very tensor says."""
        options = self.options
        if name == EMBEDDING and options.token_embedding_type is not None:
            return Choice(options.token_embedding_type, "--token-embedding-type")
        if name == HEAD and options.output_tensor_type is not None:
            return Choice(options.output_tensor_type, "--output-tensor-type")
        return None

    def _meant(self, name: str, n_columns: int) -> Choice:
        number = self._override_of(name)
        if number is not None:
            pattern, quant = self.options.tensor_types[number]
            return Choice(quant, f"override {pattern}={quant}")
        if self._is_tied(name) and self.options.output_tensor_type is not None:
            return Choice(self.options.output_tensor_type, "--output-tensor-type, for the head is tied")
        if name in self.assigned:
            return Choice(self.assigned[name], f"as {self.recipe.name}")
        if self.options.pure:
            return Choice(self.recipe.default, f"pure {self.recipe.default}")
        return mixed(self.recipe, self._place(name), n_columns)

    def _is_tied(self, name: str) -> bool:
        return name == EMBEDDING and self.config.tied_head

    def _override_of(self, name: str) -> int | None:
        """Return the number of the override that decides a matrix, None if none does."""
        if self.recipe.is_float or self._named(name) is not None:
            return None
        written = gguf_name(name)
        found = (bool(re.search(p, written, re.IGNORECASE)) for p, _ in self.options.tensor_types)
        return next((number for number, matches in enumerate(found) if matches), None)

    def _overridden(self, number: int) -> list[str]:
        return [name for name in self.matrices() if self._override_of(name) == number]

    def matrices(self) -> list[str]:
        """Return the checkpoint's names of all matrices."""
        return [name for name, shape in self.config.tensor_shapes().items() if len(shape) > 1]

    def _role(self, name: str) -> str:
        """Return a matrix's role; the embedding of a tied head is the output, which hurts more."""
        block = _BLOCK_NAME.fullmatch(gguf_name(name))
        if block is not None:
            return block[2]
        return TOKEN_EMBD if name == EMBEDDING and not self.config.tied_head else OUTPUT

    def _place(self, name: str) -> Place:
        config, block = self.config, _BLOCK_NAME.fullmatch(gguf_name(name))
        return Place(
            role=self._role(name),
            layer=int(block[1]) if block is not None else 0,
            n_layers=config.n_layers,
            sharing=config.n_heads // config.n_kv_heads,
            measured=self.options.importances is not None,
        )

    def _useless_overrides(self) -> Iterator[str]:
        """Yield the overrides that would change nothing: a pattern misspelt, or one too late."""
        for number, (pattern, quant) in enumerate(self.options.tensor_types):
            if self.recipe.is_float:
                yield f"--tensor-type {pattern}={quant}: only recipes that quantize have overrides"
            elif not self._overridden(number):
                yield (
                    f"--tensor-type {pattern}={quant}: no matrix is left that it matches; names are like "
                    "blk.0.ffn_down.weight, and the first pattern that matches counts"
                )
        if self.options.pure and self.recipe.is_float:
            yield "--pure: only recipes that quantize have a mix"

    def _unfit_options(self) -> Iterator[str]:
        for name, shape in self.config.tensor_shapes().items():
            named = self._named(name)
            if named is not None and shape[-1] % (size := codec(named.quant).block_size):
                yield (
                    f"{named.reason} {named.quant}: {shape[-1]} columns are not a multiple of {size}; "
                    "choose a type of smaller blocks"
                )

    def _searched(self) -> list[str]:
        return [name for name, choice in self.choices.items() if codec(choice.quant).uses_importance]

    def _without_importances(self) -> list[str]:
        users = set(self.importance_users())
        return [name for name in self._searched() if name not in users]

    def _device_notes(self) -> list[str]:
        compensated = self.compensated()
        names = {*self._searched(), *compensated}
        kinds = [(name, codec(choice.quant)) for name, choice in self.choices.items() if name in names]
        counts = Counter(kind.name for name, kind in kinds if not suits_gpu(kind, name in compensated))
        slow = [f"{quant} ({n} tensors)" for quant, n in counts.items()]
        return [f"encoded on the CPU, for no search of a GPU is there: {', '.join(slow)}"] if slow else []

    def _missing_importances(self) -> Iterator[str]:
        """Yield, once for each role and type, the matrices that need importances which are not there."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name in self._without_importances():
            role, quant = self._role(name), self.choices[name].quant
            if requires_importances(self.recipe, role, quant):
                # Of the embedding of a tied head, the role is the output: the tensor's name is what tells.
                label = gguf_name(name) if role in (OUTPUT, TOKEN_EMBD) else role
                groups.setdefault((label, quant), []).append(gguf_name(name))
        for (label, quant), names in groups.items():
            yield f"{quant} needs an imatrix: {self._lacking(label, names)}"

    def _lacking(self, role: str, names: Sequence[str]) -> str:
        options = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}
        if role in options:
            return f"{role}, which an imatrix seldom has: give it another type, {options[role]} Q4_K"
        which = f"{role} of {len(names)} layer{'s' if len(names) > 1 else ''}"
        if self.options.importances is None:
            return f"{which}: give one with --imatrix, make one with --calibrate, or choose a larger recipe"
        return f"{which}: {self.options.importances.file} has no entry for {_some(names)}"

    def _importance_notes(self) -> Iterator[str]:
        users, without = self.importance_users(), self._without_importances()
        if not self._searched():
            yield f"the imatrix is not used: no type of {self.recipe.name} looks at importances"
            return
        yield f"importances of {len(users)} tensors from {self.options.importances}"
        if without:
            yield f"no importances for {_some([gguf_name(name) for name in without])}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
