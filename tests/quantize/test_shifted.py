"""The second pass against a statement of itself: two whole models, and the inputs of their linears."""

from collections.abc import Mapping

import torch

from converters.checkpoint import open_checkpoint
from quantize.first_tokens import first_share, first_tokens
from quantize.llama import block_tensor
from quantize.reference import HEAD_INPUT, INPUTS, ReferenceModel
from quantize.sensitivity import TokenWeights
from quantize.shifted import ShiftedStatistics, stream_shifted
from quantize.statistics import Statistics
from quantize.weights import TensorWeights, Weights
from tests.conftest import MakeCheckpoint

Seen = dict[tuple[int, str], torch.Tensor]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A coarse quantization: multiples of a sixteenth."""
    return (weight.float() * 16).round() / 16


def inputs_of(model: ReferenceModel, rows: list[torch.Tensor], last: ReferenceModel) -> Seen:
    """Every input of `last`'s linears, where each block's input comes from `model`'s blocks before it."""
    seen: Seen = {}
    for state in model.embed(rows):
        for layer in range(model.config.n_layers):

            def note(name: str, x: torch.Tensor, start: int, layer: int = layer) -> None:
                before = seen.get((layer, name), torch.zeros(0, x.shape[1]))
                seen[layer, name] = torch.cat([before, x])

            last.forward_block(last.widen(last.read_block(layer)), state, [len(state)], note)
            state = model.forward_block(model.widen(model.read_block(layer)), state, [len(state)])
        key = model.config.n_layers, HEAD_INPUT
        head = model.final_norm(state)
        seen[key] = torch.cat([seen.get(key, head[:0]), head])
    return seen


def quantized(weights: Weights, n_layers: int) -> TensorWeights:
    linears = {block_tensor(layer, name) for layer in range(n_layers) for name in INPUTS}
    names = weights.specs()
    return TensorWeights(
        {n: rounded(weights.load(n)) if n in linears else weights.load(n).float() for n in names}
    )


def test_statistics_of_both_streams(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint(num_hidden_layers=3))
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    other = ReferenceModel(checkpoint.config, quantized(checkpoint.weights, 3))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 900, (n,), generator=generator) for n in (30, 5, 12)]
    found: dict[tuple[int, str], ShiftedStatistics] = {}

    def quantize_block(layer: int, statistics: Mapping[str, ShiftedStatistics]) -> Mapping[str, torch.Tensor]:
        found.update({(layer, name): of_input for name, of_input in statistics.items()})
        block = model.read_block(layer)
        return {name: rounded(block[name]) for name in INPUTS}

    found[3, HEAD_INPUT] = stream_shifted(model, rows, quantize_block, micro_batch=20)
    original, shifted = inputs_of(model, rows, model), inputs_of(other, rows, model)
    assert found.keys() == original.keys()
    for key, statistics in found.items():
        x, x_hat = original[key].double(), shifted[key].double()
        assert statistics.n_tokens == len(x) == 47
        for mean, wanted in ((statistics.hessian, x_hat.T @ x_hat), (statistics.cross, x_hat.T @ x)):
            assert (mean.double() - wanted / 47).norm() < 1e-4 * (wanted / 47).norm()
    # The streams are the same in block 0 and differ behind it, or the test would compare nothing.
    assert torch.allclose(found[0, "mlp_inner"].hessian, found[0, "mlp_inner"].cross, atol=1e-6)
    last = found[2, "mlp_inner"]
    assert (last.hessian - last.cross).norm() > 0.01 * last.hessian.norm()


def test_tokens_count_by_their_weights(make_checkpoint: MakeCheckpoint) -> None:
    """Of both streams' tokens, in packs of several rows; the output matrix's input is not weighed."""
    checkpoint = open_checkpoint(make_checkpoint())
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    other = ReferenceModel(checkpoint.config, quantized(checkpoint.weights, checkpoint.config.n_layers))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 900, (n,), generator=generator) for n in (30, 5, 12)]
    places = [(layer, name) for layer in range(checkpoint.config.n_layers) for name in set(INPUTS.values())]
    weights = {place: torch.rand(47, generator=generator) for place in places}
    found: dict[tuple[int, str], ShiftedStatistics] = {}

    def quantize_block(layer: int, statistics: Mapping[str, ShiftedStatistics]) -> Mapping[str, torch.Tensor]:
        found.update({(layer, name): of_input for name, of_input in statistics.items()})
        block = model.read_block(layer)
        return {name: rounded(block[name]) for name in INPUTS}

    stream_shifted(
        model,
        rows,
        quantize_block,
        micro_batch=20,
        weights=TokenWeights(weights, {}, Statistics(0, torch.empty(0), None)),
    )
    original, shifted = inputs_of(model, rows, model), inputs_of(other, rows, model)
    for place in places:
        x, x_hat = original[place].double(), shifted[place].double()
        weighted = x_hat * weights[place].double()[:, None]
        for mean, wanted in (
            (found[place].hessian, weighted.T @ x_hat),
            (found[place].cross, weighted.T @ x),
        ):
            assert (mean.double() - wanted / 47).norm() < 1e-4 * (wanted / 47).norm()
        assert abs(found[place].plain / float(x_hat.square().sum() / 47) - 1) < 1e-5


def test_the_share_of_first_tokens_is_that_of_a_calibration(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    rows = [torch.tensor([5, 1, 2, 3, 9, 8, 7, 11, 30]), torch.arange(20), torch.tensor([5] * 9)]
    alike: dict[tuple[int, str], ShiftedStatistics] = {}
    shared: dict[tuple[int, str], ShiftedStatistics] = {}
    for found, weights in ((alike, None), (shared, first_share([9, 20, 9]))):

        def note(
            layer: int, statistics: Mapping[str, ShiftedStatistics], found: object = found
        ) -> dict[str, torch.Tensor]:
            assert isinstance(found, dict)
            found.update({(layer, name): of_input for name, of_input in statistics.items()})
            return {}

        stream_shifted(model, rows, note, weights=weights)
    first = first_tokens(checkpoint.config, checkpoint.weights, [5, 0, 5])
    for place, statistics in alike.items():
        H, scale = first.strengthen(statistics.hessian, *place, 38)
        assert torch.allclose(shared[place].hessian, H, rtol=1e-3, atol=1e-4 * float(H.max()))
        own = shared[place].plain / float(shared[place].hessian.diagonal().sum())
        assert abs(own / scale - 1) < 1e-3
    assert bool((first_share([3, 2]).weights == 1).all())  # they have more than their share already


def test_weights_that_stay_shift_nothing(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    head = stream_shifted(model, [torch.arange(9)], lambda layer, statistics: {})
    assert torch.allclose(head.hessian, head.cross, atol=1e-6)
