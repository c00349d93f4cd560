"""The report: complete, plain JSON whatever the figures are, and whole or not there."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.plan import ConvertOptions, Request
from converters.proof.record import Check, Figure, Proof, RuntimeState, TensorFigures
from converters.report import build_report, report_path, verdict, write_report
from converters.targets import TARGETS
from quantize.errors import OutputError
from quantize.fidelity import BlockOutlier, BlockReport
from quantize.metrics import Divergence

DIVERGENCE = Divergence(10, 1e-6, 1e-7, 2e-6, math.inf, 0.9, 12.0, math.nan)
OUTLIER = BlockOutlier(3, 1, math.inf, 2.0)
GOOD = Check("forward", "mean KL checkpoint -> file", True, 1e-6, 1e-5)
BAD = Check("metadata", "eos_id", False, detail="the file says 7, the checkpoint 2")
PROVEN = RuntimeState("proven", "xllamacpp 1", "AVX2 = 1")


def proof(*checks: Check, runtime: RuntimeState = PROVEN) -> Proof:
    return Proof(
        paths=(Path("/out/model-F16.gguf"),),
        checks=checks,
        quant_types={"F16": 8},
        tensors=(TensorFigures("model.norm.weight", "F32", BlockReport(1, 0.0, 1.0, 0.0, 1, (OUTLIER,))),),
        figures=(Figure("checkpoint -> file", "all", DIVERGENCE),),
        runtime=runtime,
        rows=(4352, 256),
        seconds={"forward": 1.5},
    )


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("my-model"))


def test_report_holds_everything(checkpoint: Checkpoint) -> None:
    report = build_report(
        checkpoint, proof(GOOD, BAD), file_hashes={"model-F16.gguf": "ab"}, seconds={"convert": 2.0}
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["source"]["name"] == "my-model"
    assert report["files"] == {"model-F16.gguf": "ab"}
    assert report["seconds"] == {"convert": 2.0, "forward": 1.5}
    assert report["config"]["rope_factor"] == 4.0
    found = report["proof"]
    assert found["passed"] is False
    assert [check["name"] for check in found["checks"]] == ["mean KL checkpoint -> file", "eos_id"]
    assert found["figures"][0]["mean"] == 1e-6
    assert (found["figures"][0]["max"], found["figures"][0]["perplexity_other"]) == ("inf", "nan")
    assert found["tensors"][0]["outliers"][0]["times_expected"] == "inf"
    assert found["probe_rows"] == [4352, 256]
    assert {"python", "torch", "numpy", "gguf"} <= set(report["environment"])


def test_no_path_of_this_machine_is_in_the_report(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert str(tmp_path) not in json.dumps(build_report(checkpoint, proof(GOOD)))


def test_the_plan_is_in_the_report(make_checkpoint: Callable[..., Path]) -> None:
    opened = open_checkpoint(make_checkpoint("other", hidden_size=256, intermediate_size=352))
    options = ConvertOptions(Path("out"), tensor_types=(("attn_q", "Q6_K"),))
    plan = TARGETS["gguf"].plan(opened, Request("gguf", "Q4_K_S"), options)
    found = build_report(opened, proof(GOOD), plan=plan)["plan"]
    assert (found["request"], found["n_bytes"]) == ("gguf:Q4_K_S", plan.n_bytes)
    assert found["bits_per_weight"] == plan.bits_per_weight
    assert found["types"]["blk.1.attn_q.weight"] == "Q6_K: override attn_q=Q6_K"
    assert len(found["types"]) == len(plan.tensors)
    assert list(found["fallbacks"]) == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert found["fallbacks"]["blk.1.ffn_down.weight"].endswith(": 352 columns are not a multiple of 256")
    assert found["notes"] == ["override attn_q=Q6_K: 2 tensors"]


def test_report_without_a_proof(checkpoint: Checkpoint) -> None:
    assert build_report(checkpoint, None)["proof"] is None


def test_verdicts() -> None:
    assert verdict(proof(GOOD)) == "proven, in xllamacpp 1"
    assert verdict(proof(GOOD, BAD)) == "failed: metadata: eos_id"
    unproven = RuntimeState("unproven in the runtime", hint="pip install it")
    assert verdict(proof(GOOD, runtime=unproven)) == "unproven in the runtime: pip install it"


def test_checks_name_themselves() -> None:
    assert str(BAD) == "metadata: eos_id: the file says 7, the checkpoint 2"
    assert str(GOOD) == "forward: mean KL checkpoint -> file 1e-06 (bound 1e-05)"


def test_written_whole_and_beside_the_file(tmp_path: Path) -> None:
    path = report_path(tmp_path / "model-F16.gguf")
    assert path == tmp_path / "model-F16.report.json"
    write_report(path, {"schema": 1, "name": "ü"})
    assert json.loads(path.read_text("utf-8")) == {"schema": 1, "name": "ü"}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_report_of_shards_has_one_name(tmp_path: Path) -> None:
    path = report_path(tmp_path / "model-F16-00001-of-00003.gguf")
    assert path == tmp_path / "model-F16.report.json"


def test_a_folder_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(tmp_path / "absent" / "x.report.json", {})
