"""What runs on a GPU, on one that is pretended: no tensor meets one elsewhere, and results are the CPU's."""

from typing import get_args

import pytest
import torch

from quantize.calibrate import Calibration, Settings
from quantize.first_tokens import first_tokens
from quantize.layouts import Layout, layout
from quantize.llama import LlamaConfig
from quantize.reference import ReferenceModel
from quantize.sensitivity import mean_gradients
from quantize.solver.exl2 import quantize_exl2
from quantize.solver.linears import Effort, quantize_linears
from quantize.solver.linears import Settings as SolverSettings
from quantize.states import MemoryStates
from quantize.statistics import PackedStatistics, SecondMoment, pack, unpack
from quantize.weights import TensorWeights
from tests.pretend_gpu import DEVICE, DIFFERENT, pretended_gpu

GENERATOR = torch.Generator().manual_seed(12)
W = torch.randn(40, 192, generator=GENERATOR) * 0.02
X = torch.randn(500, 192, generator=GENERATOR) @ (torch.eye(192) + torch.randn(192, 192) / 192**0.5)
H = X.T @ X / len(X)
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    context_length=256,
    rms_norm_eps=1e-6,
    rope_theta=100000.0,
    rope_factor=4.0,
)
WEIGHTS = TensorWeights(
    {name: torch.randn(shape).mul_(0.1).bfloat16() for name, shape in CONFIG.tensor_shapes().items()}
)
ROWS = [torch.arange(3, 50), torch.arange(9), torch.arange(70, 20, -1)]


def test_the_pretended_gpu_complains_as_a_real_one() -> None:
    with pretended_gpu():
        there, here = W.to(DEVICE), torch.arange(3)
        assert (there + 1).device == DEVICE and there.cpu().device.type == "cpu"
        assert torch.zeros(2, device=DEVICE).is_cuda and there[here].is_cuda
        with pytest.raises(RuntimeError, match=DIFFERENT):
            there + W
        with pytest.raises(RuntimeError, match="indices should be"):
            W[here.to(DEVICE)]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("effort", get_args(Effort))
@pytest.mark.parametrize(("bits", "desc_act"), [(4, False), (3, False), (4, True)])
def test_gptq_is_solved_there(bits: int, desc_act: bool, effort: Effort) -> None:
    settings = SolverSettings(bits, 64, desc_act=desc_act, effort=effort)
    here = quantize_linears({"w": W}, H, settings)["w"]
    with pretended_gpu():
        there = quantize_linears({"w": W.to(DEVICE)}, H.to(DEVICE), settings)["w"]
        assert there.codes.device == there.scales.device == there.g_idx.device == DEVICE
        codes, g_idx = there.codes.cpu(), there.g_idx.cpu()
    assert float((here.codes == codes).float().mean()) > 0.99
    assert torch.equal(here.g_idx, g_idx)
    assert there.error == pytest.approx(here.error, rel=0.01)


@pytest.mark.parametrize("groups", [layout((4, 32, 1.0)), layout((6, 32, 0.2), (3, 64, 0.8))])
def test_exl2_is_solved_there(groups: Layout) -> None:
    here = quantize_exl2({"w": W}, H, {"w": groups})["w"]
    with pretended_gpu():
        there = quantize_exl2({"w": W.to(DEVICE)}, H.to(DEVICE), {"w": groups})["w"]
        codes = there.linear.codes.cpu()
    assert float((here.linear.codes == codes).float().mean()) > 0.99
    assert there.error == pytest.approx(here.error, rel=0.01)


def test_statistics_are_gathered_packed_and_unpacked_there() -> None:
    here = pack(_statistics_of(X, torch.device("cpu")).statistics())
    with pretended_gpu():
        packed = _statistics_of(X.to(DEVICE), DEVICE).packed()
        back = unpack(PackedStatistics(here.n_tokens, here.diagonal, here.correlations), DEVICE)
        assert back.hessian is not None and back.hessian.device == DEVICE
        hessian = back.hessian.cpu()
    expected = unpack(here).hessian
    assert packed.correlations is not None and here.correlations is not None
    # Another matrix product sums in another order: a step of 2^-15 at the most.
    assert int((packed.correlations.int() - here.correlations.int()).abs().max()) <= 1
    assert expected is not None and torch.equal(hessian, expected)


def _statistics_of(inputs: torch.Tensor, device: torch.device) -> SecondMoment:
    moment = SecondMoment(inputs.shape[1], device)
    moment.add(inputs)
    return moment


def test_a_calibration_runs_there() -> None:
    here = _calibrated(torch.device("cpu"))
    with pretended_gpu():
        there = _calibrated(DEVICE)
    for mine, its in zip(here, there, strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-4, atol=1e-6)


def _calibrated(device: torch.device) -> list[torch.Tensor]:
    calibration = Calibration(ReferenceModel(CONFIG, WEIGHTS, device), [len(row) for row in ROWS], Settings())
    states = MemoryStates(sum(map(len, ROWS)), CONFIG.hidden_size)
    calibration.embed(ROWS, states)
    found = []
    for _, moments in calibration.blocks(states):
        found += [moment.statistics().hessian for moment in moments.values()]
    return [hessian for hessian in found if hessian is not None]


def test_first_tokens_are_pushed_through_there() -> None:
    here = first_tokens(CONFIG, WEIGHTS, [3, 0, 3])
    strengthened, _ = here.strengthen(torch.eye(64), 1, "attention_input", 200)
    with pretended_gpu():
        there = first_tokens(CONFIG, WEIGHTS, [3, 0, 3], device="cuda:0")
        found, _ = there.strengthen(torch.eye(64, device=DEVICE), 1, "attention_input", 200)
        assert found.device == DEVICE
        found = found.cpu()
    torch.testing.assert_close(found, strengthened)


def test_the_size_of_chunks_does_not_change_gradients() -> None:
    model = ReferenceModel(CONFIG, WEIGHTS)
    one, other = (mean_gradients(model, ROWS, chunk_tokens=n) for n in (50, 1000))
    assert one.means == pytest.approx(other.means, rel=1e-5)
    assert one.embedding.hessian is not None and other.embedding.hessian is not None
    torch.testing.assert_close(one.embedding.hessian, other.embedding.hessian, rtol=1e-4, atol=1e-9)
