"""measurement.json: what is in it, what it is good for, whose it may be, and how it is made."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.exl2_measure import measure
from converters.exl2_measurement import (
    DAMP,
    Measurement,
    decoder_linears,
    from_document,
    layouts_of,
    linear_kind,
    measurement_key,
    read_measurement,
)
from converters.hessians import first_tokens_of, hessian
from converters.stats.archive import Archive
from converters.targets.exl2_types import choose
from quantize.errors import UsageError
from quantize.layout_errors import LayoutError, Prediction, predict
from quantize.layouts import Layout
from quantize.type_errors import SENSITIVITY
from tests.converters.exl2_model import Model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Edit = Callable[[dict[str, Any]], object]


def test_the_numbers_are_the_predictions(model: Model) -> None:
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    H = model.archive.statistics(names[0]).hessian
    assert H is not None
    weights = {name: model.checkpoint.weights.load(name) for name in names}
    expected = predict(weights, H, {name: layouts_of(name) for name in names}, damp=DAMP)
    slots = {next(iter(slot[0].layouts)): slot for slot in model.measurement.slots}
    assert list(slots) == list(decoder_linears(model.checkpoint.config))
    for name in names:
        found = [(choice.layouts[name], choice.bits, choice.error) for choice in slots[name]]
        assert found == [(each.layout, each.bits, each.error) for each in expected[name].errors]


def test_first_tokens_count_as_they_will_in_the_rounding(model: Model, tmp_path: Path) -> None:
    first = first_tokens_of(model.checkpoint, model.archive)
    file, weights = tmp_path / "measurement.json", model.checkpoint.weights
    found = measure(model.archive, weights, file, n_threads=1, first=first).document["linears"]
    plain, name = model.measurement.document["linears"], "model.layers.0.mlp.down_proj.weight"
    H, damp_scale = hessian(model.archive, name, first=first)
    W = weights.load(name).float()
    assert damp_scale < 1
    assert found[name]["energy"] == pytest.approx(float(((W @ H) * W).sum()), rel=1e-3)
    assert found[name]["energy"] > 1.01 * plain[name]["energy"]
    expected = predict({name: W}, H, {name: layouts_of(name)}, damp=DAMP * damp_scale)[name]
    assert [each["error"] for each in found[name]["layouts"]] == [each.error for each in expected.errors]


def test_the_file_holds_the_whole_measurement(model: Model) -> None:
    key = measurement_key(model.archive)
    again = read_measurement(model.file, model.checkpoint.config, key)
    assert again.slots == model.measurement.slots == from_document(again.document).slots
    assert [path.name for path in model.file.parent.glob("measurement*")] == ["measurement.json"]


def test_an_archive_that_knows_gradients_puts_a_price_on_errors(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = {name: 0.5 + i for i, name in enumerate(decoder_linears(model.checkpoint.config))}
    monkeypatch.setattr("converters.exl2_measure.predict", made_up)
    monkeypatch.setattr(Archive, "gradients", lambda _: gradients)
    found = measure(model.archive, model.checkpoint.weights, tmp_path / "measurement.json", n_threads=1)
    for slot in found.slots:
        for choice in slot:
            (name,) = choice.layouts
            energy = found.document["linears"][name]["energy"]
            n_outputs = model.checkpoint.config.tensor_shapes()[name][0]
            assert choice.nats == pytest.approx(choice.error * gradients[name] * energy / (2 * n_outputs))
    chosen = choose(model.checkpoint.config, found, Fraction(4), 6)
    picked = {
        next(iter(slot[0].layouts)): {
            choice.layouts[name]: choice.nats for choice in slot for name in choice.layouts
        }
        for slot in found.slots
    }
    assert chosen.loss == pytest.approx(sum(picked[name][chosen.layouts[name]] or 0 for name in picked))


def made_up(
    weights: dict[str, torch.Tensor], H: torch.Tensor, layouts: dict[str, Sequence[Layout]], **_: float
) -> dict[str, Prediction]:
    """Predictions that cost nothing."""
    found = {}
    for name, W in weights.items():
        bits = [each.total_bits(*W.shape) for each in layouts[name]]
        errors = [LayoutError(each, n, 1 / n) for each, n in zip(layouts[name], bits, strict=True)]
        found[name] = Prediction(float(H[0, 0]), tuple(errors))
    return found


def test_an_interrupted_measuring_goes_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[list[str]] = []
    whole = tmp_path / "whole.json"
    monkeypatch.setattr("converters.exl2_measure.predict", made_up)
    measure(model.archive, model.checkpoint.weights, whole, n_threads=1)

    def cut_off(weights: dict[str, torch.Tensor], *others: Any, **options: Any) -> dict[str, Prediction]:
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(list(weights))
        return made_up(weights, *others, **options)

    monkeypatch.setattr("converters.exl2_measure.predict", cut_off)
    file = tmp_path / "measurement.json"
    with pytest.raises(KeyboardInterrupt):
        measure(model.archive, model.checkpoint.weights, file, n_threads=1)
    assert not file.exists()
    notes = tmp_path / "measurement.json.notes"
    notes.write_text(notes.read_text("ascii") + '{"key": "cut o', "ascii")
    predicted.clear()
    measure(model.archive, model.checkpoint.weights, file, n_threads=1)
    assert [len(names) for names in predicted] == [2, 1]  # gate and up, down: q, k, v and o were there
    assert file.read_bytes() == whole.read_bytes() != model.file.read_bytes()
    assert not notes.exists()


def damaged(model: Model, tmp_path: Path, edit: Edit) -> Path:
    document = json.loads(model.file.read_text("ascii"))
    edit(document)
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(document), "ascii")
    return file


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(key="0" * 64), "measured on another model, with another archive"),
        (lambda d: d.update(version=2), "a measurement of version 2; known: 1"),
        (lambda d: d.update(format="x"), "no measurement"),
        (lambda d: d["linears"].pop(DOWN), f"{DOWN} is missing"),
        (lambda d: d["linears"][DOWN]["layouts"][0].pop("error"), "a damaged measurement: KeyError"),
        (lambda d: d["linears"][DOWN]["layouts"][3].update(error=float("nan")), "an error of nan"),
        (lambda d: d["linears"][DOWN]["layouts"][0].update(parts=[[7, 64, 1.0]]), "has 7 bits"),
        (lambda d: d["linears"][DOWN].update(layouts=[]), "without a choice"),
    ],
)
def test_another_measurement_is_refused(model: Model, tmp_path: Path, edit: Edit, message: str) -> None:
    file = damaged(model, tmp_path, edit)
    with pytest.raises(UsageError) as caught:
        read_measurement(file, model.checkpoint.config, measurement_key(model.archive))
    assert message in str(caught.value)


def test_exllamav2_can_read_ours(model: Model, tmp_path: Path) -> None:
    """What is for it, alone, reads as its own, each way dearer and better than the one before."""
    document = {key: model.measurement.document[key] for key in ("measurement", "last_module_idx")}
    assert document["last_module_idx"] == 4
    theirs = read_theirs(model, tmp_path, document)
    for slot, linears in zip(theirs.slots, (4, 3), strict=True):
        assert len(slot) > 10
        assert all(len(way.layouts) == linears for way in slot)
        assert all(one.bits < other.bits and one.error > other.error for one, other in pairwise(slot))
    # The same linears, chosen for one by one: never worse than a choice for whole modules.
    config, bits = model.checkpoint.config, Fraction("3.5")
    errors = {
        (name, choice.layouts[name]): choice.error
        for slot in model.measurement.slots
        for choice in slot
        for name in choice.layouts
    }
    whole = choose(config, theirs, bits, 6).layouts
    slots = tuple(tuple(replace(each, nats=None) for each in slot) for slot in model.measurement.slots)
    single = choose(config, replace(model.measurement, slots=slots), bits, 6).layouts
    of_whole, of_single = (
        sum(SENSITIVITY[linear_kind(n)] * errors[n, layouts[n]] for n in decoder_linears(config))
        for layouts in (whole, single)
    )
    assert of_single <= of_whole < 2 * of_single


def exllamav2s(model: Model) -> dict[str, Any]:
    """A measurement as exllamav2 0.3.2 writes it: options of whole modules, widths as keys of JSON."""
    four = {"group_size": {"4": 128}, "bits": [4], "bits_prop": [1], "scale_bits": 4}
    mixed = {"group_size": {"8": 32, "4": 128}, "bits": [8, 4], "bits_prop": [0.05, 0.95], "scale_bits": 4}
    six = {"group_size": 32, "bits": [6], "bits_prop": [1.0], "scale_bits": 4}
    attention = [dict.fromkeys(ATTENTION, four) | {"accuracy": 0.9, "total_bits": 1}]
    attention.append(dict.fromkeys(ATTENTION, six) | {"accuracy": 0.98, "total_bits": 2})
    mlp = [{"gate_proj": four, "up_proj": four, "down_proj": mixed, "accuracy": 0.95, "total_bits": 1}]
    mlp.append(dict.fromkeys(MLP, six) | {"accuracy": 0.99, "total_bits": 2})
    modules = {"model.layers.0.self_attn": attention, "model.layers.0.mlp": mlp}
    return {"measurement": modules, "last_module_idx": 3}


def read_theirs(model: Model, tmp_path: Path, document: dict[str, Any]) -> Measurement:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(document), "ascii")
    return read_measurement(file, model.checkpoint.config, measurement_key(model.archive))


def test_exllamav2s_measurement_is_read(model: Model, tmp_path: Path) -> None:
    theirs = read_theirs(model, tmp_path, exllamav2s(model))
    assert [[len(choice.layouts) for choice in slot] for slot in theirs.slots] == [[4, 4], [3, 3]]
    assert [choice.error for choice in theirs.slots[0]] == pytest.approx([0.01, 0.0004])
    assert theirs.slots[1][0].layouts[DOWN].name == "8b32:0.05 4b128:0.95"
    # One module can be in 6 bits: that of the attention gains more.
    found = choose(model.checkpoint.config, theirs, Fraction("5.0"), 6)
    assert found.layouts["model.layers.0.self_attn.o_proj.weight"].name == "6b32:1"
    assert found.layouts[DOWN].name == "8b32:0.05 4b128:0.95" and found.errors == {}


def test_exllamav2s_measurement_of_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    document = exllamav2s(model)
    del document["measurement"]["model.layers.0.mlp"]
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp is missing"):
        read_theirs(model, tmp_path, document)
    document = exllamav2s(model)
    document["measurement"]["model.layers.0.mlp"][0]["up_proj"] = {"bits": [4]}
    with pytest.raises(UsageError, match="a damaged measurement"):
        read_theirs(model, tmp_path, document)
