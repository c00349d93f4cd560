"""`--device cuda`, played by a CPU: the other searches, larger slices, the same bytes."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters import hessians, stream
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.imatrix import Importances
from converters.memory import memory_needs
from converters.pipeline import convert, plan_exports
from converters.plan import ConvertOptions, Request
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from converters.targets import gguf as target
from converters.targets import gguf_types
from quantize.codecs import CODECS, fields
from quantize.codecs.encoder import Encoder
from quantize.codecs.fields import FieldCodec
from quantize.solver import blocks
from tests.conftest import MakeCheckpoint
from tests.converters.test_gptq_target import Row

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))
QUANTS = ["F16", "Q8_0", "Q4_K_M", "Q3_K_M", "Q5_1"]


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """A model wide enough for super-blocks."""
    return open_checkpoint(make_checkpoint(**SHAPE))


def _play_two_gpus(monkeypatch: pytest.MonkeyPatch) -> Counter[torch.device]:
    """Let the CPU pass for two GPUs: what moves there is counted, and no compiled search reaches it."""
    moves = _count_moves(monkeypatch)
    monkeypatch.setattr(fields, "on_cpu", lambda _: False)
    for kind in CODECS.values():
        if isinstance(kind, FieldCodec) and kind.gains_from_gpu:
            monkeypatch.setattr(type(kind), "search", _never)
    return moves


def _count_moves(monkeypatch: pytest.MonkeyPatch) -> Counter[torch.device]:
    """Count what would move to a GPU, and leave it where it is."""
    moves: Counter[torch.device] = Counter()
    real_to = torch.Tensor.to

    def to(rows: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
            moves[args[0]] += 1
            return rows
        if args and args[0] == "cuda":  # the weights that rows' first tokens are pushed through
            return rows
        return real_to(rows, *args, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(target, "encoding_gpus", lambda name: GPUS if name == "cuda" else ())
    return moves


def _never(*_: object) -> None:
    raise AssertionError("the compiled search was called for rows on a GPU")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.gguf")}


def _importances(checkpoint: Checkpoint) -> Importances:
    generator = torch.Generator().manual_seed(5)
    shapes = {name: shape for name, shape in checkpoint.config.tensor_shapes().items() if len(shape) > 1}
    rows = {name: torch.rand(shape[1], generator=generator) + 0.01 for name, shape in shapes.items()}
    return Importances(rows, "made", "", 0)


@pytest.mark.parametrize("measured", [False, True])
def test_the_bytes_are_those_of_the_cpu(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    requests = [Request("gguf", quant) for quant in QUANTS]
    importances = _importances(checkpoint) if measured else None
    for device in ("cpu", "cuda"):
        options = ConvertOptions(tmp_path / device, importances=importances, device=device)
        moves = _play_two_gpus(monkeypatch) if device == "cuda" else Counter()
        convert(checkpoint, requests, options)
    assert len(_hashes(tmp_path / "cpu")) == len(QUANTS)
    assert _hashes(tmp_path / "cpu") == _hashes(tmp_path / "cuda")
    # Every matrix of every export but F16's, shared evenly between the two; each export starts anew.
    n_matrices = sum(len(shape) > 1 for shape in checkpoint.config.tensor_shapes().values())
    assert moves.total() == n_matrices * (len(QUANTS) - 1)
    assert max(moves.values()) - min(moves.values()) <= len(QUANTS)


@pytest.mark.parametrize(
    ("quants", "device", "is_large"),
    [
        (["Q4_K_M", "F16"], "cuda", True),
        (["Q4_K_M", "F16"], "cpu", False),
        (["F16"], "cuda", True),
        (["Q4_K_M", "IQ3_S"], "cuda", False),
    ],
)
def test_slices_are_large_where_a_gpu_takes_them(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quants: list[str],
    device: str,
    is_large: bool,
) -> None:
    monkeypatch.setattr(stream, "SLICE_ELEMENTS", 64 * 256)
    monkeypatch.setattr(stream, "GPU_SLICE_ELEMENTS", 1024 * 256)
    sizes: list[int] = []
    monkeypatch.setattr(Encoder, "encode", _measuring(sizes))
    monkeypatch.setattr(target, "encoding_gpus", lambda _: ())
    # Pure, so that no tensor has types of the one kind only.
    pure = "IQ3_S" in quants
    options = ConvertOptions(tmp_path, device=device, importances=_importances(checkpoint), pure=pure)
    convert(checkpoint, [Request("gguf", quant) for quant in quants], options)
    assert max(sizes) == (1024 if is_large else 64) * 256
    assert sum(sizes) == len(quants) * checkpoint.config.n_parameters


def _measuring(sizes: list[int]) -> Callable[..., torch.Tensor]:
    def encode(_: Encoder, kind: object, rows: torch.Tensor, importance: object = None) -> torch.Tensor:
        sizes.append(rows.numel())
        assert hasattr(kind, "row_bytes")
        return torch.zeros(len(rows), kind.row_bytes(rows.shape[1]), dtype=torch.uint8)

    return encode


def test_errors_are_compensated_on_the_gpus(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs, played by a CPU, take slices in turn, each with factors of its own; IQ2 stays where it is."""
    rows = [Row(torch.arange(n) % checkpoint.config.vocab_size) for n in (90, 150)]
    archive = calibrate_checkpoint(checkpoint, rows, {"name": "made"}, CalibrateOptions(tmp_path / "stats"))
    options = ConvertOptions(
        tmp_path / "cpu",
        archive=archive,
        compensate=True,
        importances=archive.importances(),
        tensor_types=(("ffn_down", "IQ2_XS"),),
        force=True,
    )
    requests = [Request("gguf", "Q4_K_M")]
    (here,) = convert(checkpoint, requests, options)
    moves = _count_moves(monkeypatch)
    for module in (target, gguf_types):
        monkeypatch.setattr(module, "compensates_on", lambda kind, _: not kind.name.startswith("IQ"))
    monkeypatch.setattr(blocks, "compensates_on", lambda *_: True)
    real = hessians.hessian
    monkeypatch.setattr(
        hessians, "hessian", lambda archive, name, _, first: real(archive, name, "cpu", first)
    )
    (there,) = convert(checkpoint, requests, replace(options, folder=tmp_path / "cuda", device="cuda"))
    assert _hashes(tmp_path / "cpu") == _hashes(tmp_path / "cuda")
    assert [note for note in there.plan.notes if "IQ2_XS (2 tensors)" in note]
    kinds = Counter(tensor.quant.startswith("IQ") for tensor in there.plan.tensors if tensor.compensated)
    # Each slice; what is not compensated moves too.
    assert set(moves) == set(GPUS)
    assert moves.total() >= kinds[False]
    # Another kind of device: near-ties may differ, so nothing but what stayed on the CPU is taken over.
    (again,) = convert(checkpoint, requests, options)
    (other,) = convert(checkpoint, requests, replace(options, device="cuda"))
    assert here.n_reused == 0
    assert again.n_tensors_reused == sum(kinds.values())
    assert other.n_tensors_reused == kinds[True]


def test_what_no_gpu_encodes_is_said(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = ConvertOptions(tmp_path, importances=_importances(checkpoint), device="cuda")
    requests = [Request("gguf", "IQ3_M"), Request("gguf", "Q4_K_M")]
    mixed, all_there = plan_exports(checkpoint, requests, options)
    kinds = Counter(t.quant for t in mixed.tensors if t.quant.startswith("IQ3"))
    said = ", ".join(f"{quant} ({n} tensors)" for quant, n in kinds.items())
    assert f"encoded on the CPU, for no search of a GPU is there: {said}" in mixed.notes
    assert not [note for note in all_there.notes if "GPU" in note]
    assert set(kinds) == {"IQ3_S"}


def test_larger_slices_need_more_memory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plans = plan_exports(checkpoint, [Request("gguf", "Q4_K_M")], ConvertOptions(tmp_path))
    needs = [
        memory_needs(checkpoint, plans, ConvertOptions(tmp_path, n_threads=3, device=device)).writing
        for device in ("cpu", "cuda:1")
    ]
    assert needs[1] - needs[0] == 3 * 6 * stream.GPU_SLICE_ELEMENTS
