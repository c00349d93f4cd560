"""Two ranks of the engine against one; how rows are shared out."""

import datetime
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import distributed

from converters.checkpoint import open_checkpoint
from quantize.calibrate import Calibration, Settings
from quantize.ranks import share_out
from quantize.reference import HEAD_INPUT, ReferenceModel
from quantize.states import MemoryStates
from quantize.statistics import Statistics
from tests.conftest import MakeCheckpoint

Found = dict[tuple[int, str], Statistics]
SPAWN = multiprocessing.get_context("spawn")


def model_of(folder: Path) -> ReferenceModel:
    checkpoint = open_checkpoint(folder)
    return ReferenceModel(checkpoint.config, checkpoint.weights)


def random_rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 900, (n,), generator=generator) for n in lengths]


def calibrated(model: ReferenceModel, rows: Sequence[torch.Tensor], settings: Settings) -> Found:
    """Every input's statistics by (layer, input); the head's layer is the number of layers."""
    calibration = Calibration(model, [len(row) for row in rows], settings)
    states = MemoryStates(calibration.n_tokens, model.config.hidden_size)
    calibration.embed(rows, states)
    found = {
        (layer, name): moment.statistics()
        for layer, moments in calibration.blocks(states)
        for name, moment in moments.items()
    }
    found[model.config.n_layers, HEAD_INPUT] = calibration.head(states).statistics()
    return found


def distance(found: Statistics, wanted: torch.Tensor) -> float:
    assert found.hessian is not None
    return float((found.hessian.double() - wanted).norm() / wanted.norm())


def test_rows_are_shared_out_by_length() -> None:
    lengths = [5, 100, 7, 60, 50, 1]
    shares = share_out(lengths, 2)
    assert sorted(row for share in shares for row in share) == list(range(6))
    assert [sum(lengths[row] for row in share) for share in shares] == [112, 111]
    assert share_out([9], 2) == [[0], []]


def one_rank(number: int, folder: str, store: str, rows: list[torch.Tensor], out: Path) -> None:
    """Calibrate as one of two ranks; rank 0 saves what it found."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=number,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found = calibrated(model_of(Path(folder)), rows, Settings(micro_batch=20))
    if number == 0:
        torch.save({key: (s.n_tokens, s.hessian) for key, s in found.items()}, out)
    distributed.destroy_process_group()


def test_two_ranks_find_what_one_finds(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    rows = random_rows(40, 3, 1, 17, 30)
    arguments = (str(folder), str(tmp_path / "store"), rows, tmp_path / "found.pt")
    ranks = [SPAWN.Process(target=one_rank, args=(number, *arguments)) for number in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    found: Mapping[tuple[int, str], tuple[int, torch.Tensor]] = torch.load(tmp_path / "found.pt")
    alone = calibrated(model_of(folder), rows, Settings(micro_batch=50))
    assert found.keys() == alone.keys()
    for key, (n_tokens, hessian) in found.items():
        assert n_tokens == alone[key].n_tokens
        assert distance(alone[key], hessian.double()) < 1e-5
