"""Genuine files of llama-imatrix, read; and files of our own, which are the same bytes for the same sums."""

import re
import struct
from pathlib import Path

import pytest
import torch

from converters.config import read_config, read_json
from converters.gguf_file import read_head
from converters.imatrix import COUNTS, SUMS, read_importances
from converters.imatrix_file import Sums, write_imatrix
from converters.names import gguf_name
from quantize.errors import ImatrixError, OutputError, UsageError
from quantize.llama import HEAD, LlamaConfig, block_tensor

GENUINE = Path(__file__).parent / "data"
SUFFIXES = ["gguf", "dat"]
CONFIG = LlamaConfig(8, 12, 2, 2, 1, 4, 20, 64, 1e-6, 1e4)
ENTRIES: Sums = {
    gguf_name(HEAD): (torch.linspace(0.5, 4, 8), 300),
    gguf_name(block_tensor(0, "mlp.down_proj")): (torch.arange(12, dtype=torch.float32), 7),
}


def genuine_sums() -> Sums:
    """What llama-imatrix summed, taken from its GGUF without our reader of importances."""
    head = read_head(GENUINE / "imatrix.gguf")
    data = head.path.read_bytes()[head.data_start :]
    values = {
        t.name: torch.tensor(struct.unpack_from(f"<{t.n_bytes // 4}f", data, t.offset)) for t in head.tensors
    }
    names = [name.removesuffix(SUMS) for name in values if name.endswith(SUMS)]
    return {name: (values[name + SUMS], int(values[name + COUNTS])) for name in names}


def test_both_formats_of_llama_imatrix_agree(demo_folder: Path) -> None:
    config = read_config(read_json(demo_folder / "config.json"))
    new, old = (read_importances(GENUINE / f"imatrix.{suffix}", config) for suffix in SUFFIXES)
    matrices = {name for name, shape in config.tensor_shapes().items() if len(shape) == 2}
    assert set(new.rows) == set(old.rows) == matrices - {"model.embed_tokens.weight"}
    assert (new.dataset, new.n_chunks) == (old.dataset, old.n_chunks) == ("calibration.txt", 3)
    for name, (sums, n_tokens) in genuine_sums().items():
        assert n_tokens == 384
        found = [read.rows[n] for read in (new, old) for n in read.rows if gguf_name(n) == name]
        assert all(torch.allclose(row, sums / 384, rtol=1e-6, atol=0) for row in found)
        assert len(found) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_sums_give_the_bytes_of_llama_imatrix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_imatrix(path, dict(reversed(list(genuine_sums().items()))), "calibration.txt", 128, 3)
    assert path.read_bytes() == (GENUINE / f"imatrix.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [*SUFFIXES, "GGUF"])
def test_what_was_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_imatrix(path, ENTRIES, "Code, \u00e4hnlich", 128, 3)
    found = read_importances(path, CONFIG)
    assert (found.dataset, found.n_chunks, len(found.rows)) == ("Code, \u00e4hnlich", 3, 2)
    for name, row in found.rows.items():
        sums, n_tokens = ENTRIES[gguf_name(name)]
        assert torch.allclose(row, sums / n_tokens, rtol=1e-6, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_has_the_name_is_replaced_by_a_whole_file_only(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    with pytest.raises(ImatrixError):
        write_imatrix(path, {}, "", 128, 3)
    assert path.read_bytes() == b"before"
    write_imatrix(path, ENTRIES, "", 128, 3)
    assert len(read_importances(path, CONFIG).rows) == 2


@pytest.mark.parametrize("name", ["a.bin", "a", "gguf"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{name}: an imatrix is written as .gguf or")):
        write_imatrix(tmp_path / name, ENTRIES, "", 128, 3)
    assert not list(tmp_path.iterdir())


def test_all_that_no_reader_would_take_is_said_at_once(tmp_path: Path) -> None:
    good = torch.ones(4)
    entries: Sums = {
        "long" * 14: (good, 1),
        "wide": (good.double(), 1),
        "matrix": (good[None], 1),
        "empty": (good[:0], 1),
        "negative": (-good, 1),
        "nan": (good * torch.nan, 1),
        "unused": (good, 0),
        "good": (good, 1),
    }
    with pytest.raises(ImatrixError) as caught:
        write_imatrix(tmp_path / "a.dat", entries, "", 0, 3)
    assert list(caught.value.reasons) == [
        "3 chunks of 0 tokens, expected at least one of each",
        f"{'long' * 14}: too long a name; 63 bytes are allowed, .in_sum2 included",
        "wide: (4,) sums of torch.float64, expected float32 (columns,)",
        "matrix: (1, 4) sums of torch.float32, expected float32 (columns,)",
        "empty: (0,) sums of torch.float32, expected float32 (columns,)",
        "negative: sums that are negative or not finite, where squares are expected",
        "nan: sums that are negative or not finite, where squares are expected",
        "unused: measured on 0 tokens",
    ]
    assert not list(tmp_path.iterdir())


def test_no_entries(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError) as caught:
        write_imatrix(tmp_path / "a.gguf", {}, "", 128, 3)
    assert list(caught.value.reasons) == ["there are no entries"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.gguf: cannot be written"):
        write_imatrix(tmp_path / "absent" / "a.gguf", ENTRIES, "", 128, 3)
