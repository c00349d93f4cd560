"""Shards: mapped tensors equal the saved ones, headers tell every kind of damage, memory stays flat."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.bin_shards import BinWeights, bin_inventory, load_bin, read_bins
from converters.inventory import Found, harmless, tensor_reasons
from converters.safetensors_header import read_header
from converters.shards import SafetensorsWeights, read_safetensors, safetensors_inventory
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig

CONFIG = LlamaConfig(64, 96, 2, 4, 2, 16, 50, 128, 1e-6, 10000.0)


def tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5, generator=generator).to(dtype),
        "b.weight": torch.randn(3, generator=generator).to(dtype),
        "c.weight": torch.randn(11, 2, generator=generator).to(dtype),
    }


def raw_file(path: Path, table: object, n_data: int) -> Path:
    """Write a safetensors file with any header over `n_data` zero bytes."""
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_data))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mapped_tensors_are_the_saved_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = tensors(dtype)
    save_file(saved, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(read_safetensors([tmp_path / "model.safetensors"]))
    assert {n: (s.shape, s.dtype) for n, s in weights.specs().items()} == {
        n: (tuple(t.shape), dtype) for n, t in saved.items()
    }
    for name, tensor in saved.items():
        loaded = weights.load(name)
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)


def test_a_tensor_outlives_its_weights_and_its_file(tmp_path: Path) -> None:
    saved = tensors()
    file = tmp_path / "model.safetensors"
    save_file(saved, file)
    loaded = SafetensorsWeights(read_safetensors([file])).load("c.weight")
    file.unlink()
    assert torch.equal(loaded, saved["c.weight"])


def test_specs_keep_the_order_that_was_asked_for(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    inventory = safetensors_inventory([tmp_path / "model.safetensors"])
    assert list(inventory.open(["c.weight", "a.weight"]).specs()) == ["c.weight", "a.weight"]


def test_writing_to_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    before = file.read_bytes()
    SafetensorsWeights(read_safetensors([file])).load("a.weight").zero_()
    assert file.read_bytes() == before


MEASURE = """
import sys
from pathlib import Path
from converters.shards import SafetensorsWeights, read_safetensors

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

weights = SafetensorsWeights(read_safetensors([Path(sys.argv[1])]))
anonymous, peak, total = kib("RssAnon"), kib("VmRSS"), 0.0
for name in weights.specs():
    tensor = weights.load(name)
    total += float(tensor[0].sum()) + float(tensor.view(-1)[::512].sum())
    peak = max(peak, kib("VmRSS"))
print(kib("RssAnon") - anonymous, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_a_file_of_many_tensors(tmp_path: Path) -> None:
    n_tensors, rows = 24, 4096  # 24 tensors of 8 MiB
    save_file(
        {f"t{i}": torch.ones(rows, 1024, dtype=torch.bfloat16) for i in range(n_tensors)}, tmp_path / "m"
    )
    save_file({"t0": torch.ones(rows, 1024, dtype=torch.bfloat16)}, tmp_path / "one")

    def run(name: str) -> tuple[int, int]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=root, env=dict(os.environ)
        )
        anonymous, peak = map(int, done.stdout.split())
        return anonymous, peak

    (anonymous, peak), (_, peak_of_one) = run("m"), run("one")
    assert anonymous < 4 * 1024
    assert peak - peak_of_one < 16 * 1024


def test_tensors_at_odd_offsets_load(tmp_path: Path) -> None:
    """Nothing in the format aligns the data; only most writers do."""
    values = torch.tensor([1.5, -2.0, 3.25])
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((3 - len(header)) % 4)  # the data begins at 4k + 3
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    assert torch.equal(SafetensorsWeights(read_safetensors([path])).load("x"), values)


@pytest.mark.parametrize("cut", [1, 20, 83])
def test_a_truncated_shard_says_how_much_is_missing(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    with pytest.raises(CheckpointError, match=f"model.safetensors: truncated: {cut} of {len(content)} bytes"):
        read_header(file)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "truncated: 0 bytes"),
        (lambda path: path.write_bytes(b"\x10\0\0"), "truncated: 3 bytes"),
        (
            lambda path: path.write_bytes(b"\x50" + bytes(7) + b"{}"),
            "truncated inside its header, at least 78",
        ),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 9), "is no safetensors file"),
        (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{,"), "damaged header"),
        (lambda path: raw_file(path, [1], 0), "damaged header"),
        (lambda path: raw_file(path, {"x": 3}, 0), "damaged header"),
        (lambda path: raw_file(path, {"x": {**ENTRY, "dtype": "F31"}}, 16), "damaged header"),
        (lambda path: raw_file(path, {"x": {**ENTRY, "shape": [2, 3]}}, 16), "x: 16 bytes for F32"),
        (lambda path: raw_file(path, {"x": {**ENTRY, "shape": [-2, -2]}}, 16), "damaged header"),
        (
            lambda path: raw_file(path, {"x": {**ENTRY, "data_offsets": [4, 20]}}, 20),
            "overlap or leave a gap at x",
        ),
        (lambda path: raw_file(path, {"x": ENTRY, "y": ENTRY}, 16), "overlap or leave a gap at y"),
        (lambda path: raw_file(path, {"x": ENTRY}, 19), "3 bytes more"),
    ],
)
def test_every_damage_of_a_header_has_its_own_words(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in "abc"]
    for file in files:
        save_file(tensors(), file)
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(files)
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["a.safetensors", "b.safetensors"]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(tensors(), files[0])
    save_file({"b.weight": torch.zeros(3)}, files[1])
    with pytest.raises(CheckpointError, match=r"b\.weight is in a\.safetensors and in b\.safetensors"):
        read_safetensors(files)


def test_a_shard_that_vanishes_is_an_error_for_the_user(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    weights = SafetensorsWeights(read_safetensors([file]))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at a\.weight"):
        weights.load("a.weight")


def test_bin_shards_load_the_saved_tensors(tmp_path: Path) -> None:
    saved = tensors()
    files = [tmp_path / "1.bin", tmp_path / "2.bin"]
    torch.save({name: saved[name] for name in ("a.weight", "b.weight")}, files[0])
    torch.save({"c.weight": torch.nn.Parameter(saved["c.weight"])}, files[1])
    weights = BinWeights(read_bins(files))
    for name in ("a.weight", "c.weight", "b.weight"):
        assert torch.equal(weights.load(name), saved[name])
        assert not weights.load(name).requires_grad
    assert weights.specs()["a.weight"].dtype == torch.bfloat16


def test_bin_tensors_that_are_views_of_others_load(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"t": whole.T, "part": whole[1:]}, tmp_path / "m.bin")
    weights = BinWeights(read_bins([tmp_path / "m.bin"]))
    assert torch.equal(weights.load("t"), whole.T)
    assert weights.load("t").is_contiguous()
    assert torch.equal(weights.load("part"), whole[1:])


class Payload:
    """A pickle that would run code: creating a file is all it does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Payload(tmp_path / "ran")}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"m\.bin: holds Python objects other than tensors"):
        load_bin(tmp_path / "m.bin")
    assert not (tmp_path / "ran").exists()


def test_broken_bins_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-100])
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "nested.bin")
    torch.save(torch.zeros(2), tmp_path / "bare.bin")
    with pytest.raises(CheckpointError) as caught:
        read_bins([tmp_path / f"{name}.bin" for name in ("cut", "old", "nested", "bare")])
    words = [
        "cut.bin: truncated",
        "old.bin: truncated, or not in the zip",
        "nested.bin: expected a flat",
        "bare.bin",
    ]
    assert [r[: len(w)] for r, w in zip(caught.value.reasons, words, strict=True)] == words


def found(config: LlamaConfig = CONFIG, dtype: str = "BF16") -> dict[str, Found]:
    return {name: Found(shape, dtype) for name, shape in config.tensor_shapes().items()}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_complete_model_has_no_reasons(dtype: str) -> None:
    assert tensor_reasons(CONFIG, found(dtype=dtype)) == []


def test_norms_may_have_another_dtype() -> None:
    mixed = {n: Found(t.shape, "F32" if len(t.shape) == 1 else "BF16") for n, t in found().items()}
    assert tensor_reasons(CONFIG, mixed) == []


def test_missing_extra_misshaped_and_dtypes_come_at_once() -> None:
    table = found()
    del table[HEAD]
    del table["model.layers.1.mlp.up_proj.weight"]
    table["model.layers.0.self_attn.q_proj.bias"] = Found((64,), "BF16")
    table["model.norm.weight"] = Found((65,), "BF16")
    table[EMBEDDING] = Found((50, 64), "F64")
    table["model.layers.0.mlp.up_proj.weight"] = Found((96, 64), "F8_E4M3")
    assert tensor_reasons(CONFIG, table) == [
        f"2 tensors missing: model.layers.1.mlp.up_proj.weight, {HEAD}",
        "1 tensor extra, not part of a Llama: model.layers.0.self_attn.q_proj.bias",
        "1 tensor misshaped: model.norm.weight [65] (expected [64])",
        f"1 tensor stored as F64 (supported: BF16, F16, F32): {EMBEDDING}",
        "1 tensor stored as F8_E4M3 (supported: BF16, F16, F32): model.layers.0.mlp.up_proj.weight",
    ]


def test_long_lists_are_counted() -> None:
    (reason,) = tensor_reasons(CONFIG, {})[:1]
    assert reason.startswith("21 tensors missing: model.embed_tokens.weight")
    assert reason.endswith("and 9 more")


@pytest.mark.parametrize(
    ("name", "passed_over"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("transformer.h.0.attn.bias", True),
        ("model.layers.3.self_attn.q_proj.bias", False),
        (HEAD, False),
    ],
)
def test_harmless_extras(name: str, passed_over: bool) -> None:
    assert harmless(CONFIG, name) is passed_over
    table = {**found(), name: Found((50, 64), "F32")}
    assert (tensor_reasons(CONFIG, table) == []) is (passed_over or name == HEAD)


def test_the_stored_head_of_a_tied_model_must_have_the_embeddings_shape() -> None:
    tied = LlamaConfig(64, 96, 2, 4, 2, 16, 50, 128, 1e-6, 10000.0, tied_head=True)
    assert tensor_reasons(tied, found(tied)) == []
    assert tensor_reasons(tied, {**found(tied), HEAD: Found((50, 64), "BF16")}) == []
    (reason,) = tensor_reasons(tied, {**found(tied), HEAD: Found((49, 64), "BF16")})
    assert "misshaped" in reason


def test_a_bin_inventory_speaks_of_dtypes_as_safetensors_does(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.int8)}, tmp_path / "m.bin"
    )
    table = bin_inventory([tmp_path / "m.bin"]).found
    assert (table["a"].dtype, table["b"].dtype) == ("BF16", "int8")
