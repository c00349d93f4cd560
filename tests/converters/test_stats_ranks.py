"""Two processes, started as torchrun starts them, against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from converters.stats.archive import Archive, open_archive
from tests.conftest import ROOT, MakeCheckpoint
from tests.converters.test_stats_resume import calibrate, rows_of

CHILD = """
import sys
from pathlib import Path
import torch
from quantize.errors import DscqError
from tests.converters.test_stats_resume import calibrate
torch.set_num_threads(1)
try:
    calibrate(Path(sys.argv[1]), Path(sys.argv[2]))
except DscqError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def two_ranks(source: Path, folder: Path) -> list[str]:
    """Calibrate in two processes; return what each has to say on standard error."""
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in ("0", "1"):
        own = os.environ | environment | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, str(source), str(folder)]
        children.append(subprocess.Popen(command, env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    return [child.communicate(timeout=120)[1] for child in children]


def hessian(archive: Archive, name: str) -> torch.Tensor:
    found = archive.statistics(name).hessian
    assert found is not None
    return found


def test_two_ranks_write_what_one_writes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    two_ranks(source, tmp_path / "two")
    together, alone = open_archive(tmp_path / "two"), calibrate(source, tmp_path / "one")
    assert together.manifest.request.options["ranks"] == 2
    assert {path.name for path in together.folder.iterdir()} == {path.name for path in alone.folder.iterdir()}
    assert together.linears() == alone.linears()
    for name in alone.linears():
        one, two = hessian(alone, name), hessian(together, name)
        # 1e-5, and one step of the packing where a rounding fell on the other side.
        scales = one.diagonal().sqrt()
        assert ((one - two).abs() / (scales * scales[:, None])).max() < 1e-5 + 1 / 32767
        assert torch.allclose(one.diagonal(), two.diagonal(), rtol=1e-5)
    # A finished archive serves whoever asks for its rows, on however many ranks it was made.
    assert calibrate(source, tmp_path / "two").manifest == together.manifest


def test_what_one_rank_finds_ends_all_ranks(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    # The longest row, the last, is all of rank 0's; the bad token is in one of the others.
    rows = rows_of()
    bad = next(int(token) for token in rows[0].ids if token not in rows[3].ids)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][bad, 7] = torch.nan

    said = two_ranks(make_checkpoint(edit=spoil), tmp_path / "stats")
    assert all("CalibrationError" in text and "layer 0, attention_input: row 0" in text for text in said)


def test_an_error_of_rank_0_ends_all_ranks(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "thesis.tex").write_text("x")
    said = two_ranks(make_checkpoint(), tmp_path / "stats")
    assert all("OutputError" in text and "thesis.tex" in text for text in said)
