"""EXL2, ExLlamaV2's format of one linear: codes of mixed widths, the important inputs in the widest.

The weight W (N, K) of a linear is stored with its inputs permuted: stored input r is input perm[r] of the
model, most important first. Consecutive stored inputs form groups; a group has a width in bits, and the
widths never rise from group to group. Each of the N outputs has a scale of 4 bits in each group, a share of
the group's one maximum. With h() for rounding to half precision, and c the code of output n and input r:

    m = h(q_scale_max[g] / 256)         rounded once at load; below 2^-14 a subnormal number, coarse
    s = h(scale[n, g]² m)               scale 1..16
    w = h((c - 2^(bits - 1)) s)

The tensors, as they lie in the file. The runtime shuffles the words of q_weight when it has loaded them; the
file knows nothing of that. Np is N rounded up to a multiple of 32.

    tensor       dtype  shape                  content
    q_weight     int32  (Σ size bits / 32, Np) groups one under the other; in a group, each output's column of
                                               words is one little-endian string of bits: code r of the group
                                               at bits bits·r .. bits·r + bits - 1, across words
    q_scale      int32  (G, Np / 8)            scale - 1 of output 8w + i at bits 4i .. 4i + 3 of word w
    q_scale_max  f16    (G,)                   the maximum of each group
    q_groups     int16  (2 G,)                 of each group its width, then its first row in q_weight
    q_invperm    int32  (K,)                   where in the stored order each input of the model lies

A code of the outputs past N is 2^(bits - 1), a scale 0 (stored as 15): the value is zero. The order of inputs
itself (q_perm) is not stored, for the runtime sorts it out of q_invperm.

Source: exllamav2 0.3.2, `AdaptiveGPTQ.pack`, `make_q_matrix`, `q_matrix.cu`; docs/exl2.md says how they judge
what is written here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantize.codecs.bits import pack_neighbours, unpack_neighbours
from quantize.errors import CheckpointError, PlanError

WIDTHS = (8, 6, 5, 4, 3, 2)
"""The widths of codes in bits, in the order in which their groups must come."""
MOST_INPUTS = 65535
"""The runtime holds the permutation in 16 bits."""
_PADDING = 32


@dataclass(frozen=True)
class Group:
    """`size` consecutive stored inputs whose codes have `bits` bits."""

    bits: int
    size: int

    @property
    def words(self) -> int:
        """The rows that the group takes in q_weight."""
        return self.bits * self.size // 32


@dataclass(frozen=True)
class Exl2Linear:
    """A linear's numbers: `codes` uint8 (N, K) in the stored order, `scales` uint8 (N, G) of 1..16,
    `scale_max` f16 (G,), `perm` int64 (K,), the model's input that is stored r-th.
    """

    codes: torch.Tensor
    groups: tuple[Group, ...]
    scales: torch.Tensor
    scale_max: torch.Tensor
    perm: torch.Tensor

    def weights(self) -> torch.Tensor:
        """Return f32 (N, K), the inputs in the model's order: bit for bit what the runtime computes with."""
        steps = step_sizes(self.scales, self.scale_max).half()
        stored = torch.empty(self.codes.shape, device=self.codes.device)
        start = 0
        for i, group in enumerate(self.groups):
            end = start + group.size
            level = self.codes[:, start:end].to(torch.int16) - 2 ** (group.bits - 1)
            stored[:, start:end] = (level.half() * steps[:, i, None]).float()
            start = end
        return stored[:, torch.argsort(self.perm)]


@dataclass(frozen=True)
class Exl2Tensors:
    """The tensors of the file, named, typed and shaped as the module's head says."""

    q_weight: torch.Tensor
    q_invperm: torch.Tensor
    q_scale: torch.Tensor
    q_scale_max: torch.Tensor
    q_groups: torch.Tensor


def step_sizes(scales: torch.Tensor, scale_max: torch.Tensor) -> torch.Tensor:
    """Return each output's step in each group, f32 (N, G), of scales 1..16 (N, G) and maxima f16 (G,)."""
    share = scale_max.half() * 2.0**-8
    return (scales.to(torch.int16).square().half() * share).float()


def shape_faults(n_outputs: int, n_inputs: int) -> list[str]:
    """Return every reason why the format cannot hold a matrix (N, K); an empty list if it can."""
    faults = []
    if n_outputs < 1:
        faults.append(f"{n_outputs} outputs: one at the least is expected")
    if n_inputs < 1 or n_inputs % 32:
        faults.append(f"{n_inputs} inputs: a multiple of 32 is expected")
    if n_inputs > MOST_INPUTS:
        faults.append(f"{n_inputs} inputs: the runtime knows {MOST_INPUTS} at most")
    return faults


def group_faults(groups: Sequence[Group], n_inputs: int) -> list[str]:
    """Return every reason why these groups cannot divide K inputs; an empty list if they can.

    Widths are those of `WIDTHS` and never rise, a size is a multiple of 32, or of 16 at 2 bits (the kernels
    take that many codes at a time), and the sizes add up to K.
    """
    faults = []
    for i, group in enumerate(groups):
        if group.bits not in WIDTHS:
            faults.append(f"group {i} has {group.bits} bits: known are {', '.join(map(str, WIDTHS))}")
        part = 16 if group.bits == 2 else 32
        if group.size < 1 or group.size % part:
            faults.append(
                f"group {i} of {group.bits} bits has {group.size} inputs: multiples of {part} can be"
            )
        if i and group.bits > groups[i - 1].bits:
            faults.append(f"group {i} has {group.bits} bits, the one before {groups[i - 1].bits}")
    total = sum(group.size for group in groups)
    if total != n_inputs:
        faults.append(f"the groups hold {total} inputs, the matrix {n_inputs}")
    return faults


def encode(linear: Exl2Linear) -> Exl2Tensors:
    """Return the file's tensors, on the CPU. Raises PlanError, with all reasons, for what cannot be held."""
    n, k = linear.codes.shape
    faults = shape_faults(n, k) + group_faults(linear.groups, k)
    faults = faults or _number_faults(linear)
    if faults:
        raise PlanError("this linear cannot be written as EXL2", reasons=faults)
    padding = -n % _PADDING
    words, starts, start = [], [0], 0
    for group in linear.groups:
        codes = linear.codes[:, start : start + group.size].cpu()
        filling = torch.full((padding, group.size), 2 ** (group.bits - 1), dtype=torch.uint8)
        words.append(_pack(torch.cat([codes, filling]), group.bits))
        start += group.size
        starts.append(starts[-1] + group.words)
    nibbles = torch.full((len(linear.groups), n + padding), 15, dtype=torch.uint8)
    nibbles[:, :n] = linear.scales.T.cpu() - 1
    pairs = [
        number for group, row in zip(linear.groups, starts, strict=False) for number in (group.bits, row)
    ]
    return Exl2Tensors(
        q_weight=torch.cat(words),
        q_invperm=torch.argsort(linear.perm.cpu()).to(torch.int32),
        q_scale=_words(pack_neighbours(nibbles, 4).numpy()),
        q_scale_max=linear.scale_max.cpu().clone(),
        q_groups=torch.tensor(pairs, dtype=torch.int16),
    )


def unpack(tensors: Exl2Tensors, n_outputs: int | None = None) -> Exl2Linear:
    """Return the numbers of the file's tensors: `encode` undone, on the CPU.

    `n_outputs` is N; without it the padding is taken for outputs (its scales are then 16). Raises
    CheckpointError, with all reasons, for tensors that do not fit together.
    """
    faults = tensor_faults(tensors, n_outputs)
    if faults:
        raise CheckpointError("these are not the tensors of an EXL2 linear", reasons=faults)
    groups, perm = groups_of(tensors), torch.argsort(tensors.q_invperm.cpu().long())
    n = tensors.q_weight.shape[1] if n_outputs is None else n_outputs
    parts, row = [], 0
    for group in groups:
        parts.append(_unpack(tensors.q_weight[row : row + group.words, :n].cpu(), group))
        row += group.words
    nibbles = unpack_neighbours(tensors.q_scale.cpu().contiguous().view(torch.uint8), 4)
    scales = nibbles[:, :n].T.contiguous() + 1
    return Exl2Linear(torch.cat(parts, 1), groups, scales, tensors.q_scale_max.cpu().clone(), perm)


def decode(tensors: Exl2Tensors, n_outputs: int | None = None) -> torch.Tensor:
    """Return the weights, f32 (N, K), bit for bit as the runtime computes them; see `unpack` for the rest."""
    return unpack(tensors, n_outputs).weights()


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the words, int32 (k bits / 32, N), of one group's codes uint8 (N, k)."""
    n, k = codes.shape
    string = np.unpackbits(codes.numpy()[:, :, None], axis=2, count=bits, bitorder="little")
    return _words(np.packbits(string.reshape(n, k * bits), axis=1, bitorder="little")).T.contiguous()


def _unpack(words: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the codes, uint8 (N, k), of one group's words int32 (k bits / 32, N)."""
    data = words.T.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    string = np.unpackbits(data, axis=1, bitorder="little").reshape(-1, group.size, group.bits)
    return torch.from_numpy(np.packbits(string, axis=2, bitorder="little")[:, :, 0])


def _words(data: Any) -> torch.Tensor:
    """Return the int32 (..., m / 4) of bytes (..., m), little endian on any machine."""
    return torch.from_numpy(np.ascontiguousarray(data).view("<i4").astype(np.int32))


def groups_of(tensors: Exl2Tensors) -> tuple[Group, ...]:
    """Return the groups of tensors without faults, from their table."""
    pairs = tensors.q_groups.tolist()
    ends = [*pairs[3::2], len(tensors.q_weight)]
    return tuple(
        Group(bits, (end - start) * 32 // bits)
        for bits, start, end in zip(pairs[::2], pairs[1::2], ends, strict=True)
    )


def _number_faults(linear: Exl2Linear) -> list[str]:
    n, k = linear.codes.shape
    faults, start, count = [], 0, len(linear.groups)
    for i, group in enumerate(linear.groups):
        top = int(linear.codes[:, start : start + group.size].max())
        if top >= 2**group.bits:
            faults.append(f"group {i} of {group.bits} bits has the code {top}")
        start += group.size
    if linear.scales.shape != (n, count) or not bool(((linear.scales >= 1) & (linear.scales <= 16)).all()):
        faults.append(f"scales {tuple(linear.scales.shape)}: numbers 1..16 of {(n, count)} are expected")
    maxima = linear.scale_max
    if maxima.dtype != torch.float16 or maxima.shape != (count,) or not bool(torch.isfinite(maxima).all()):
        faults.append(f"maxima {tuple(maxima.shape)} of {maxima.dtype}: {count} finite halves are expected")
    elif any(
        abs(m) * 2.0 ** (g.bits - 1) > 65504 for m, g in zip(maxima.tolist(), linear.groups, strict=True)
    ):
        faults.append(f"maxima up to {float(maxima.abs().max()):.3g}: the lowest code would not be finite")
    if not torch.equal(linear.perm.sort().values.cpu(), torch.arange(k)):
        faults.append("perm: not a permutation of the inputs")
    return faults


def tensor_faults(tensors: Exl2Tensors, n_outputs: int | None = None) -> list[str]:
    """Return every reason why these are no linear, but for its codes, which are not looked at."""
    faults = _shape_and_type_faults(tensors, n_outputs)
    if faults:
        return faults
    stated = tensors.q_invperm.cpu().long()
    faults = group_faults(groups_of(tensors), len(stated))
    if not torch.equal(stated.sort().values, torch.arange(len(stated))):
        faults.append("q_invperm: not a permutation")
    return faults


def _shape_and_type_faults(tensors: Exl2Tensors, n_outputs: int | None) -> list[str]:
    """Return what is wrong with types and shapes, before anything is read."""
    wide = tensors.q_weight.shape[-1] if tensors.q_weight.ndim == 2 else 0
    count, k = len(tensors.q_scale_max), len(tensors.q_invperm)
    n = wide if n_outputs is None else n_outputs
    rows = len(tensors.q_weight)
    expected = {
        "q_weight": (torch.int32, (rows, n + -n % _PADDING)),
        "q_invperm": (torch.int32, (k,)),
        "q_scale": (torch.int32, (count, wide // 8)),
        "q_scale_max": (torch.float16, (count,)),
        "q_groups": (torch.int16, (2 * count,)),
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in vars(tensors).items()}
    faults = [
        f"{name}: {found[name]}, expected {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    if faults:
        return faults
    pairs = tensors.q_groups.tolist()
    starts = [*pairs[1::2], rows]
    if 0 in pairs[::2] or starts[0] != 0 or starts != sorted(starts):
        faults.append(f"q_groups: {pairs} for {rows} rows of q_weight")
    return faults + shape_faults(n, k)
