"""Requests in any case, and what a plan says of itself."""

from pathlib import Path

import pytest

from converters.plan import ConvertOptions, FilePlan, Plan, Request, TensorPlan
from converters.targets import TARGETS, parse_request
from quantize.errors import UsageError


@pytest.mark.parametrize("text", ["gguf:Q8_0", "GGUF:q8_0", "Gguf: q8_0 "])
def test_requests_are_read_in_any_case(text: str) -> None:
    assert parse_request(text) == Request("gguf", "Q8_0")
    assert str(parse_request(text)) == "gguf:Q8_0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ggml:F16", "--to ggml:F16: unknown format 'ggml'\nknown formats: gguf:"),
        ("F16", "--to F16: unknown format 'F16'\nknown formats: gguf:"),
        ("", "--to : unknown format ''\nknown formats: gguf:"),
        ("gguf", "--to gguf: the type is missing\nknown: gguf:F32, gguf:F16, gguf:BF16, gguf:Q8_0, "),
        ("gguf:Q9", "--to gguf:Q9: unknown type 'Q9'\nknown: gguf:F32, gguf:F16, gguf:BF16, gguf:Q8_0, "),
        ("gguf:tq1_0", "--to gguf:tq1_0: TQ1_0 is not written: a model must be trained for "),
        ("gguf:Q2_0", "--to gguf:Q2_0: Q2_0 is not written: a model must be trained for so few "),
        ("gguf:MXFP4", "--to gguf:MXFP4: MXFP4 is not written: it is for models that were trained"),
    ],
)
def test_unknown_requests_list_the_known(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_request(text)
    assert str(caught.value).startswith(message)
    assert caught.value.hint.startswith(
        "known formats: gguf:" if "format" in message else "known: gguf:F32, "
    )
    assert "format" in message or "gguf:IQ1_M, gguf:IQ1_S" in caught.value.hint


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4", "MXFP4_MOE", "NVFP4"])
def test_what_is_not_written_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"--to gguf:{name}: {name} is not written: "):
        parse_request(f"gguf:{name}")


@pytest.mark.parametrize("text", ["gguf:Q4_K", "gguf:q4_k", "gguf:q4_k_m"])
def test_a_type_that_stands_for_a_mix_is_that_mix(text: str) -> None:
    assert parse_request(text) == Request("gguf", "Q4_K_M")


def test_every_target_parses_its_own_requests() -> None:
    for target in TARGETS.values():
        for quant in target.quants:
            assert parse_request(f"{target.format}:{quant}") == Request(target.format, quant)


def _tensor(name: str, shape: tuple[int, ...], quant: str, falls_back: bool = False) -> TensorPlan:
    return TensorPlan(name, name, shape, quant, "because", 8, 0, 0, 1, float("inf"), falls_back=falls_back)


def test_a_plan_knows_its_size_and_its_fallbacks() -> None:
    tensors = (_tensor("a", (2, 64), "Q8_0"), _tensor("b", (64,), "F32"), _tensor("c", (2, 5), "F16", True))
    plan = Plan(Request("gguf", "Q8_0"), (FilePlan("x", b"", 100), FilePlan("y", b"", 23)), tensors)
    assert plan.n_bytes == 123
    assert [tensor.name for tensor in plan.fallbacks] == ["c"]
    assert [plan.by_name[name].n_rows for name in "abc"] == [2, 1, 2]
    assert [plan.by_name[name].bits_per_weight for name in "abc"] == [0.5, 1.0, 6.4]
    assert plan.bits_per_weight == pytest.approx(8 * 24 / (128 + 64 + 10))


def test_options_are_careful_by_default() -> None:
    options = ConvertOptions(Path("out"))
    assert (options.force, options.split_max_bytes, options.hash_tensors) == (False, None, False)
