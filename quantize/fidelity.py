"""Does a written tensor still say what its source says? Block by block.

A float type is simple: the stored bits must be the source's, rounded to that type. A quantized type has an
error by design, and an error-compensated quantizer makes it larger on purpose: a weight is rounded not to
itself but to itself plus what its neighbours' rounding left over. So no bound on a block's error holds for
all tensors. But a *fault* (a scale with its sign flipped, a wrong exponent) makes one block unlike the
others of its tensor. With

    e = |decoded - source|, its expected size E, r = e / |source|, c = cosine(decoded, source)

a block is an outlier by any of three rules:

    opposed   e > 2 E   and  c < -0.6            a flipped sign of `d`, in any symmetric type
    far       e > 8 E   and  r > 2.5             a flipped sign in a type with minima; a misplaced scale
    fine      e > 12 E  and  r > 12 r_typical    a wrong exponent or code, in types with small errors

Each rule pairs an absolute and a relative measure, because either alone gives false alarms: large
weights have large errors, and a block that is nearly zero has a large relative error whenever its
neighbours' compensation passes through it; but such a drift does not point against the block itself.
E at (row, column of blocks) is the largest of the row's median error, the column's, the tensor's, and
row x column / tensor, for rows and channels differ in scale by orders of magnitude.

The limit: a flipped block has e = 2 |source|, so it is found if its norm is above 1.3 E. In units of
a typical block's norm E is 0.5 at 2 bits (0.7 with strong compensation), 0.1 at 4 bits, 0.006 at 8 bits.
A flip in a smaller block is below the tensor's own rounding noise.

What makes the *whole* tensor wrong (rows permuted, another layer's tensor) makes no outlier. It shows in the
tensor's gain <decoded, source> / <source, source>: near 1 for any rounding, compensated or not, since
rounding errors hardly correlate with the weights; 0 for an unrelated tensor. Beside it stands the
tensor's relative error, for which each type has a bound.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

OPPOSED_ERROR, OPPOSED_COSINE = 2.0, -0.6
FAR_ERROR, FAR_RELATIVE = 8.0, 2.5
FINE_FACTOR = 12.0
MOST_LISTED = 8

# Chunks of this many weights stay in the cache, and below torch's limit for splitting an operation among
# threads, which costs more than it gains at this size (five times as much on a busy machine).
CHUNK_WEIGHTS = 32_768
SAMPLE = 65_536


@dataclass(frozen=True)
class BlockOutlier:
    """A block that is unlike its tensor: where it is, its error in units of E, and e / |source|."""

    row: int
    block: int
    times_expected: float
    relative_error: float


@dataclass(frozen=True)
class BlockReport:
    """What `check_blocks` or `check_exact` found in one tensor.

    `relative_error` is |decoded - source| / |source| and `gain` is <decoded, source> / <source, source>
    of the whole tensor, `worst_block` the largest relative error of a block whose error is at least the
    tensor's typical one. `n_outliers` counts all faulty blocks, `outliers` describes the worst of them.
    """

    n_blocks: int
    relative_error: float
    gain: float
    worst_block: float
    n_outliers: int
    outliers: tuple[BlockOutlier, ...] = ()


@torch.inference_mode()
def check_blocks(source: torch.Tensor, decoded: torch.Tensor, block_size: int) -> BlockReport:
    """Compare a quantized tensor with its source by the outlier test above.

    `source` (N, K) in any float dtype, `decoded` f32 (N, K), `block_size` a divisor of K: the number of
    weights that share a scale of the format. A block with a nan or an infinity is always an outlier.
    Raises ValueError if shapes or block size do not fit.
    """
    _require_fit(source, decoded, block_size)
    norms = _block_norms(source, decoded, block_size)
    expected = _expected_error(norms.error)
    relative = _ratio(norms.error, norms.source)
    faulty = _faulty(norms, expected, relative)
    visible = norms.error >= _typical_of_all(norms.error)
    return BlockReport(
        n_blocks=faulty.numel(),
        relative_error=_ratio(norms.error.double().norm(), norms.source.double().norm()).item(),
        gain=_gain(norms.dot().double().sum(), norms.source.double().square().sum()),
        worst_block=relative[visible].max().item() if visible.any() else 0.0,
        n_outliers=int(faulty.sum()),
        outliers=_worst_outliers(faulty, _ratio(norms.error, expected), relative),
    )


@torch.inference_mode()
def mean_shift(source: torch.Tensor, decoded: torch.Tensor, steps: torch.Tensor) -> float:
    """Return the mean of (decoded - source) / step over a matrix: how far the whole grid is off, in steps.

    `steps`, f32 (N, K), is the distance of neighbouring codes, with its sign, at each weight; zeros are left
    out. Rounding has a mean near 0; a zero-point that is one off in every group, as of a file that is read as
    another version of its format, has -1 or 1, and no block of it is unlike the others.
    """
    total, count = 0.0, 0
    for rows in _row_chunks(source):
        live = steps[rows] != 0
        error = (decoded[rows].float() - source[rows].float())[live] / steps[rows][live]
        total, count = total + float(error.double().sum()), count + error.numel()
    return total / count if count else 0.0


@torch.inference_mode()
def check_exact(source: torch.Tensor, decoded: torch.Tensor, dtype: torch.dtype) -> BlockReport:
    """Compare a tensor stored in a float type: every bit must be that of the source rounded to `dtype`.

    Shapes are equal, of any rank. A "block" is a row here (the tensor itself if it is a vector).
    Raises ValueError if the shapes differ.
    """
    if source.shape != decoded.shape:
        raise ValueError(f"source is {tuple(source.shape)}, decoded {tuple(decoded.shape)}")
    source, decoded = _as_rows(source), _as_rows(decoded)
    outliers: list[BlockOutlier] = []
    n_wrong, sums = 0, torch.zeros(3, dtype=torch.float64)
    for rows in _row_chunks(source):
        exact, got = source[rows].float(), decoded[rows].float()
        difference = got - exact
        sums += torch.stack([_dot(difference, difference), _dot(exact, exact), _dot(got, exact)])
        wanted = exact.to(dtype).float()
        if torch.equal(_bits(wanted), _bits(got)):
            continue
        wrong = (_bits(wanted) != _bits(got)).any(1)
        n_wrong += int(wrong.sum())
        for row in wrong.nonzero()[: MOST_LISTED - len(outliers), 0].tolist():
            relative = _ratio(difference[row].norm(), exact[row].norm()).item()
            outliers.append(BlockOutlier(rows.start + row, 0, float("inf"), relative))
    return BlockReport(
        n_blocks=len(source),
        relative_error=_ratio(sums[0], sums[1]).sqrt().item(),
        gain=_gain(sums[2], sums[1]),
        worst_block=max((outlier.relative_error for outlier in outliers), default=0.0),
        n_outliers=n_wrong,
        outliers=tuple(outliers),
    )


def _require_fit(source: torch.Tensor, decoded: torch.Tensor, block_size: int) -> None:
    if source.shape != decoded.shape or source.dim() != 2:
        raise ValueError(
            f"source is {tuple(source.shape)}, decoded {tuple(decoded.shape)}: want equal matrices"
        )
    if source.shape[1] % block_size:
        raise ValueError(f"rows of {source.shape[1]} weights are no whole blocks of {block_size}")


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _row_chunks(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_WEIGHTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.dot(left.flatten(), right.flatten()).double()


def _gain(dot: torch.Tensor, square: torch.Tensor) -> float:
    """A tensor of zeros that is decoded as zeros is right: gain 1."""
    return 1.0 if dot == 0 and square == 0 else (dot / square).item()


@dataclass(frozen=True)
class _Norms:
    """Norms of every block's error, source and decoded weights, f32 (N, K / block_size)."""

    error: torch.Tensor
    source: torch.Tensor
    decoded: torch.Tensor

    def dot(self) -> torch.Tensor:
        """<decoded, source> of every block, from the three sides of the triangle."""
        return (self.source.square() + self.decoded.square() - self.error.square()) / 2


def _block_norms(source: torch.Tensor, decoded: torch.Tensor, block_size: int) -> _Norms:
    shape = (source.shape[0], source.shape[1] // block_size)
    norms = _Norms(torch.empty(shape), torch.empty(shape), torch.empty(shape))
    for rows in _row_chunks(source):
        exact, got = source[rows].float(), decoded[rows].float()
        for values, into in ((got - exact, norms.error), (exact, norms.source), (got, norms.decoded)):
            torch.linalg.vector_norm(values.view(-1, shape[1], block_size), dim=-1, out=into[rows])
    return norms


def _typical(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Median of the non-zero values (0 if all are zero): exact blocks, as of dead channels, do not count."""
    return values.masked_fill(values == 0, float("nan")).nanmedian(dim).values.nan_to_num(0.0)


def _typical_of_all(values: torch.Tensor) -> torch.Tensor:
    """The tensor's typical value; of a large one, from every n-th row: a median is slow to find."""
    # An odd step, so that it does not meet the same row of every head.
    step = max(1, values.numel() // SAMPLE) | 1
    return _typical(values[::step].flatten())


def _expected_error(error: torch.Tensor) -> torch.Tensor:
    """E of every block. A row or column of fewer than four blocks says nothing about its own scale."""
    tensor = _typical_of_all(error)
    row = _typical(error, 1)[:, None] if error.shape[1] >= 4 else tensor
    column = _typical(error, 0)[None] if error.shape[0] >= 4 else tensor
    expected = torch.maximum(row, column).clamp_min(tensor)
    return torch.maximum(expected, row * _ratio(column, tensor)).expand(error.shape)


def _faulty(norms: _Norms, expected: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    error = norms.error
    cosine = _ratio(norms.dot(), norms.source * norms.decoded)
    typical_relative = _typical_of_all(relative)
    opposed = (error > OPPOSED_ERROR * expected) & (cosine < OPPOSED_COSINE)
    far = (error > FAR_ERROR * expected) & (relative > FAR_RELATIVE)
    fine = (error > FINE_FACTOR * expected) & (relative > FINE_FACTOR * typical_relative)
    return opposed | far | fine | ~error.isfinite()


def _ratio(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """upper / lower, with 0 / 0 = 0."""
    return torch.where(upper == 0, torch.zeros_like(upper), upper / lower)


def _worst_outliers(
    faulty: torch.Tensor, times_expected: torch.Tensor, relative: torch.Tensor
) -> tuple[BlockOutlier, ...]:
    found = faulty.nonzero()
    if not len(found):
        return ()
    size = times_expected[faulty].nan_to_num(nan=float("inf"))
    order = size.argsort(descending=True)[:MOST_LISTED]
    return tuple(
        BlockOutlier(row, block, times_expected[row, block].item(), relative[row, block].item())
        for row, block in found[order].tolist()
    )
