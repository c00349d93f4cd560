"""What counts as right: the bounds of the proof, per quant type.

A type's row says how far a file of that type may be from its checkpoint. Absolute KL divergence differs
tenfold between models, and small models are hurt most; so the bounds are wide and catch what is broken, not
what is mediocre. Where a plan predicted the loss of its file, the prediction gives the bound instead.

    relative_error    |decoded - source| / |source| of one tensor
    weights_kl        mean KL of the file's weights in the reference forward
    activations_kl    mean KL of the runtime to that forward, for it rounds activations to what its kernels
                      take beside the type: f16, bf16, or 8 bits in blocks of 32 or 256

Where the figures come from: a 135M Llama (SmolLM2, rescaled off its stored grid), all decoder matrices in one
type, rounded plainly by ggml without an importance matrix: the most sensitive model and the worst method at
hand. Measured there, relative error (worst tensor) and mean KL over 500 tokens of code; the bounds are
about five times the error, for compensated rounding trades a larger one for a smaller loss, and three to
five times the KL.

    Q8_0 .007 .0017    Q5_1 .044 .086    Q4_0 .110 .44     Q3_K    .18 1.1
    Q6_K .022 .018     Q4_K .077 .26     IQ4_NL .086 .27   IQ3_S   .16 1.6
    Q5_K .041 .077     Q4_1 .092 .40     IQ4_XS .087 .28   IQ3_XXS .20 2.7
    Q5_0 .055 .12      MXFP4 .128 .54                      TQ1_0   .84 13

GPTQ's types by bits and group size, symmetric, each scale from the group's largest magnitude:

    8 bit, 128g .0094 .0018    4 bit, 32g      .12 .31    3 bit, 32g      .25 1.9    2 bit, 128g .65 14
           channel .013 .0030         128g     .16 .67           128g     .32 4.1
                                      channel  .21 .92           channel  .42 7.4

A uniform guess over 49,152 tokens is 9 nats from that model, and another model's tensor has a relative error
of 1.4: the bounds of the lowest types stay below both. So plain rounding to 2 bits (Q2_K .34 9.7, IQ2_S .30
9.4, GPTQ) or to 3 bits with one scale a row, which leaves nothing of so small a model, is meant to fail.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantize.errors import UsageError

GAIN = (0.4, 1.6)
"""<decoded, source> / <source, source> of a tensor. Measured 0.56 (TQ1_0) to 1.02 for rounding of any kind,
2 bits and strong compensation included; 0 for permuted rows."""

MOST_SHIFT = 0.5
"""Mean of (decoded - source) / scale of a GPTQ tensor, in steps: 1 where its zero-points are read as another
version's. Measured on the embedded model at most .07 (2 bit), .02 (3 bit), .01 (4 and 8 bit), compensated."""

PREDICTION_FACTOR = 3.0
"""A prediction adds up losses that interact and was made on another text: it may be this far off."""


@dataclass(frozen=True)
class TypeBound:
    """One row of the table."""

    relative_error: float
    weights_kl: float
    activations_kl: float


@dataclass(frozen=True)
class FileBound:
    """The bounds of a whole file on the mean KL divergence, in nats per token."""

    weights_kl: float
    activations_kl: float

    @property
    def runtime_kl(self) -> float:
        """Bound of the runtime against the checkpoint: both losses, of which one prevails."""
        return max(self.weights_kl, self.activations_kl)


# The float types' own loss: bf16 weights fit F16 but for the smallest (1e-11 measured); f32 weights in F16
# lose 2e-6, in BF16 1e-4 (from Q8_0's, by the squares of the relative errors). The runtime's, on that model:
# F32 4e-7 (keys and values are kept as f16), F16 2.6e-6, BF16 9e-5, Q8_0 3e-3, Q4_K_M 2e-2; on the embedded
# model 5e-8, 3e-7, 5e-6, 2e-4. Coarser types round activations alike, in models that are more upset by it.
# The float types' bounds leave models room that are tenfold more sensitive than that one.
BOUNDS = {
    "F32": TypeBound(0.0, 1e-8, 1e-4),
    "F16": TypeBound(0.001, 1e-4, 1e-4),
    "BF16": TypeBound(0.004, 2e-3, 3e-3),
    "Q8_0": TypeBound(0.035, 0.02, 0.05),
    "Q6_K": TypeBound(0.1, 0.08, 0.1),
    "Q5_K": TypeBound(0.2, 0.3, 0.1),
    "Q5_1": TypeBound(0.2, 0.35, 0.1),
    "Q5_0": TypeBound(0.25, 0.5, 0.1),
    "Q4_K": TypeBound(0.4, 1.0, 0.1),
    "Q4_1": TypeBound(0.4, 1.5, 0.1),
    "Q4_0": TypeBound(0.5, 1.5, 0.1),
    "IQ4_NL": TypeBound(0.4, 1.0, 0.1),
    "IQ4_XS": TypeBound(0.4, 1.0, 0.1),
    "MXFP4": TypeBound(0.5, 2.0, 0.1),
    "Q3_K": TypeBound(0.8, 4.0, 0.3),
    "IQ3_S": TypeBound(0.8, 4.0, 0.3),
    "IQ3_XXS": TypeBound(0.9, 5.0, 0.3),
    "Q2_K": TypeBound(1.2, 7.0, 0.5),
    "IQ2_S": TypeBound(1.2, 7.0, 0.5),
    "IQ2_XS": TypeBound(1.2, 7.0, 0.5),
    "IQ2_XXS": TypeBound(1.2, 7.0, 0.5),
    "TQ2_0": TypeBound(1.3, 8.0, 0.5),
    "TQ1_0": TypeBound(1.3, 8.0, 0.5),
    "IQ1_M": TypeBound(1.3, 8.0, 0.5),
    "IQ1_S": TypeBound(1.3, 8.0, 0.5),
}

# One row for all group sizes of a number of bits. What readers lose is theirs, not the type's: `READER_KL`.
GPTQ_BOUNDS = {
    8: TypeBound(0.06, 0.02, 0.02),
    4: TypeBound(0.8, 3.0, 0.02),
    3: TypeBound(1.2, 7.0, 0.02),
    2: TypeBound(1.3, 7.0, 0.02),
}
_GPTQ = re.compile(r"GPTQ-(\d+)bit-\w+")

# EXL2's linears by their narrowest codes. Its grid is GPTQ's in groups of 32 to 128 inputs; the rows of 5 and
# 6 bits are those of Q5_0 and Q6_K, which have the same steps.
EXL2_BOUNDS = {
    8: TypeBound(0.06, 0.02, 0.02),
    6: TypeBound(0.15, 0.1, 0.02),
    5: TypeBound(0.3, 0.5, 0.02),
    4: TypeBound(0.8, 3.0, 0.02),
    3: TypeBound(1.2, 7.0, 0.02),
    2: TypeBound(1.3, 7.0, 0.02),
}
_EXL2 = re.compile(r"EXL2-(?:\d/)*(\d)bit")

READER_KL = {"torch.float32": 1e-6, "torch.float16": 0.005, "torch.bfloat16": 0.02}
"""Bounds of a GPTQ reader to the reference forward by the dtype in which it computes. Measured on a 135M
model in 4 bits: f32 3e-11, f16 3.6e-4, bf16 1.5e-3; on the embedded one f32 3e-12, f16 6e-5. f16 and
bf16 leave models room that are tenfold more sensitive."""


def reader_bound(bound: FileBound, dtype: str) -> FileBound:
    """Return a file's bounds for a reader that computes in a dtype; an unknown one has bf16's."""
    return replace(bound, activations_kl=READER_KL.get(dtype, READER_KL["torch.bfloat16"]))


def bound_of(quant: str) -> TypeBound:
    """Return a type's row; raises UsageError for a type that has none, listing those that do."""
    if (named := _GPTQ.fullmatch(quant)) and int(named[1]) in GPTQ_BOUNDS:
        return GPTQ_BOUNDS[int(named[1])]
    if (named := _EXL2.fullmatch(quant)) and int(named[1]) in EXL2_BOUNDS:
        return EXL2_BOUNDS[int(named[1])]
    if quant not in BOUNDS:
        raise UsageError(f"no bounds for quant type {quant!r}", hint=f"known: {', '.join(BOUNDS)}")
    return BOUNDS[quant]


def file_bound(quants: Iterable[str], predicted_kl: float | None = None) -> FileBound:
    """Return the bounds of a file with matrices of these types: those of its coarsest type.

    `predicted_kl`, a plan's own prediction of the mean KL, replaces the table's bound on the weights.
    """
    rows = [bound_of(quant) for quant in set(quants)]
    weights = max(row.weights_kl for row in rows)
    if predicted_kl is not None:
        weights = PREDICTION_FACTOR * predicted_kl
    return FileBound(weights, max(row.activations_kl for row in rows))
