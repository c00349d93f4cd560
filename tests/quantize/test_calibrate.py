"""The engine against XᵀX of hooks on transformers' model; splits, rows that are not finite."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from converters.checkpoint import open_checkpoint
from quantize.calibrate import MICRO_BATCH, Calibration, Settings, micro_batch_for
from quantize.errors import CalibrationError
from quantize.reference import HEAD_INPUT, INPUTS, MLP_TOKENS, ReferenceModel
from quantize.states import MemoryStates, packs
from quantize.weights import TensorWeights
from tests.conftest import MakeCheckpoint
from tests.quantize.test_ranks import calibrated, distance, model_of, random_rows


def by_hooks(folder: Path, rows: Sequence[torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """The mean of x xᵀ in f64 of every linear's input, as another implementation's forward has it."""
    judge = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[tuple[int, str], torch.Tensor] = {}

    def hook(key: tuple[int, str]) -> object:
        def see(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[key] = sums.get(key, torch.zeros(1, dtype=torch.double)) + x.T @ x

        return see

    for layer, block in enumerate(judge.model.layers):
        for linear, name in {name: linear for linear, name in INPUTS.items()}.items():
            block.get_submodule(name).register_forward_pre_hook(hook((layer, linear)))
    judge.lm_head.register_forward_pre_hook(hook((len(judge.model.layers), HEAD_INPUT)))
    with torch.inference_mode():
        for row in rows:
            judge(row[None])
    n_tokens = sum(map(len, rows))
    return {key: total / n_tokens for key, total in sums.items()}


def test_hessians_are_those_of_hooks_on_transformers(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(num_key_value_heads=1)
    rows = random_rows(40, 3, 1, MLP_TOKENS + 200, 17)
    found = calibrated(model_of(folder), rows, Settings(micro_batch=50))
    wanted = by_hooks(folder, rows)
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 4 + 1
    for key, hessian in wanted.items():
        assert distance(found[key], hessian) < 1e-4
        assert found[key].n_tokens == sum(map(len, rows))
    # The bar is one that a wrong input would not pass.
    assert distance(found[0, "attention_input"], wanted[0, "mlp_input"]) > 0.1


@pytest.mark.parametrize("micro_batch", [1, 13, 100_000])
def test_any_split_gives_the_same_statistics(make_checkpoint: MakeCheckpoint, micro_batch: int) -> None:
    model = model_of(make_checkpoint())
    rows = random_rows(40, 3, 1, 17, 30)
    found = calibrated(model, rows, Settings(micro_batch=micro_batch))
    for key, wanted in calibrated(model, rows, Settings(micro_batch=50)).items():
        assert wanted.hessian is not None
        assert distance(found[key], wanted.hessian) < 1e-5


def test_the_diagonal_alone(make_checkpoint: MakeCheckpoint) -> None:
    model = model_of(make_checkpoint())
    rows = random_rows(40, 3)
    found = calibrated(model, rows, Settings(diagonal_only=True))
    for key, wanted in calibrated(model, rows, Settings()).items():
        assert found[key].hessian is None
        assert torch.allclose(found[key].diagonal, wanted.diagonal, rtol=1e-5)


def test_one_block_is_read_ahead(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint(num_hidden_layers=4))
    loaded: list[str] = []

    class Recorded(TensorWeights):
        def load(self, name: str) -> torch.Tensor:
            loaded.append(name)
            return super().load(name)

    weights = Recorded({name: checkpoint.weights.load(name) for name in checkpoint.weights.specs()})
    model = ReferenceModel(checkpoint.config, weights)
    calibration = Calibration(model, [5], Settings())
    states = MemoryStates(5, model.config.hidden_size)
    calibration.embed(random_rows(5), states)
    for layer, _ in calibration.blocks(states):
        layers = {int(name.split(".")[2]) for name in loaded if ".layers." in name}
        assert max(layers) <= layer + 1
    assert len(loaded) == len(set(loaded)) == 1 + 4 * 9


def broken_model(make_checkpoint: MakeCheckpoint, token: int) -> ReferenceModel:
    """A model whose embedding of one token holds a NaN."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][token, 7] = torch.nan

    return model_of(make_checkpoint(edit=spoil))


def test_activations_that_are_not_finite_are_named(make_checkpoint: MakeCheckpoint) -> None:
    rows = random_rows(6, 4, 9)
    rows[1][2] = 950
    with pytest.raises(CalibrationError) as caught:
        calibrated(broken_model(make_checkpoint, 950), rows, Settings())
    assert str(caught.value) == (
        "activations that are not finite numbers\n"
        "  - layer 0, attention_input: row 1\n"
        "look at the weights of that layer and at those rows, or leave such rows out"
    )


def test_rows_that_are_not_finite_can_be_left_out(make_checkpoint: MakeCheckpoint) -> None:
    model = broken_model(make_checkpoint, 950)
    rows = random_rows(6, 4, 9)
    rows[1][2] = 950
    calibration = Calibration(model, [6, 4, 9], Settings(drop_nonfinite=True))
    states = MemoryStates(19, model.config.hidden_size)
    calibration.embed(rows, states)
    found = {
        (layer, name): moment.statistics()
        for layer, moments in calibration.blocks(states)
        for name, moment in moments.items()
    }
    assert [(row.row, row.layer, row.input) for row in calibration.dropped] == [(1, 0, "attention_input")]
    assert calibration.head(states).n_tokens == 15
    # One token is bad from the start; in attention even a weight of zero makes NaN of NaN for its whole row.
    assert [found[0, name].n_tokens for name in dict.fromkeys(INPUTS.values())] == [18, 15, 15, 15]
    without = calibrated(model, [rows[0], rows[2]], Settings())
    for name in dict.fromkeys(INPUTS.values()):
        wanted = without[1, name]
        assert wanted.hessian is not None
        assert found[1, name].n_tokens == 15
        assert distance(found[1, name], wanted.hessian) < 1e-5


def test_squares_beyond_f32_are_an_error(make_checkpoint: MakeCheckpoint) -> None:
    def stretch(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"] *= 1e30

    with pytest.raises(CalibrationError, match="layer 1"):
        calibrated(model_of(make_checkpoint(edit=stretch)), random_rows(6), Settings())


def test_packs_are_rows_in_order_and_end_where_one_is_left_out() -> None:
    found = list(packs([4, 5, 7, 8, 9], [3, 3, 20, 2, 2], 8, without={8}))
    assert [(pack.rows, pack.start, pack.end) for pack in found] == [
        ((4, 5), 0, 6),
        ((7,), 6, 26),
        ((9,), 28, 30),
    ]
    assert [found[0].row_of(token) for token in range(6)] == [4, 4, 4, 5, 5, 5]


def test_the_micro_batch_fits_free_memory() -> None:
    assert micro_batch_for(1536, 1 << 40) == MICRO_BATCH
    assert micro_batch_for(19200, 1 << 20) == 256
    assert 256 < micro_batch_for(19200, 8 * 19200 * 32 * 1000) == 1000
