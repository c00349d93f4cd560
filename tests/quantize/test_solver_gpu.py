"""The Triton kernels against the compiled loops of the CPU, and what comes of them from end to end.

On a machine with a CUDA GPU and Triton nothing is to be done. Without a GPU, kernels run in Triton's
interpreter, on tensors of the CPU, in about five minutes:

    pip install --no-deps --target /tmp/triton triton==3.6.0
    PYTHONPATH=/tmp/triton TRITON_INTERPRET=1 python -m pytest tests/quantize/test_solver_gpu.py
"""

import os
from dataclasses import replace

import pytest
import torch

from quantize.codecs import codec
from quantize.codecs.exl2 import Group
from quantize.solver import block_loops, blocks, compensate, descend, gpu
from quantize.solver.block_factor import BlockFactor, SubFactors, prepare_blocks
from quantize.solver.block_grids import SHAPES, BlockScales, searched_scales
from quantize.solver.blocks import encode_compensated
from quantize.solver.descend import loss
from quantize.solver.exl2 import quantize_matrix
from quantize.solver.factor import prepare
from quantize.solver.grid import Grid
from quantize.solver.linears import Effort, Settings, quantize_linears
from tests.quantize.test_solver_blocks import problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.skipif(not gpu.available(), reason="no Triton: see the head of this file"),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, no TRITON_INTERPRET=1"
    ),
    # The interpreter computes with NumPy, which warns of the zeros that are divided by and not used.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q4_0", "Q4_1", "Q8_0")
ROWS = 7
EQUAL = 0.99
Case = tuple[torch.Tensor, torch.Tensor, BlockFactor]


@pytest.fixture(scope="module")
def case() -> Case:
    """Seven rows, which fill no tile, of one block."""
    W, H = problem(ROWS, 256, seed=5)
    return W, H, prepare_blocks(H)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the kernels take what there is."""
    monkeypatch.setattr(gpu, "takes", lambda _: True)


def moved_to(device: torch.device, scales: BlockScales) -> BlockScales:
    parts = (scales.d, scales.dmin, scales.steps, scales.drops)
    return BlockScales(scales.shape, *(part.to(device) for part in parts))


def there(scales: BlockScales) -> BlockScales:
    return moved_to(DEVICE, scales)


def factors_there(factors: SubFactors) -> SubFactors:
    order, feedback, weights = (part.to(DEVICE) for part in factors)
    return order, feedback, weights


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu() == expected).float().mean())


def start(name: str, case: Case) -> BlockScales:
    W, _, factor = case
    return searched_scales(codec(name), W, factor.importance)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "Q8_0"])
def test_a_types_search_finds_the_same_scales(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    W, _ = problem(40, 256, seed=6)
    W[3], W[4, :64], W[5] = 0.0, 0.0, W[5].abs()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 2 + 0.01
    expected = searched_scales(codec(name), W, importance)
    on_gpu(monkeypatch)
    found = searched_scales(codec(name), W.to(DEVICE), importance.to(DEVICE))
    # A near-tie, and a scale is another; the weighted errors tell.
    for part in ("d", "dmin", "steps", "drops"):
        assert share(getattr(found, part), getattr(expected, part)) > 0.95, part
    mine, theirs = (
        float(((W - grid.values(grid.nearest(W))).square() * importance).sum())
        for grid in (moved_to(torch.device("cpu"), found).grid(), expected.grid())
    )
    assert abs(mine / theirs - 1) < 2e-3


@pytest.mark.parametrize("name", TYPES)
def test_rounding_a_block(monkeypatch: pytest.MonkeyPatch, name: str, case: Case) -> None:
    W, _, factor = case
    scales, local = start(name, case), factor.steps[0].local
    expected = block_loops.round_codes(W, local, scales)
    on_gpu(monkeypatch)
    found = block_loops.round_codes(W.to(DEVICE), factors_there(local), there(scales))
    assert share(found, expected) > EQUAL


@pytest.mark.parametrize("name", TYPES)
def test_moving_a_blocks_codes(monkeypatch: pytest.MonkeyPatch, name: str, case: Case) -> None:
    W, _, factor = case
    scales, H = start(name, case), factor.steps[0].hessian
    codes = scales.grid().nearest(W)
    gradient = (W - scales.grid().values(codes)) @ H
    expected, moves = block_loops.move_codes(gradient, H, scales, codes)
    on_gpu(monkeypatch)
    arguments = gradient.to(DEVICE), H.to(DEVICE), there(scales), codes.to(DEVICE)
    found, moved = block_loops.move_codes(*arguments)
    assert share(found, expected) > EQUAL
    same = found.cpu() == expected
    torch.testing.assert_close(moved.cpu()[same], moves[same], rtol=0, atol=1e-6)
    assert torch.equal(arguments[3].cpu(), codes)


@pytest.mark.parametrize("name", TYPES)
def test_refitting_scales(monkeypatch: pytest.MonkeyPatch, name: str, case: Case) -> None:
    W, _, factor = case
    scales, H = start(name, (W * 0.97, *case[1:])), factor.steps[0].hessian
    codes = scales.grid().nearest(W)
    gradient = (W - scales.grid().values(codes)) @ H
    fields = blocks._fields(scales)
    expected, moves = block_loops.refit(gradient, codes, H, scales.shape, fields.clone())
    assert not torch.equal(expected, fields[2:])
    on_gpu(monkeypatch)
    tensors = gradient.to(DEVICE), codes.to(DEVICE), H.to(DEVICE)
    found, moved = block_loops.refit(*tensors, scales.shape, fields.to(DEVICE))
    assert share(found, expected) > EQUAL
    torch.testing.assert_close(moved.cpu(), moves, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tries", [3, 7])
@pytest.mark.parametrize("name", TYPES)
def test_searching_beside(monkeypatch: pytest.MonkeyPatch, name: str, tries: int, case: Case) -> None:
    W, _, factor = case
    scales = start(name, case)
    beside, factors = blocks._beside(scales.shape, tries), factor.steps[0].subs[scales.shape.sub]
    fields = blocks._fields(scales)
    expected = block_loops.search(W, factors, scales.shape, beside, fields.clone())
    assert not torch.equal(expected, fields[2:])
    on_gpu(monkeypatch)
    there_too = W.to(DEVICE), factors_there(factors)
    found = block_loops.search(*there_too, scales.shape, beside, fields.to(DEVICE))
    assert share(found, expected) > EQUAL


def uneven_grid(n: int, k: int) -> Grid:
    generator = torch.Generator().manual_seed(7)
    scale = torch.rand(n, 3, generator=generator) * 0.01
    scale[0] = 0.0
    levels = SHAPES["IQ4_NL"].levels()
    return Grid(scale, torch.randn(n, 3, generator=generator) * 0.01, torch.arange(k) * 3 // k, levels)


def even_grid(n: int, k: int) -> Grid:
    return replace(uneven_grid(n, k), levels=torch.arange(16.0))


@pytest.mark.parametrize("grid_of", [even_grid, uneven_grid])
@pytest.mark.parametrize(("n", "k"), [(9, 64), (5, 40), (1, 1)])
def test_columns_of_any_grid(monkeypatch: pytest.MonkeyPatch, n: int, k: int, grid_of: type) -> None:
    """Against the loops in torch, on parts of larger matrices."""
    W, H = problem(n, k + 3, seed=8)
    factor, grid = prepare(H), grid_of(n, k)
    arguments = W[:, 1 : k + 1], W[:, 2 : k + 2], factor.feedback[:k, :k], grid
    codes, errors = compensate._round_block(*arguments)
    start = grid.nearest(W[:, :k])
    gradient = ((W[:, :k] - grid.values(start)) @ H[:k, :k])[:, :k]
    moved, moves = descend._move_columns(gradient, H[:k, :k], grid, start)
    on_gpu(monkeypatch)
    grid = Grid(*(part.to(DEVICE) for part in (grid.scale, grid.base, grid.group, grid.levels)))
    W, feedback, H = W.to(DEVICE), factor.feedback.to(DEVICE), H.to(DEVICE)
    found = compensate.round_block(W[:, 1 : k + 1], W[:, 2 : k + 2], feedback[:k, :k], grid)
    assert share(found[0], codes) > EQUAL
    torch.testing.assert_close(found[1].cpu(), errors, rtol=0, atol=1e-5)
    found = descend.move_block(gradient.to(DEVICE), H[:k, :k], grid, start.to(DEVICE))
    assert share(found[0], moved) > EQUAL
    torch.testing.assert_close(found[1].cpu(), moves, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "n_columns", "effort"),
    [
        *((name, 256, "default") for name in SHAPES),
        ("Q2_K", 512, "fast"),
        ("Q4_K", 256, "high"),
        ("Q4_0", 32, "high"),
        ("Q4_1", 96, "high"),
        ("IQ4_NL", 96, "default"),
        ("Q8_0", 352, "default"),
    ],
)
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, name: str, n_columns: int, effort: Effort) -> None:
    W, H = problem(ROWS, n_columns, seed=9)
    kind = codec(name)
    expected = encode_compensated(kind, W, prepare_blocks(H), effort)
    on_gpu(monkeypatch)
    found = encode_compensated(kind, W.to(DEVICE), prepare_blocks(H.to(DEVICE)), effort)
    assert found.device.type == DEVICE.type
    assert share(found, expected) > EQUAL
    mine, theirs = (float(loss(W, kind.decode(d.cpu(), n_columns), H).sum()) for d in (found, expected))
    assert abs(mine / theirs - 1) < 0.01


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q5_1"])
def test_dead_columns_and_zero_rows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    W, H = problem(4, 256, seed=3)
    dead = torch.tensor([*range(32), 77])
    H[dead] = 0.0
    H[:, dead] = 0.0
    W[2], W[3, :64] = 0.0, 0.0
    kind = codec(name)
    on_gpu(monkeypatch)
    for hessian in (H, torch.zeros_like(H)):
        found = encode_compensated(kind, W.to(DEVICE), prepare_blocks(hessian.to(DEVICE))).cpu()
        decoded = kind.decode(found, 256)
        assert bool(torch.isfinite(decoded).all())
        assert torch.equal(decoded[2], torch.zeros(256))
        assert float((decoded - W)[:, dead].abs().max()) < 0.08


def test_gptq_and_exl2(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(32, 128, seed=4)
    settings = [Settings(4, 64), Settings(3, 32, desc_act=True)]
    groups = (Group(4, 64), Group(3, 64))
    factor = prepare(H, order="activation")
    gptq = [quantize_linears({"w": W}, H, each)["w"].error for each in settings]
    exl2 = quantize_matrix(W, H, factor, groups).error
    on_gpu(monkeypatch)
    W, H = W.to(DEVICE), H.to(DEVICE)
    found = [quantize_linears({"w": W}, H, each)["w"].error for each in settings]
    assert found == pytest.approx(gptq, rel=0.02)
    assert quantize_matrix(W, H, prepare(H, order="activation"), groups).error == pytest.approx(
        exl2, rel=0.02
    )
