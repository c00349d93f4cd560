"""What each of ggml's quant types would cost each matrix, and what the costs of all matrices come to.

As in `layout_errors`, some rows stand for a matrix: a row is taken with a chance in proportion to what
rounding may cost it, encoded under every type by the encoder that a conversion would use, and its loss
counted. Rows are independent in ggml's blocks, so for the rows taken the losses are exact; what errs is the
sample.

Costs of different matrices are brought to one measure, the KL divergence of the model's next-token
distribution, in nats:

    linear       lost share of the output's energy, tr(E H Eᵀ) / tr(W H Wᵀ), times a constant of its kind
    embedding    lost share of a token's vector |e|² / |w|², tokens weighed by frequency, times a constant
    output       ½ Σ_v f_v e_v H e_vᵀ with f_v the frequency of token v, the second-order KL of errors in
                 logits if a token's probability did not depend on the input, times a constant

and added up: errors of different matrices are taken to be independent and small. Where gradients are known
(quantize/sensitivity.py) they stand in for the constants of the linears, and of the embedding:

    embedding    ½ Σ_v f_v e_v G e_vᵀ, G the second moment of the gradient at its output

The constants were measured on one trained model (30 layers, 768 wide; 1500 tokens for H, 750 for the KL), all
matrices of a kind in Q4_0, uncompensated: the KL divergence by the sum of the lost shares. In Q2_K the same
quotients are 0.4 to 1.3 times these, and a model of 5 layers has about a third of them, with the order q < v,
k < o, down. They say which matrices deserve bits; the sum is an order of magnitude, not a measurement.
scripts/bench/allocation compares it with one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantize.codecs import CODECS, codec
from quantize.codecs.base import Codec
from quantize.errors import UsageError
from quantize.layout_errors import rows_for
from quantize.products import linear
from quantize.solver.block_factor import BlockFactor
from quantize.solver.blocks import compensated_types, encode_compensated

ROWS = 96
"""Rows that stand for a matrix."""
RICHEST = "F16"
"""The type of the most bits that is worth having."""
EMBEDDING, OUTPUT = "embedding", "output"
SENSITIVITY: Mapping[str, float] = {
    "self_attn.q_proj": 0.33,
    "self_attn.k_proj": 0.33,
    "self_attn.v_proj": 0.3,
    "self_attn.o_proj": 0.32,
    "mlp.gate_proj": 0.65,
    "mlp.up_proj": 0.5,
    "mlp.down_proj": 0.9,
    EMBEDDING: 4.8,
    OUTPUT: 0.5,
}
"""KL divergence, nats, by the lost share of a matrix of each kind; of the output, by its own formula."""


@dataclass(frozen=True)
class Rounding:
    """How a matrix is encoded: with errors compensated under `factor` where a type can be, else weighed by
    `importance`, f32 (K,); None: without."""

    factor: BlockFactor | None = None
    importance: torch.Tensor | None = None

    def encode(self, kind: Codec, rows: torch.Tensor) -> torch.Tensor:
        """Return the blocks, uint8 (N, row_bytes), of rows f32 (N, K)."""
        if self.factor is not None and kind.name in compensated_types():
            return encode_compensated(kind, rows, self.factor)
        return kind.encode(rows, self.importance)


@dataclass(frozen=True)
class TypeErrors:
    """`energy` is Σ_v u_v w_v H w_vᵀ over a matrix's rows, u their weights; `errors` each type's share lost.

    A type that the matrix cannot be written in is not among them.
    """

    energy: float
    errors: Mapping[str, float]


def predicted_kl(kind: str, found: TypeErrors, whole: float | None = None) -> dict[str, float]:
    """Return the KL divergence, in nats, that each type is predicted to cost a matrix of a kind.

    `whole` is what losing all of the energy would cost, where gradients say it; None: by the kind's constant.

    `kind` is a name of `SENSITIVITY`. For the output matrix `found` is weighed by token frequencies, which
    sum to one, for the embedding by these over each row's |w|².
    """
    if whole is not None:
        return {name: whole * error for name, error in found.errors.items()}
    factor = SENSITIVITY[kind] * (found.energy / 2 if kind == OUTPUT else 1.0)
    return {name: factor * error for name, error in found.errors.items()}


def token_frequencies(counts: torch.Tensor) -> torch.Tensor:
    """Return how often tokens are to be expected, f32 (V,), from counts (V,): half a token more for each."""
    likely = counts.double() + 0.5
    return (likely / likely.sum()).float()


def usable_types(n_columns: int, *, measured: bool) -> tuple[str, ...]:
    """Return the writable types that rows of `n_columns` fit, the richest first; F32 is none of them.

    `measured` says whether there are importances, without which some types cannot be encoded.
    """
    return tuple(
        name
        for name, kind in CODECS.items()
        if kind.writable
        and name not in ("F32", "BF16")
        and n_columns % kind.block_size == 0
        and (measured or not kind.needs_importance)
    )


def predict_types(
    W: torch.Tensor,
    types: Sequence[str],
    rounding: Rounding,
    H: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    rows: int = ROWS,
) -> TypeErrors:
    """Predict the errors of a matrix W (N, K) on the CPU under each of `types`.

    H is f32 (K, K), None for the identity; `weights`, f32 (N,), is what a row counts, None for one each. A
    matrix of no more than `rows` rows is measured whole; the same arguments give the same numbers. Raises
    UsageError for shapes that do not fit, weights that are not finite or types that W's rows do not fit.
    """
    _check(W, types, H, weights)
    W = W.float()
    own = _energies(W, H)
    energy = float((own if weights is None else own * weights).double().sum())
    # A magnitude that overflows in a row that was not taken would still be refused when it is written.
    peak = float(W.abs().max()) if W.numel() else 0.0
    kinds = [kind for kind in map(codec, types) if peak < kind.overflow]
    if energy <= 0:
        return TypeErrors(0.0, {kind.name: 0.0 for kind in kinds})
    taken, count = rows_for(W, H, rows, weights)
    picked, errors = W[taken].contiguous(), {}
    for kind in kinds:
        decoded = kind.decode(rounding.encode(kind, picked), W.shape[1])
        lost = _energies(picked - decoded, H) * count
        errors[kind.name] = float(lost.double().sum()) / energy
    return TypeErrors(energy, errors)


def _energies(rows: torch.Tensor, H: torch.Tensor | None) -> torch.Tensor:
    """Return each row's w H wᵀ, f32 (N,)."""
    return ((rows if H is None else linear(rows, H)) * rows).sum(1)


def _check(
    W: torch.Tensor, types: Sequence[str], H: torch.Tensor | None, weights: torch.Tensor | None
) -> None:
    reasons = []
    if W.ndim != 2 or not bool(torch.isfinite(W).all()):
        reasons.append("expected a matrix of finite weights")
    elif H is not None and H.shape != (W.shape[1], W.shape[1]):
        reasons.append(f"a matrix {tuple(W.shape)} for a Hessian {tuple(H.shape)}")
    if weights is not None and weights.shape != W.shape[:1]:
        reasons.append(f"{len(weights)} weights for {len(W)} rows")
    for name in types:
        if W.ndim == 2 and W.shape[1] % codec(name).block_size:
            reasons.append(f"{W.shape[1]} columns: {name} has blocks of {codec(name).block_size}")
    if reasons:
        raise UsageError("the types of this matrix cannot be judged", reasons=reasons)
