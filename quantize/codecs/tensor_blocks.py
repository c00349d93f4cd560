"""From rows to fields in torch operations: what `quantize.codecs.native` does, for tensors on a GPU."""

import torch

from quantize.codecs.fields import Fields
from quantize.codecs.native.iq4 import VALUES
from quantize.codecs.tensors import (
    Tensor,
    affine,
    by_importance,
    descend,
    extremes,
    largest_of,
    nearest,
    over,
    positive,
    root,
    symmetric,
    total,
)

Ladder = tuple[float, float, int]
_WIDE_LADDER: Ladder = (-0.9, 0.05, 36)
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2


def _lanes(rows: Tensor, n: int) -> Tensor:
    """Return rows cut into blocks of n, as (n, B)."""
    return rows.reshape(-1, n).t().contiguous()


def _importance_lanes(rows: Tensor, importance: Tensor, n: int) -> Tensor:
    """Return the importances beside every weight, as (n, B)."""
    return _lanes(importance.expand(len(rows), -1), n)


def _halved(values: Tensor) -> Tensor:
    return values.half().float()


def _subs(x: Tensor, n_subs: int) -> Tensor:
    """Cut lanes of 256 weights into those of sub-blocks: (n, n_subs * B), all first sub-blocks first."""
    return x.reshape(n_subs, -1, x.shape[1]).transpose(0, 1).reshape(256 // n_subs, -1)


def _together(parts: Tensor, n_blocks: int) -> Tensor:
    """Undo `_subs` for codes (n, n_subs * B): (B, 256) bytes."""
    n = len(parts)
    return parts.reshape(n, -1, n_blocks).permute(2, 1, 0).reshape(n_blocks, 256).to(torch.uint8)


def _super_weights(rows: Tensor, x: Tensor, importance: Tensor, factor: float) -> Tensor:
    variance = over(factor * total(x * x), 256.0)
    return by_importance(x, _importance_lanes(rows, importance, len(x)), variance)


def _by_largest(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    largest = largest_of(x)
    inverse = torch.where(largest > 0, over(float(top), largest), 0.0)
    return (nearest(inverse * x) & 0xFF).clamp(max=top), over(largest, float(top))


def affine_blocks(
    rows: Tensor, importance: Tensor | None, shape: tuple[int, int, int], ladder: Ladder
) -> Fields:
    """Return the fields of Q2_K, Q4_K or Q5_K; arguments as in `native.k_quants.affine_blocks`."""
    n_subs, top, scale_top = shape
    n, x = 256 // n_subs, _lanes(rows, 256)
    sub_x, n_blocks = _subs(x, n_subs), x.shape[1]
    if importance is None:
        mean = root(over(total(sub_x * sub_x), 32.0)) if n == 32 else torch.zeros_like(sub_x[0])
        codes, scale, drop = affine(sub_x, mean + sub_x.abs(), top, ladder, n == 16)
        scales, d = _by_largest(scale.reshape(n_subs, -1), scale_top)
        mins, dmin = _by_largest(drop.reshape(n_subs, -1), scale_top)
    else:
        weights = _subs(_super_weights(rows, x, importance, 1.0 if n == 16 else 2.0), n_subs)
        codes, scale, drop = affine(sub_x, weights, top, _WIDE_LADDER, False)
        sums = total(weights).reshape(n_subs, -1)
        scales, d = positive(scale.reshape(n_subs, -1), sums, scale_top)
        mins, dmin = positive(drop.reshape(n_subs, -1), sums, scale_top)
    d, dmin = _halved(d), _halved(dmin)
    step, offset = (d * scales.float()).flatten(), (dmin * mins.float()).flatten()
    again = nearest(over(sub_x + offset, step)).clamp(0, top)
    codes = _together(torch.where(step != 0, again, codes), n_blocks)
    return Fields(d, codes, scales.t().to(torch.uint8), dmin, mins.t().to(torch.uint8))


def _by_extreme(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    extreme = extremes(scales)
    inverse = over(float(-top), extreme)
    codes = nearest(inverse * scales).clamp(max=127).to(torch.int8).clamp(-top, top - 1)
    zero = extreme == 0
    return torch.where(zero, -top, codes), torch.where(zero, 0.0, over(1.0, inverse))


def _symmetric_fields(sub_x: Tensor, codes: Tensor, scales: Tensor, d: Tensor, top: int) -> Fields:
    d = _halved(d)
    step = (d * scales.float()).flatten()
    again = nearest(over(sub_x, step)).clamp(-top, top - 1) + top
    codes = _together(torch.where(step != 0, again, codes), len(d))
    return Fields(d, codes, scales.t().to(torch.int8).contiguous())


def q3_k_blocks(rows: Tensor, importance: Tensor | None) -> Fields:
    """Return the fields of Q3_K."""
    x = _lanes(rows, 256)
    sub_x = _subs(x, 16)
    if importance is None:
        codes, scale = descend(sub_x, sub_x * sub_x, 4)
        scales, d = _by_extreme(scale.reshape(16, -1), 32)
    else:
        weights = _subs(_super_weights(rows, x, importance, 2.0), 16)
        codes, scale = symmetric(sub_x, weights, 4)
        stored, d = symmetric(scale.reshape(16, -1), total(weights).reshape(16, -1), 32)
        scales = stored - 32
    return _symmetric_fields(sub_x, codes, scales, d, 4)


def q6_k_blocks(rows: Tensor, importance: Tensor | None) -> Fields:
    """Return the fields of Q6_K."""
    x = _lanes(rows, 256)
    sub_x = _subs(x, 16)
    weights = sub_x * sub_x if importance is None else _subs(_importance_lanes(rows, importance, 256), 16)
    codes, scale = symmetric(sub_x, weights, 32)
    scale = scale.reshape(16, -1)
    scales, d = _by_extreme(scale, 128)
    zero = scale.abs().amax(dim=0) < 1e-15
    scales, d = torch.where(zero, 0, scales), torch.where(zero, 0.0, d)
    codes = torch.where(zero.repeat(16), 0, codes)
    return _symmetric_fields(sub_x, codes, scales, d, 32)


def _row_weights(rows: Tensor, x: Tensor, importance: Tensor) -> Tensor:
    """Return the weights of blocks of 32, by the mean square of their whole row."""
    variance = over(total((rows * rows).t().contiguous()), float(rows.shape[1]))
    per_block = variance.repeat_interleave(rows.shape[1] // 32)
    return by_importance(x, _importance_lanes(rows, importance, 32), per_block)


def legacy_symmetric(rows: Tensor, importance: Tensor, top: int) -> Fields:
    """Return the fields of Q4_0 or Q5_0 with importances."""
    x = _lanes(rows, 32)
    codes, d = symmetric(x, _row_weights(rows, x, importance), top)
    return Fields(d, codes.t().to(torch.uint8))


def legacy_affine(rows: Tensor, importance: Tensor, top: int) -> Fields:
    """Return the fields of Q4_1 or Q5_1 with importances."""
    x = _lanes(rows, 32)
    codes, d, drop = affine(x, _row_weights(rows, x, importance), top, _WIDE_LADDER, False)
    return Fields(d, codes.t().to(torch.uint8), dmin=-drop)


def _value_codes(scaled: Tensor) -> Tensor:
    midpoints = torch.from_numpy(_MIDPOINTS).to(scaled.device)
    return torch.bucketize(scaled, midpoints, right=True, out_int32=True)


def _iq4_scale(x: Tensor, weights: Tensor) -> Tensor:
    """Return the best scale of each lane (32, B); see `native.iq4`."""
    values, extreme = torch.from_numpy(VALUES).to(x.device), extremes(x)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        value = values[_value_codes(inverse * x)]
        weighted = weights * value
        return total(weighted * x), total(weighted * value)

    sum_qx, sum_qq = sums(over(1.0, over(-extreme, -127.0)))
    scale = torch.where(sum_qq > 0, over(sum_qx, sum_qq), 0.0)
    best = scale * sum_qx
    for k in range(-7, 8):
        sum_qx, sum_qq = sums(over(float(k - 127), extreme))
        wins = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = torch.where(wins, over(sum_qx, sum_qq), scale)
        best = torch.where(wins, scale * sum_qx, best)
    return torch.where(extreme.abs() < 1e-15, 0.0, scale)


def _inverse(steps: Tensor) -> Tensor:
    return torch.where(steps != 0, over(1.0, steps), 0.0)


def _iq4_weights(rows: Tensor, x: Tensor, importance: Tensor | None) -> Tensor:
    if importance is None:
        return x * x
    variance = total(x * x) * (2.0 / len(x))
    return by_importance(x, _importance_lanes(rows, importance, len(x)), variance)


def iq4_nl_blocks(rows: Tensor, importance: Tensor | None) -> Fields:
    """Return the fields of IQ4_NL."""
    x = _lanes(rows, 32)
    d = _iq4_scale(x, _iq4_weights(rows, x, importance))
    return Fields(d, _value_codes(_inverse(d) * x).t().to(torch.uint8))


def iq4_xs_blocks(rows: Tensor, importance: Tensor | None) -> Fields:
    """Return the fields of IQ4_XS."""
    x = _lanes(rows, 256)
    sub_x = _subs(x, 8)
    scale = _iq4_scale(sub_x, _subs(_iq4_weights(rows, x, importance), 8)).reshape(8, -1)
    d = over(-extremes(scale), 32.0)
    scales = nearest(_inverse(d) * scale).clamp(-32, 31)
    codes = _value_codes(_inverse(d * scales.float()).flatten() * sub_x)
    return Fields(d, _together(codes, len(d)), scales.t().to(torch.int8).contiguous())
