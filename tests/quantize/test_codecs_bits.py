"""Every searched quant type: the bytes of ggml's own C, with and without importances; and every decoder.

The oracle is the library of the llama.cpp runtime, whose quantization functions are built without fused
products, like ggml's plain C.
"""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file

from quantize.codecs import CODECS, Codec, codec
from quantize.codecs.fields import FieldCodec
from quantize.errors import PlanError, UsageError

COLUMNS = 512
SEARCHED = [name for name, kind in CODECS.items() if kind.uses_importance]
READ = [name for name, kind in CODECS.items() if kind.block_size > 1]
NEWER_THAN_GGUF_PY = ("Q1_0", "Q2_0")


def _kinds_of_rows() -> dict[str, torch.Tensor]:
    """Rows (N, 512): what weights look like, and what makes searches stumble."""
    generator = torch.Generator().manual_seed(11)

    def gaussian(n: int) -> torch.Tensor:
        return torch.randn(n, COLUMNS, generator=generator)

    heavy = gaussian(12) / gaussian(12).abs().add(0.02)
    sparse = gaussian(6) * (torch.rand(6, COLUMNS, generator=generator) < 0.05)
    outlier = gaussian(3)
    outlier[:, ::37] *= 100
    half_zero = gaussian(3)
    half_zero[:, :288] = 0
    constant = torch.tensor([0.37, -0.37, 0.0, -0.0, 1e-30]).unsqueeze(1).expand(5, COLUMNS)
    return {
        "gaussian": gaussian(20) * 0.02,
        "heavy-tailed": heavy,
        "constant": constant.contiguous(),
        "sparse": sparse,
        "signs": gaussian(3).sign(),
        "one-sided": torch.cat([gaussian(3).abs(), -gaussian(3).abs()]),
        "ties": (gaussian(4) * 2).round(),
        "outliers": outlier,
        "half zero": half_zero,
        "tiny": torch.cat(
            [gaussian(2) * 1e-6, gaussian(2) * 1e-15, gaussian(2) * 1e-30, gaussian(2) * 1e-39]
        ),
        "bf16": gaussian(8).bfloat16().float(),
    }


ROWS = _kinds_of_rows()


def _importances() -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(12)
    uneven = torch.rand(COLUMNS, generator=generator) ** 4 * 10 + 1e-4
    gaps = torch.rand(COLUMNS, generator=generator)
    gaps[gaps < 0.3] = 0
    return {"none": None, "uneven": uneven, "with zeros": gaps}


IMPORTANCES = _importances()


@pytest.fixture(scope="module")
def libggml() -> ctypes.CDLL:
    package = importlib.util.find_spec("xllamacpp")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the llama.cpp runtime is not installed (the `llama` extra)")
    library = ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "xllamacpp.abi3.so"))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return library


def _ggml(
    library: ctypes.CDLL, kind: Codec, rows: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    n, k = rows.shape
    blocks = torch.empty(n, kind.row_bytes(k), dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    library.ggml_quantize_chunk(kind.ggml_type, rows.data_ptr(), blocks.data_ptr(), 0, n, k, weights)
    return blocks


def _without_known_fault(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows on which ggml is right: in IQ3_S it misplaces all that follows 32 weights of zero."""
    if name != "IQ3_S":
        return rows
    gaps = (rows.reshape(len(rows), -1, 32) == 0).all(dim=2)
    return rows[~gaps.any(dim=1) | gaps.all(dim=1)]


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("name", "importance"),
    [(n, i) for n in SEARCHED for i in IMPORTANCES if i != "none" or not codec(n).needs_importance],
)
def test_bits_equal_ggml(libggml: ctypes.CDLL, name: str, importance: str) -> None:
    kind, weights = codec(name), IMPORTANCES[importance]
    for label, rows in ROWS.items():
        usable = _without_known_fault(name, rows)
        if len(usable):
            mine, its = kind.encode(usable, weights), _ggml(libggml, kind, usable, weights)
            equal = (mine == its).reshape(-1, kind.block_bytes).all(dim=1)
            assert equal.all(), f"{label}: {int((~equal).sum())} of {len(equal)} blocks differ"


@pytest.mark.runtime
def test_iq3_s_is_closer_than_ggml_behind_a_gap_of_zeros(libggml: ctypes.CDLL) -> None:
    rows, kind = ROWS["half zero"], codec("IQ3_S")
    errors = [
        (kind.decode(blocks, COLUMNS) - rows).square().sum()
        for blocks in (kind.encode(rows), _ggml(libggml, kind, rows, None))
    ]
    assert errors[0] < errors[1] / 4


@pytest.mark.runtime
@pytest.mark.parametrize("name", SEARCHED)
def test_bits_equal_ggml_on_real_rows(libggml: ctypes.CDLL, demo_folder: Path, name: str) -> None:
    if not (demo_folder / "model.safetensors").is_file():
        pytest.skip("the embedded model has no weights here")
    tensors = load_file(demo_folder / "model.safetensors")
    kind, tried = codec(name), 0
    for tensor in tensors.values():
        if tensor.ndim == 2 and tensor.shape[1] % 256 == 0 and tried < 4:
            tried += 1
            rows = tensor[:24].float().contiguous()
            weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(tried)) + 0.01
            assert torch.equal(kind.encode(rows, weights), _ggml(libggml, kind, rows, weights))
    if not tried:
        pytest.skip("the embedded model has no matrix of 256 columns or a multiple")


@pytest.mark.parametrize("importance", ["none", "uneven"])
@pytest.mark.parametrize("name", [name for name in SEARCHED if not name.startswith(("IQ1", "IQ2", "IQ3"))])
def test_the_search_in_torch_finds_the_same_fields(name: str, importance: str) -> None:
    kind, weights = codec(name), IMPORTANCES[importance]
    assert isinstance(kind, FieldCodec)
    for label, rows in ROWS.items():
        blocks = kind.pack(kind.search_tensors(rows, weights)).reshape(len(rows), -1)
        assert torch.equal(blocks, kind.encode(rows, weights)), label


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("importance", ["none", "uneven"])
@pytest.mark.parametrize("name", SEARCHED)
def test_a_gpu_writes_the_same_bytes(name: str, importance: str) -> None:
    kind = codec(name)
    weights = IMPORTANCES["uneven" if kind.needs_importance else importance]
    rows = torch.cat(list(ROWS.values()))
    there = kind.encode(rows.cuda(), weights)
    equal = (there.cpu() == kind.encode(rows, weights)).reshape(-1, kind.block_bytes).all(dim=1)
    assert equal.float().mean() >= 0.999
    assert torch.equal(kind.decode(there, COLUMNS).cpu(), kind.decode(there.cpu(), COLUMNS))


@pytest.mark.runtime
@pytest.mark.parametrize("name", NEWER_THAN_GGUF_PY)
def test_decode_equals_ggml_on_any_bytes(libggml: ctypes.CDLL, name: str) -> None:
    kind = codec(name)
    generator = torch.Generator().manual_seed(14)
    blocks = torch.randint(0, 256, (64, kind.row_bytes(COLUMNS)), generator=generator, dtype=torch.uint8)
    theirs = torch.empty(64, COLUMNS)
    decode = libggml[f"dequantize_row_{name.lower()}"]
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.data_ptr(), theirs.data_ptr(), 64 * COLUMNS)
    libggml.ggml_type_name.restype = ctypes.c_char_p
    libggml.ggml_blck_size.restype, libggml.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    assert libggml.ggml_type_name(kind.ggml_type).decode().upper() == name
    assert libggml.ggml_blck_size(kind.ggml_type) == kind.block_size
    assert libggml.ggml_type_size(kind.ggml_type) == kind.block_bytes
    torch.testing.assert_close(kind.decode(blocks, COLUMNS), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in READ if name not in NEWER_THAN_GGUF_PY])
def test_decode_equals_gguf_py_on_any_bytes(name: str) -> None:
    kind = codec(name)
    generator = torch.Generator().manual_seed(13)
    blocks = torch.randint(0, 256, (64, kind.row_bytes(COLUMNS)), generator=generator, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(blocks.numpy(), GGMLQuantizationType[name])
    decoded = kind.decode(blocks, COLUMNS).numpy()
    same = (decoded.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(decoded) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("name", SEARCHED)
def test_more_rows_than_a_tile_are_the_same_rows(name: str) -> None:
    kind, weights = codec(name), IMPORTANCES["uneven"]
    rows = torch.cat([ROWS["gaussian"]] * 3 + [ROWS["bf16"]])
    once = torch.cat([kind.encode(rows[i : i + 7], weights) for i in range(0, len(rows), 7)])
    assert torch.equal(kind.encode(rows, weights), once)


def test_a_type_that_needs_importances_says_so() -> None:
    with pytest.raises(UsageError, match="IQ2_XS needs importances"):
        codec("IQ2_XS").encode(ROWS["gaussian"])


def test_importances_of_another_width_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(7,\) importances for a matrix of 512 columns"):
        codec("Q4_K").encode(ROWS["gaussian"], torch.ones(7))


def test_types_that_are_only_read_say_so() -> None:
    assert [name for name, kind in CODECS.items() if not kind.writable] == [
        "NVFP4",
        "MXFP4",
        "Q2_0",
        "TQ2_0",
        "TQ1_0",
        "Q1_0",
    ]
    with pytest.raises(PlanError, match="TQ1_0 can be read but not written"):
        codec("TQ1_0").encode(ROWS["gaussian"])
