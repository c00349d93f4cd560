"""A Hessian made ready: dead columns set apart, damped, put in order, factored.

GPTQ (arXiv 2210.17323) walks the columns with the Cholesky factor of H⁻¹. The same walk needs no inverse.
With H = Ũ D Ũᵀ, Ũ unit upper triangular and D diagonal, the loss of a row's errors e is

    e H eᵀ = Σ_k D_k (e Ũ)_k²        (e Ũ)_k = e_k + Σ_{i<k} e_i Ũ_ik

so that the best code of column k, given those before, is the one nearest to w_k + Σ_{i<k} e_i Ũ_ik (QuIP's
LDLQ, arXiv 2307.13304, where it is proven equal to GPTQ). One Cholesky of the reversed H gives Ũ and D: a
third of the arithmetic of GPTQ's three steps, and f32 is enough for it.
"""

from dataclasses import dataclass
from threading import Lock
from typing import Literal, get_args

import torch

from quantize.errors import HessianError, UsageError

Order = Literal["natural", "activation", "group"]
"""In which order columns are rounded: as they are; by H's diagonal, largest first; or by the diagonal inside
each group, groups by their largest (GPTQModel's group-aware reordering). Scales stay with their columns."""

_RAISE, _RAISES = 0.01, 10
_LOADING, _loaded = Lock(), list[torch.device]()


@dataclass(frozen=True)
class Factor:
    """H ready for rounding; everything but `order` and `dead` is in the order of rounding.

    `order`, int64 (K,), names the column that is rounded i-th. `hessian`, f32 (K, K), is damped, `added`, f32
    (K,), is what its diagonal has beyond H's; `feedback` is Ũ and `weights` D, f32 (K, K) and (K,). `dead`,
    bool (K,), marks columns whose input is always zero, in the order of W's columns: they neither give nor
    take, and weigh 0. `damp` is the share of the mean diagonal that was added, `log` has one line for every
    attempt that failed.
    """

    order: torch.Tensor
    hessian: torch.Tensor
    added: torch.Tensor
    feedback: torch.Tensor
    weights: torch.Tensor
    dead: torch.Tensor
    damp: float
    log: tuple[str, ...]


def prepare(
    H: torch.Tensor, *, damp: float = 0.01, order: Order = "group", group_size: int = 0, name: str = ""
) -> Factor:
    """Factor a Hessian f32 (K, K) for all linears that share its input.

    `damp` times the mean of the live columns' diagonal is added to it. Should the factorization fail, it is
    tried in f64, then with 0.01 more, up to ten times; each is written into the log. Raises HessianError if
    H is not finite or cannot be factored even so, UsageError for a wrong setting. `name` is for messages.
    """
    _check(H, damp, order, group_size, name)
    if H.device.type != "cpu":
        _load_linalg(H.device)
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=H.device)
    places = column_order(torch.where(dead, 0.0, diagonal), order, group_size)
    # Much faster than by `[]` on a CPU.
    ordered = H.index_select(0, places).index_select(1, places)
    own, lost = diagonal[places], dead[places]
    if bool(lost.any()):
        ordered[lost] = 0.0
        ordered[:, lost] = 0.0
        ordered.diagonal()[lost] = mean
    feedback, weights, used, log = _factor(ordered, float(mean), damp, name)
    added = ordered.diagonal() - own
    return Factor(places, ordered, added, feedback, weights.masked_fill(lost, 0.0), dead, used, log)


def column_order(diagonal: torch.Tensor, order: Order, group_size: int = 0) -> torch.Tensor:
    """Return the columns, int64 (K,), in the order in which they are rounded; ties keep their places.

    `group_size` 0 makes one group of all columns; the last group may be shorter.
    """
    n = len(diagonal)
    if order == "natural":
        return torch.arange(n, device=diagonal.device)
    by_size = torch.argsort(diagonal, descending=True, stable=True)
    if order == "activation" or not group_size:
        return by_size
    groups = by_size // group_size
    # A group's rank is the place of its largest column; a stable sort by it keeps each group's own order.
    first = torch.full((-(-n // group_size),), n, device=diagonal.device)
    first.scatter_reduce_(0, groups, torch.arange(n, device=diagonal.device), "amin")
    return by_size[torch.argsort(first[groups], stable=True)]


def _factor(
    H: torch.Tensor, mean: float, damp: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, float, tuple[str, ...]]:
    """Damp H in place until it can be factored; return Ũ, D, the damping and what had to be done."""
    log: list[str] = []
    used = damp
    H.diagonal().add_(damp * mean)
    for attempt in range(_RAISES + 1):
        for dtype in (torch.float32, torch.float64):
            root = _root(H.to(dtype))
            if root is not None:
                diagonal = root.diagonal()
                return (root / diagonal).float(), diagonal.square().float(), used, tuple(log)
            log.append(f"{name or 'Hessian'}: no Cholesky factor in {dtype} with damping {used:.3g}")
        if attempt < _RAISES:
            H.diagonal().add_(_RAISE * mean)
            used += _RAISE
    raise HessianError(
        f"{name or 'the Hessian'}: cannot be factored with a damping of up to {used:.3g}",
        reasons=log,
        hint="calibrate with more tokens, or with a larger damping",
    )


def _load_linalg(device: torch.device) -> None:
    """Have torch load its linear algebra for GPUs, which fails if two threads ask for it at once."""
    with _LOADING:
        if not _loaded:
            torch.linalg.cholesky_ex(torch.eye(1, device=device))
            _loaded.append(device)


def _root(H: torch.Tensor) -> torch.Tensor | None:
    """Return the upper triangular R with H = R Rᵀ, or None if there is none of finite numbers."""
    lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    upper: torch.Tensor = lower.flip(0, 1)
    return upper


def _check(H: torch.Tensor, damp: float, order: str, group_size: int, name: str) -> None:
    reasons = []
    if order not in get_args(Order):
        reasons.append(f"order {order!r}: known are {', '.join(get_args(Order))}")
    if not 0 <= damp < 1:
        reasons.append(f"damping {damp}: a share of the mean diagonal in 0..1 is expected")
    if group_size < 0:
        reasons.append(f"group size {group_size}: a positive number is expected, or 0 for one group")
    if reasons:
        raise UsageError("the Hessian cannot be prepared with these settings", reasons=reasons)
    if H.ndim != 2 or H.shape[0] != H.shape[1] or not _is_plausible(H):
        raise HessianError(
            f"{name or 'the Hessian'}: a square of finite numbers with no negative diagonal is expected,"
            f" found {tuple(H.shape)}",
            hint="calibrate again",
        )


def _is_plausible(H: torch.Tensor) -> bool:
    """Return whether H is finite and no mean of squares is negative."""
    # A sum takes a tenth of the time of a look at each, but may overflow.
    finite = bool(torch.isfinite(H.sum())) or bool(torch.isfinite(H).all())
    return finite and bool((H.diagonal() >= 0).all())
