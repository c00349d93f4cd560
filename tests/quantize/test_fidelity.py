"""The outlier test: every planted fault is found, and no honest rounding is accused, however coarse it is."""

import math
from collections.abc import Callable

import pytest
import torch

from quantize.fidelity import check_blocks, check_exact, mean_shift

N, K = 256, 512


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def round_to_blocks(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """Symmetric round-to-nearest, one scale per block: the plainest quantizer there is."""
    blocks = weight.reshape(weight.shape[0], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    codes = (blocks / scale.clamp_min(1e-30)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    decoded: torch.Tensor = (codes * scale).reshape(weight.shape)
    return decoded


def round_compensated(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, block_size: int
) -> torch.Tensor:
    """GPTQ in its textbook form: each column's rounding error is spread over the columns to its right."""
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.float() + 0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, out = weight.masked_fill(dead, 0.0).T.contiguous(), torch.empty_like(weight).T.contiguous()
    for column in range(weight.shape[1]):
        if column % block_size == 0:
            scale = left[column : column + block_size].abs().amax(0) / (2 ** (bits - 1) - 0.5)
        codes = (left[column] / scale.clamp_min(1e-30)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out[column] = codes * scale
        spread = (left[column] - out[column]) / upper[column, column]
        left[column:] -= upper[column, column:, None] * spread
    return out.T.contiguous()


def plain_weight() -> torch.Tensor:
    return 0.02 * torch.randn(N, K, generator=generator(0))


def awkward_weight() -> torch.Tensor:
    """Heavy tails, rows and channels of all scales, zero and nearly zero blocks, one huge channel."""
    torch.manual_seed(1)
    weight = 0.02 * torch.distributions.StudentT(3.0).sample((N, K))
    weight *= torch.exp(0.5 * torch.randn(N, 1)) * torch.exp(0.5 * torch.randn(1, K))
    weight[:, 7] *= 20
    weight[:, 64:96] = 0
    weight[:, 128:160] *= 1e-3
    weight[5, 96:128] = 0
    weight[9] *= 1e-4
    weight[20:24, 200:240] *= 0.01
    return weight


def awkward_hessian() -> torch.Tensor:
    """Inputs of 64 strong directions over 512 channels, of which 74 are dead: the strongest compensation."""
    mix = torch.randn(64, K, generator=generator(2)) * torch.exp(torch.randn(1, K, generator=generator(3)))
    inputs = torch.randn(2048, 64, generator=generator(4)) @ mix + 0.1 * torch.randn(
        2048, K, generator=generator(5)
    )
    inputs[:, 300:310] = 0
    inputs[:, 416:480] = 0
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weight", [plain_weight, awkward_weight])
def test_plain_rounding_has_no_outlier(
    weight: Callable[[], torch.Tensor], bits: int, block_size: int
) -> None:
    source = weight()
    report = check_blocks(source, round_to_blocks(source, bits, block_size), block_size)
    assert report.n_outliers == 0
    assert report.n_blocks == N * K // block_size
    assert 0.7 < report.gain < 1.1


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compensated_rounding_has_no_outlier(bits: int, block_size: int) -> None:
    source = awkward_weight()
    decoded = round_compensated(source, awkward_hessian(), bits, block_size)
    report = check_blocks(source, decoded, block_size)
    assert report.worst_block > 1 or bits == 8  # no bound on a block's relative error would have held
    assert report.n_outliers == 0
    assert 0.6 < report.gain < 1.1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_flipped_scale_is_found(bits: int) -> None:
    source = plain_weight()
    decoded = round_to_blocks(source, bits, 32)
    decoded[200, 64:96] *= -1
    report = check_blocks(source, decoded, 32)
    assert report.n_outliers == 1
    assert (report.outliers[0].row, report.outliers[0].block) == (200, 2)
    assert report.outliers[0].relative_error == pytest.approx(2.0, abs=0.2)


def test_one_flipped_scale_is_found_in_a_tensor_of_the_largest_models() -> None:
    source = torch.empty(11008, 4096, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator(0))
    decoded = source.float() + torch.empty(11008, 4096).normal_(0, 1e-4, generator=generator(1))
    decoded[7777, 4000:4032] *= -1
    report = check_blocks(source, decoded, 32)
    assert [(found.row, found.block) for found in report.outliers] == [(7777, 125)]


@pytest.mark.parametrize(("bits", "share"), [(2, 0.95), (3, 0.3), (4, 0.14), (8, 0.008)])
def test_the_limit_that_is_stated_a_small_block(bits: int, share: float) -> None:
    source = plain_weight()
    source[40, 320:352] *= share
    decoded = round_to_blocks(source, bits, 32)
    decoded[40, 320:352] *= -1
    assert check_blocks(source, decoded, 32).n_outliers == 1


def test_a_flip_below_the_noise_is_not_found() -> None:
    source = plain_weight()
    source[40, 320:352] *= 1e-4
    decoded = round_to_blocks(source, 8, 32)
    decoded[40, 320:352] *= -1
    assert check_blocks(source, decoded, 32).n_outliers == 0


def test_two_flips_in_a_short_row_do_not_hide_each_other() -> None:
    source = plain_weight()[:, :128]
    decoded = round_to_blocks(source, 4, 32)
    decoded[3, :64] *= -1
    assert check_blocks(source, decoded, 32).n_outliers == 2


def test_flipped_scale_of_an_asymmetric_block_is_found() -> None:
    # decoded = d * code - m: with d flipped nothing of the block points against its source exactly.
    source = plain_weight()
    blocks = source.reshape(N, -1, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = (high - low) / 3
    codes = ((blocks - low) / scale).round()
    scale[100, 5] *= -1
    report = check_blocks(source, (codes * scale + low).reshape(N, K), 32)
    assert [(found.row, found.block) for found in report.outliers] == [(100, 5)]


def test_wrong_exponent_and_wrong_code_of_a_fine_type_are_found() -> None:
    source = plain_weight()
    decoded = round_to_blocks(source, 8, 32)
    decoded[1, :32] *= 2
    decoded[2, 40] = -decoded[2].abs().max()
    found = check_blocks(source, decoded, 32).outliers
    assert {(outlier.row, outlier.block) for outlier in found} == {(1, 0), (2, 1)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_found(value: float) -> None:
    decoded = plain_weight()
    decoded[8, 33] = value
    report = check_blocks(plain_weight(), decoded, 32)
    assert [(found.row, found.block) for found in report.outliers] == [(8, 1)]


def test_permuted_rows_have_no_gain() -> None:
    source = plain_weight()
    decoded = round_to_blocks(source, 4, 32)[torch.randperm(N, generator=generator(6))]
    report = check_blocks(source, decoded, 32)
    assert abs(report.gain) < 0.05
    assert report.relative_error == pytest.approx(math.sqrt(2), abs=0.05)


def test_zeros_are_right() -> None:
    zeros = torch.zeros(4, 64)
    report = check_blocks(zeros, zeros, 32)
    assert (report.n_outliers, report.relative_error, report.gain, report.worst_block) == (0, 0.0, 1.0, 0.0)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="want equal matrices"):
        check_blocks(torch.zeros(4, 64), torch.zeros(4, 32), 32)
    with pytest.raises(ValueError, match="no whole blocks of 48"):
        check_blocks(torch.zeros(4, 64), torch.zeros(4, 64), 48)
    with pytest.raises(ValueError, match="decoded"):
        check_exact(torch.zeros(4), torch.zeros(5), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_types_are_exact(dtype: torch.dtype) -> None:
    source = plain_weight()
    report = check_exact(source, source.to(dtype).float(), dtype)
    assert report.n_outliers == 0
    assert report.gain == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_wrong_bit_of_a_float_type_is_found(dtype: torch.dtype) -> None:
    source = plain_weight()
    stored = source.to(dtype, copy=True)
    bits = stored.view(torch.int32 if dtype is torch.float32 else torch.int16)
    bits[211, 3] ^= 1
    report = check_exact(source, stored.float(), dtype)
    assert report.n_outliers == 1
    assert report.outliers[0].row == 211


def test_a_flipped_norm_is_found() -> None:
    gains = torch.rand(64, generator=generator(0)) + 0.5
    wrong = gains.clone()
    wrong[10] *= -1
    assert check_exact(gains, wrong, torch.float32).n_outliers == 1


def test_a_grid_that_is_one_step_off_shows_in_the_mean() -> None:
    """Scales of either sign; a group without a scale says nothing. In chunks as all at once."""
    drawn = generator(0)
    steps = torch.randn(3000, 64, generator=drawn)
    source = torch.randn(3000, 64, generator=drawn)
    rounded = (source / steps).round() * steps
    steps[:, :8] = 0
    assert abs(mean_shift(source, rounded, steps)) < 0.005
    assert mean_shift(source, rounded - steps, steps) == pytest.approx(-1, abs=0.005)
    expected = ((rounded - source)[:, 8:] / steps[:, 8:]).double().mean()
    assert mean_shift(source, rounded, steps) == pytest.approx(float(expected), abs=1e-6)
    assert mean_shift(source, rounded, steps * 0) == 0
