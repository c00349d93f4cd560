"""A Hessian factored by blocks of 256 columns, for quantize/solver/blocks.py, which says what for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from quantize.errors import UsageError
from quantize.products import linear
from quantize.solver.factor import Factor, column_order, prepare

WIDTH = 256
"""Columns that are solved together: a super-block."""
DAMP = 0.05
_SMALLEST = 32
_DEAD = 1e-3  # of the mean diagonal: what a column weighs that never has an input

SubFactors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each of G sub-blocks of n columns: their order, int64 (G, n), Ũᵀ, f32 (G, n, n), and D, f32 (G, n)."""


@dataclass(frozen=True)
class PointFactor:
    """S of a super-block factored by groups of n columns: S = M D Mᵀ, D zero but for blocks of n x n.

    `order`, int64 (w,), are the columns as they are rounded; `feedback`, f32 (w, w), is Mᵀ and `conditional`,
    f32 (w / n, n, n), the blocks of D, both in that order: as for blocks of 256 in `BlockStep`.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    conditional: torch.Tensor


@dataclass(frozen=True)
class BlockStep:
    """One block of the walk: columns start..start + w of H.

    `hessian` is S_b, f32 (w, w); `local` its factor in the order of activation; `feedback` M_bcᵀ, f32
    (K - end, w), for all columns c to come in the order of the walk; `subs` has the factors of its sub-blocks
    of 16 and of 32.
    """

    start: int
    hessian: torch.Tensor
    local: SubFactors
    feedback: torch.Tensor
    subs: Mapping[int, SubFactors]
    _points: dict[tuple[int, int], PointFactor] = field(default_factory=dict, repr=False, compare=False)

    def by_points(self, sub: int, n: int) -> PointFactor:
        """Return S_b factored by groups of n columns, made when it is first asked for.

        Sub-blocks of `sub` columns stay together, and octets in them; each come by their largest diagonal.
        """
        if (sub, n) not in self._points:
            self._points[sub, n] = _point_factor(self.hessian, sub, n)
        return self._points[sub, n]


@dataclass(frozen=True)
class BlockFactor:
    """H made ready for rounding to blocks.

    `hessian`, f32 (K, K), is damped and in the order of the columns; `importance`, f32 (K,), H's diagonal,
    nowhere zero; `steps` is the walk, and `log` has one line for every attempt to factor that failed.
    """

    hessian: torch.Tensor
    importance: torch.Tensor
    steps: tuple[BlockStep, ...]
    log: tuple[str, ...]


def prepare_blocks(H: torch.Tensor, *, damp: float = DAMP, name: str = "") -> BlockFactor:
    """Factor a Hessian f32 (K, K) by blocks of 256 columns, for all linears that share its input.

    Raises what `prepare` raises: HessianError where H cannot be factored, UsageError for a wrong damping, or
    for a K that is no multiple of 32.
    """
    if H.ndim == 2 and H.shape[0] % _SMALLEST:
        found = f"{name or 'the Hessian'}: {H.shape[0]} columns"
        raise UsageError(f"{found}, but blocks have a multiple of {_SMALLEST}")
    factor = prepare(H, damp=damp, order="group", group_size=WIDTH, name=name)
    damped = _damped(H, factor)
    importance = H.diagonal().clamp(min=0).float()
    live = importance[~factor.dead]
    mean = float(live.mean()) if len(live) else 1.0
    damped.diagonal()[factor.dead] = _DEAD * mean
    return BlockFactor(damped, importance.clamp(min=_DEAD * mean), _walk(factor, _DEAD * mean), factor.log)


def _damped(H: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Return `factor.hessian` in the order of the columns; putting H's diagonal right is the least work."""
    damped = H.float().clone()
    if bool(factor.dead.any()):
        damped[factor.dead] = 0.0
        damped[:, factor.dead] = 0.0
    damped.diagonal()[factor.order] = factor.hessian.diagonal()
    return damped


def _walk(factor: Factor, dead: float) -> tuple[BlockStep, ...]:
    """Return the blocks in the order of rounding; columns without an input weigh `dead`."""
    bounds = _bounds(factor.order)
    upper, later = factor.feedback, factor.feedback.clone()
    inside = [torch.argsort(factor.order[start:end]) for start, end in bounds]
    for start, end in bounds[1:]:
        later[:start, start:end] = torch.linalg.solve_triangular(
            upper[start:end, start:end], upper[:start, start:end], upper=True, left=False, unitriangular=True
        )
    # Inside a block the columns come as they lie: M and S do not depend on their order.
    place = torch.cat([start + nat for (start, _), nat in zip(bounds, inside, strict=True)])
    later = later.index_select(0, place).index_select(1, place)
    steps = []
    for (start, end), nat in zip(bounds, inside, strict=True):
        part = upper[start:end, start:end]
        S = linear(part * factor.weights[start:end], part.contiguous())[nat][:, nat].contiguous()
        first = int(factor.order[start]) // WIDTH * WIDTH
        S.diagonal()[factor.dead[first : first + end - start]] = dead
        order, feedback, weights = (part[0] for part in _sub_factors(S, len(S)))
        local = order, feedback, weights
        subs = {n: _sub_factors(S, n) for n in (16, 32)}
        steps.append(BlockStep(first, S, local, later[start:end, end:].T.contiguous(), subs))
    return tuple(steps)


def _sub_factors(S: torch.Tensor, n: int) -> SubFactors:
    """Factor the blocks of n columns on S's diagonal."""
    groups = torch.arange(len(S), device=S.device).reshape(-1, n)
    parts = S[groups[:, :, None], groups[:, None, :]]
    inside = torch.argsort(torch.diagonal(parts, dim1=1, dim2=2), dim=1, descending=True, stable=True)
    order = groups.gather(1, inside)
    # f64: S is what a damped H leaves, positive definite but for the rounding of its own f32.
    lower = torch.linalg.cholesky(S.double()[order[:, :, None], order[:, None, :]].flip(1, 2)).flip(1, 2)
    diagonal = torch.diagonal(lower, dim1=1, dim2=2)
    feedback = (lower / diagonal[:, None, :]).mT.float().contiguous()
    return order, feedback, diagonal.square().float()


def _point_factor(S: torch.Tensor, sub: int, n: int) -> PointFactor:
    """Factor S by groups of n columns; f64, as in `_sub_factors`."""
    order = column_order(S.diagonal(), "group", sub)
    order = torch.cat([_octets(S.diagonal(), columns) for columns in order.reshape(-1, sub)])
    root = torch.linalg.cholesky(S.double()[order][:, order].flip(0, 1)).flip(0, 1)
    columns = root.reshape(len(S), -1, n).transpose(0, 1)
    inside = torch.stack([root[k : k + n, k : k + n] for k in range(0, len(S), n)])
    unit = torch.linalg.solve_triangular(inside, columns, upper=True, left=False)
    feedback = unit.transpose(1, 2).reshape(len(S), len(S))
    return PointFactor(order, feedback.float().contiguous(), (inside @ inside.mT).float().contiguous())


def _octets(diagonal: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return columns by octets, those with the largest diagonal first, each octet's as they lie."""
    octets = columns.sort().values.reshape(-1, 8)
    return octets[diagonal[octets].amax(1).argsort(descending=True, stable=True)].flatten()


def _bounds(order: torch.Tensor) -> list[tuple[int, int]]:
    """Return where in the order of rounding each block of columns begins and ends."""
    blocks = order // WIDTH
    changes = ((blocks[1:] != blocks[:-1]).nonzero()[:, 0] + 1).tolist()
    return list(zip([0, *changes], [*changes, len(order)], strict=True))
