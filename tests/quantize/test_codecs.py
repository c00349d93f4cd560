"""Every codec: sizes, round trip, and the same bits as gguf-py and as ggml itself."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from quantize.codecs import CODECS, Codec, codec
from quantize.errors import UsageError

WRITTEN = [name for name, kind in CODECS.items() if kind.writable]
WRITABLE = pytest.mark.parametrize("codec_name", WRITTEN)
# No search stands behind these without importances; ggml judges, from which gguf-py differs in signs of zero.
PLAIN = pytest.mark.parametrize("codec_name", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
EXACT = pytest.mark.parametrize("codec_name", ["F32", "F16", "BF16", "Q8_0"])
ALL = pytest.mark.parametrize("codec_name", list(CODECS))


def _encode(kind: Codec, rows: torch.Tensor) -> torch.Tensor:
    """Encode, with equal importances where the type needs some."""
    return kind.encode(rows, torch.ones(rows.shape[1]) if kind.needs_importance else None)


def _awkward_rows() -> torch.Tensor:
    """Rows (N, 256) in which rounding has something to decide: ties, zeros, subnormals, outliers."""
    generator = torch.Generator().manual_seed(7)
    gaussian = torch.randn(200, 256, generator=generator)
    ties = torch.arange(256).float().sub(128).add(0.5).repeat(4, 1)  # x / d is near a half everywhere
    ties[:, ::32] = 127.0  # so that d is 1 and every tie is exact
    outliers = gaussian[:20].clone()
    outliers[:, 5] *= 1e4
    rows = [gaussian, gaussian * 0.02, ties, -ties, outliers, gaussian[:9] * 1e-6, gaussian[:9] * 1e-30]
    zeros = torch.zeros(3, 256)
    zeros[1] = -0.0
    zeros[2, 40] = 1e-30
    return torch.cat([*rows, zeros])


def _libggml() -> ctypes.CDLL:
    package = importlib.util.find_spec("xllamacpp")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the llama.cpp runtime is not installed (the `llama` extra)")
    return ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "xllamacpp.abi3.so"))


def _ggml_encode(library: ctypes.CDLL, kind: Codec, rows: torch.Tensor) -> torch.Tensor:
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    blocks = torch.empty(len(rows), kind.row_bytes(rows.shape[1]), dtype=torch.uint8)
    written = function(kind.ggml_type, rows.data_ptr(), blocks.data_ptr(), 0, len(rows), rows.shape[1], None)
    assert written == blocks.numel()
    return blocks


@pytest.mark.parametrize("codec_name", [n for n in CODECS if n in GGMLQuantizationType.__members__])
def test_layout_is_ggmls(codec_name: str) -> None:
    kind = codec(codec_name)
    assert (kind.block_size, kind.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[codec_name]]
    assert kind.ggml_type == GGMLQuantizationType[codec_name]


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_equal_gguf_py(codec_name: str, dtype: torch.dtype) -> None:
    rows = _awkward_rows().to(dtype)
    expected = quantize(rows.float().numpy(), GGMLQuantizationType[codec_name])
    encoded = codec(codec_name).encode(rows)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (len(rows), codec(codec_name).row_bytes(256))
    np.testing.assert_array_equal(encoded.numpy(), expected.view(np.uint8).reshape(len(rows), -1))


@pytest.mark.runtime
@PLAIN
def test_bits_equal_ggml(codec_name: str) -> None:
    rows = _awkward_rows()
    blocks = _ggml_encode(_libggml(), codec(codec_name), rows)
    np.testing.assert_array_equal(codec(codec_name).encode(rows).numpy(), blocks.numpy())


def test_q8_0_rounds_every_tie_as_c_does() -> None:
    # d is exactly 1: codes are the rounded weights. Every half, and the floats right beside it.
    halves = torch.arange(-126, 126).float() + 0.5
    near = torch.cat([halves, *(torch.nextafter(halves, torch.full((), to)) for to in (-200.0, 200.0))])
    rows = torch.cat([torch.full((len(near), 1), 127.0), near.unsqueeze(1).expand(-1, 31)], dim=1)
    codes = codec("Q8_0").encode(rows)[:, 2:].view(torch.int8)
    expected = [int(np.trunc(x + np.copysign(0.5, x))) for x in near.double().tolist()]
    assert codes[:, 1].tolist() == expected


@WRITABLE
def test_decode_equals_gguf_py(codec_name: str) -> None:
    kind = codec(codec_name)
    blocks = _encode(kind, _awkward_rows())
    expected = dequantize(blocks.numpy(), GGMLQuantizationType[codec_name])
    decoded = kind.decode(blocks, 256)
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.numpy(), expected)


@WRITABLE
def test_rows_are_independent(codec_name: str) -> None:
    rows = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    kind = codec(codec_name)
    one_by_one = torch.cat([_encode(kind, row.unsqueeze(0)) for row in rows])
    assert torch.equal(_encode(kind, rows), one_by_one)
    assert torch.equal(_encode(kind, rows.t().contiguous().t()), one_by_one)


@WRITABLE
def test_magnitudes_below_overflow_stay_finite(codec_name: str) -> None:
    kind = codec(codec_name)
    bound = torch.tensor(min(kind.overflow, torch.finfo(torch.float32).max), dtype=torch.float32)
    largest = torch.nextafter(bound, torch.tensor(0.0))
    rows = torch.zeros(5, 256)
    rows[0, 3], rows[1, 9] = largest, -largest
    if kind.block_size > 1 or kind.overflow < float("inf"):
        rows[2:] = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).clamp(-1, 1) * largest
    assert kind.decode(_encode(kind, rows), 256).isfinite().all()


@EXACT
def test_overflow_is_the_first_magnitude_that_turns_infinite(codec_name: str) -> None:
    kind = codec(codec_name)
    if kind.overflow < float("inf"):
        above = torch.zeros(1, 32)
        above[0, 3] = kind.overflow
        assert not kind.decode(kind.encode(above), 32).isfinite().all()


def test_bf16_and_f32_are_copies_of_what_is_that_already() -> None:
    rows = torch.randn(4, 64)
    assert codec("F32").encode(rows).data_ptr() == rows.data_ptr()
    brain = rows.bfloat16()
    assert codec("BF16").encode(brain).data_ptr() == brain.data_ptr()


def test_names_are_found_in_any_case_and_unknown_ones_list_the_known() -> None:
    assert codec("q8_0") is codec("Q8_0")
    with pytest.raises(UsageError, match=r"unknown quant type 'Q9'\nknown: F32, F16, BF16, Q8_0, Q6_K, "):
        codec("Q9")
