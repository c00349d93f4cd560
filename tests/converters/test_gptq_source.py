"""A GPTQ folder opens as what it is, and every fault of it is named, all at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.gptq_source import GptqFolder, open_gptq
from converters.inspect import inspect_path
from quantize.errors import CheckpointError
from quantize.llama import EMBEDDING

MakeFolder = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | changes), "utf-8")


def edit_quantization(folder: Path, **changes: Any) -> None:
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text("utf-8"))
        (content["quantization_config"] if name == "config.json" else content).update(changes)
        (folder / name).write_text(json.dumps(content), "utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reasons(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_gptq(folder)
    return str(error.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 0])
@pytest.mark.parametrize(
    ("symmetric", "desc_act", "version"), [(True, False, "gptq"), (False, True, "gptq_v2")]
)
def test_the_weights_are_the_solvers(
    make_gptq: MakeFolder, bits: int, size: int, symmetric: bool, desc_act: bool, version: str
) -> None:
    expected: dict[str, torch.Tensor] = {}
    folder = make_gptq(bits, size, symmetric, desc_act, version=version, into=expected)
    file = open_gptq(folder)
    assert set(file.weights.specs()) == set(file.config.tensor_shapes()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.weights.load(name), tensor)
    kind = f"GPTQ-{bits}bit-" + ("32g" if size else "channel")
    assert file.tensor_types[f"{Q}.weight"] == kind
    assert file.tensor_types[EMBEDDING] == "F16"
    assert file.config.rope_factor == 4


def test_shards_with_and_without_an_index(make_gptq: MakeFolder) -> None:
    folder = make_gptq()
    one = {name: tensor.clone() for name, tensor in open_all(open_gptq(folder)).items()}
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, str] = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    for _ in range(2):
        assert all(torch.equal(one[name], tensor) for name, tensor in open_all(open_gptq(folder)).items())
        edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map=files)


def open_all(file: GptqFolder) -> dict[str, torch.Tensor]:
    return {name: file.weights.load(name) for name in file.weights.specs()}


def test_foreign_statements_open_too(make_gptq: MakeFolder) -> None:
    """auto-round's file and missing fields; AutoGPTQ's name of the weights; biases of zeros."""
    folder = make_gptq()
    (folder / "quantize_config.json").rename(folder / "quantization_config.json")
    for place in ("quantization_config.json", "config.json"):
        content = json.loads((folder / place).read_text("utf-8"))
        stated = content.get("quantization_config", content)
        for key in ("format", "checkpoint_format", "desc_act"):
            stated.pop(key, None)
        (folder / place).write_text(json.dumps(content), "utf-8")
    edit_tensors(folder, lambda t: t.update({f"{Q}.bias": torch.zeros(64, dtype=torch.float16)}))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert open_gptq(folder).quantization.version == 1


def test_mixed_bits_through_dynamic(make_gptq: MakeFolder, tmp_path: Path) -> None:
    """The first matching expression counts; what is left out is a float."""
    folder, other = make_gptq(4), make_gptq(8, name="other")
    source = load_file(other / "model.safetensors")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{DOWN}.{part}"] = source[f"{DOWN}.{part}"].clone()
            del tensors[f"{Q}.{part}"]
        tensors[f"{Q}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)

    edit_tensors(folder, mix)
    rules = {r"+:.*layers\.1\.mlp\.down": {"bits": 8}, f"-:{Q}": {}, ".*": {"bits": 4}}
    edit_quantization(folder, dynamic=rules)
    types = open_gptq(folder).tensor_types
    assert types[f"{DOWN}.weight"] == "GPTQ-8bit-32g"
    assert types[f"{Q}.weight"] == "BF16"
    assert types["model.layers.0.mlp.down_proj.weight"] == "GPTQ-4bit-32g"
    edit_quantization(folder, dynamic={"(": {}, "a": 1, "b": {"bits": 5}})
    said = reasons(folder)
    assert "'(' is no regular expression" in said
    assert "'a' is 1; expected an object" in said
    assert "dynamic 'b': bits is 5; supported: 2, 3, 4, 8" in said


def test_all_faults_of_the_tensors_are_named_at_once(make_gptq: MakeFolder) -> None:
    folder = make_gptq()

    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q}.g_idx"], tensors["model.norm.weight"]
        tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"].float()
        tensors[f"{DOWN}.qzeros"] = tensors[f"{DOWN}.qzeros"][:, :4].clone()
        tensors["model.layers.7.odd"] = torch.zeros(1)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.0.mlp.up_proj.{part}"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64)

    edit_tensors(folder, break_it)
    said = reasons(folder)
    for expected in (
        f"{Q}.g_idx is missing",
        "model.norm.weight is missing",
        f"{DOWN}.scales is stored as F32, expected F16 or BF16",
        f"{DOWN}.qzeros is [3, 4], expected [3, 8] by bits and group_size of the config",
        "model.layers.7.odd is not part of a Llama quantized this way",
        "model.layers.0.mlp.up_proj is not quantized, and the config does not say so",
    ):
        assert expected in said


def test_bits_and_groups_unlike_the_tensors(make_gptq: MakeFolder) -> None:
    folder = make_gptq(4)
    edit_quantization(folder, bits=8)
    assert f"{Q}.qweight is [8, 64], expected [16, 64] by bits and group_size of the config" in reasons(
        folder
    )
    edit_quantization(folder, bits=4, group_size=64)
    assert f"{Q}.scales is [2, 64], expected [1, 64]" in reasons(folder)


def test_values_that_only_a_look_at_them_shows(make_gptq: MakeFolder) -> None:
    folder = make_gptq()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.g_idx"][5] = 2
        tensors[f"{DOWN}.g_idx"][0] = -1
        tensors[f"{Q}.bias"] = torch.ones(64, dtype=torch.float16)

    edit_tensors(folder, spoil)
    said = reasons(folder)
    assert f"{Q}.g_idx holds 0 to 2, expected 0 to 1" in said
    assert f"{DOWN}.g_idx holds -1 to 2, expected 0 to 2" in said
    assert f"{Q}.bias is not zero" in said


def test_statements_that_disagree_or_say_too_little(make_gptq: MakeFolder) -> None:
    folder = make_gptq()
    edit_json(folder / "quantize_config.json", bits=3, checkpoint_format="gptq_v2", format="gptq_v2")
    said = reasons(folder)
    assert "bits is 4 in config.json: quantization_config, but 3 in quantize_config.json" in said
    assert (
        "format is 'gptq' in config.json: quantization_config, but 'gptq_v2' in quantize_config.json" in said
    )
    (folder / "quantize_config.json").unlink()
    edit_json(folder / "config.json", quantization_config={"bits": 5, "format": "marlin", "sym": 1})
    said = reasons(folder)
    for expected in (
        "bits is 5; supported: 2, 3, 4, 8",
        "group_size is None; expected a number",
        "format is 'marlin'; supported: 'gptq', 'gptq_v2'",
        "sym is 1; expected true or false",
    ):
        assert expected in said
    edit_json(folder / "config.json", quantization_config=None)
    assert "config.json has no quantization_config" in reasons(folder)


def test_inspect_describes_a_folder(make_gptq: MakeFolder) -> None:
    folder = make_gptq()
    found = inspect_path(folder)
    assert found.kind == "GPTQ folder"
    assert found.facts["quantization"] == "4 bits, groups of 32, symmetric, natural order, format gptq"
    assert found.findings == ()
    assert {row.quant for row in found.tensors} == {"GPTQ-4bit-32g", "F16"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "quantize_config.json").unlink()
    findings = inspect_path(folder).findings
    assert [finding.split(":")[0] for finding in findings] == [
        "config.json has no top-level rope_theta",
        "config.json has no top-level rope_scaling",
        "no quantize_config.json",
    ]
