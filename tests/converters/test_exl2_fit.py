"""`--to exl2:fit=`: what a card has room for, what the rest of it is for, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.exl2_measurement import nominal
from converters.exllamav2_memory import CHUNK, PAGE, cache_bytes, overhead, scratch_bytes
from converters.pipeline import convert, plan_exports
from converters.plan import ConvertOptions, Plan, Request
from converters.runtime_memory import Runtime
from converters.targets import parse_request
from converters.targets.exl2_fit import card_of, fit_faults, fitting_bits, readable
from converters.targets.exl2_spec import parse_spec
from converters.targets.exl2_types import budget_of, choose, least_bits, most_bits, n_weights
from quantize.errors import PlanError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from tests.converters.exl2_model import Model
from tests.quantize.exl2_runtime import VARIABLE

Run = Callable[..., Any]
SMALL = LlamaConfig(4096, 11008, 32, 32, 32, 128, 32256, 16384, 1e-6, 1e5, 4.0)
LARGE = LlamaConfig(7168, 19200, 62, 56, 8, 128, 32256, 16384, 1e-6, 1e5, 4.0)
RUNTIME = Runtime(context=1000, cache="q8", reserve=100_000)


@pytest.fixture(scope="module")
def checkpoint(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


def beside(config: LlamaConfig, runtime: Runtime, head: str = "") -> int:
    return sum(card_of(parse_spec(f"fit=1GiB{head}"), config, runtime).beside.values())


def planned(checkpoint: Checkpoint, card: int, head: str = "") -> Plan:
    options = ConvertOptions(Path("out"), runtime=RUNTIME)
    return plan_exports(checkpoint, [parse_request(f"exl2:fit={card}{head}")], options)[0]


@pytest.mark.parametrize("head", ["", ",h8"])
@pytest.mark.parametrize("bits", [2.9, 3.3, 4.25, 5.1, 6.5, 7.5])
def test_a_card_is_never_passed_and_hardly_missed(checkpoint: Checkpoint, bits: float, head: str) -> None:
    """The bytes of the tensors that go onto the card, with all that is beside them."""
    config = checkpoint.config
    room = int(bits * n_weights(config) / 8)
    card = room + beside(config, RUNTIME, head)
    plan = planned(checkpoint, card, head)
    on_card = sum(tensor.n_bytes for tensor in plan.tensors if tensor.name != EMBEDDING)
    others = cache_bytes(config, RUNTIME) + sum(overhead(config, RUNTIME).values()) + RUNTIME.reserve
    assert card - 0.005 * room < on_card + others <= card
    assert plan.directory == f"exl2-fit-{card}{head.replace(',', '-')}"
    assert plan.by_name[HEAD].quant.startswith("8b128:1" if head else "8b128:0.15 6b128")


def test_more_of_everything_else_leaves_less(checkpoint: Checkpoint) -> None:
    spec, config = parse_spec("fit=8GiB"), SMALL
    bits = [
        fitting_bits(spec, config, Runtime(*each))
        for each in ((4096, "q4"), (4096, "q6"), (4096, "q8"), (4096,), (8192,), (8192, None, 1 << 28))
    ]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == len(bits)
    assert fitting_bits(parse_spec("fit=8GiB,h8"), config, Runtime()) < bits[3]


def test_cards_for_a_large_model() -> None:
    measurement = nominal(LARGE)
    for fit in range(14, 36, 4):
        bits = fitting_bits(parse_spec(f"fit={fit}GiB"), LARGE, Runtime(16384, "q4", 1 << 30))
        found = choose(LARGE, measurement, bits, 6)
        assert 0.999 * budget_of(LARGE, bits) < found.bits <= budget_of(LARGE, bits)


def test_where_the_richest_layouts_fit_they_are_taken(model: Model) -> None:
    options = model.options(Path("out"))
    (plan,) = plan_exports(model.checkpoint, [parse_request("exl2:fit=2GiB")], options)
    used = sum(8 * t.n_bytes for t in plan.tensors if ".layers." in t.name and t.compensated)
    best = sum(min(slot, key=lambda choice: choice.error).bits for slot in model.measurement.slots)
    assert used == best == most_bits(model.measurement)
    assert "the richest layouts fit everywhere: more memory brings nothing" in plan.notes
    (less,) = plan_exports(model.checkpoint, [parse_request("exl2:8")], options)
    assert not any("richest" in note for note in less.notes)


def test_what_does_not_fit_is_refused_with_every_part(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    least = least_bits(nominal(config))
    enough = least // 8 + beside(config, RUNTIME)
    assert planned(checkpoint, enough).n_bytes
    with pytest.raises(PlanError) as caught:
        planned(checkpoint, enough - 1)
    (reason,) = caught.value.reasons
    assert f"the cheapest layouts need {enough:,} bytes, {enough - 1:,} are allowed: " in reason
    assert f"decoder's linears {least // 8:,}, head " in reason
    assert f"KV cache {cache_bytes(config, RUNTIME):,}, overhead " in reason
    assert reason.endswith("reserve 100,000")
    with pytest.raises(PlanError, match="the cheapest layouts need"):
        planned(checkpoint, 1)


def test_a_quantized_cache_needs_heads_that_scales_divide() -> None:
    odd = LlamaConfig(192, 96, 2, 4, 2, 48, 512, 16384, 1e-6, 1e5)
    (reason,) = fit_faults(parse_spec("fit=1GiB"), odd, Runtime(cache="q6"), least_bits(nominal(odd)))
    assert reason == "--cache q6: a q6 cache has a scale for 32 numbers, the heads have 48"
    assert fit_faults(parse_spec("fit=1GiB"), odd, Runtime(cache="fp16"), least_bits(nominal(odd))) == []


def test_the_cache_of_a_known_model() -> None:
    """A 7B at 4096 tokens: 2 GiB in halves; else codes, half a bit of scales, and a layer in halves."""
    layer = (2 << 30) // 32

    def expected(bits: float) -> int:
        numbers = int((2 << 30) * bits / 16)
        page = numbers // 32 * PAGE // 4096
        return numbers + page + (0 if bits == 16 else layer)

    assert cache_bytes(SMALL, Runtime(4096)) == cache_bytes(SMALL, Runtime(4096, "fp16")) == expected(16)
    assert cache_bytes(SMALL, Runtime(4096, "q8")) == expected(8.5)
    assert cache_bytes(SMALL, Runtime(3900, "q6")) == expected(6.5)
    assert cache_bytes(SMALL, Runtime(4000, "q4")) == expected(4.5)


def test_the_overhead_of_a_known_model() -> None:
    """The 6.7B's, by hand: the head in halves is its scratch, scores and attention its activations."""
    state, scores = CHUNK * 4096, 32 * 2048**2
    linears = 32 * (6 * 4096 + 11008) + 4096
    assert overhead(SMALL, Runtime(4096)) == {
        "scratch": 2 * 32256 * 4096,
        "activations": 2 * (6 * state + 2 * scores + 2048**2),
        "tables": 2 * 2 * 128 * 16384 + 4 * linears,
        "allocator": (7 * 32 + 1) * (2 << 20),
    }


def test_exllamav2s_own_code_counts_the_same(model: Model, tmp_path: Path) -> None:
    """Its modules' scratch, and its caches allocated in main memory; its extension is an empty module."""
    package = os.environ.get(VARIABLE)
    if not package:
        pytest.skip(f"{VARIABLE} names no package of ExLlamaV2 (scripts/exllamav2_sources fetches it)")
    written = convert(model.checkpoint, [Request("exl2", "4")], model.options(tmp_path))[0]
    program = Path(__file__).with_name("exllamav2_counts.py")
    command = [sys.executable, str(program), str(Path(package).parent), str(written.place), "2048"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    config = model.checkpoint.config
    assert theirs.pop("scratch") == scratch_bytes(config)
    for cache, tensors in theirs.items():
        per_token = cache_bytes(config, Runtime(2048, cache)) - cache_bytes(
            config, Runtime(2048 - PAGE, cache)
        )
        halves = 0 if cache == "fp16" else 2 * 2 * config.n_kv_heads * config.head_dim * PAGE
        page = (per_token - halves) // config.n_layers
        assert cache_bytes(config, Runtime(2048, cache)) == tensors + page


def test_a_card_from_the_command_line(
    model: Model, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GGUF's losses are no business of EXL2's: they are not predicted."""
    monkeypatch.setattr("converters.type_losses.measured_losses", None)
    config, out = model.checkpoint.config, tmp_path / "out"
    runtime = Runtime(512, "q6", 1 << 20)
    card = beside(config, runtime) + int(4.4 * n_weights(config) / 8)
    options = ("--ctx", 512, "--cache", "q6", "--reserve", "1MiB", "--measurement", model.file)
    common = ("convert", model.source, "--to", f"exl2:fit={card}", "--stats", model.archive.folder, *options)
    shown = run(*common, "--dry-run", "-o", out)
    done = run(*common, "--effort", "fast", "--probe-tokens", 64, "--threads", 1, "-o", out)
    assert (shown.code, done.code) == (0, 0), done.err
    found = json.loads((out / f"exl2-fit-{card}" / "config.json").read_text("utf-8"))["quantization_config"]
    assert 4.3 < found["bits"] == found["bits_in_use"] <= 4.4
    notes = json.loads((out / f"exl2-fit-{card}.report.json").read_text("utf-8"))["plan"]["notes"]
    for said in (shown.out.replace("\n", " "), done.err, " ".join(notes)):
        assert f"of {readable(card)}: decoder's linears " in said
        assert f"KV cache {readable(cache_bytes(config, runtime))}, overhead " in said
        assert "reserve 1.00 MiB; " in said
        assert "KV cache of 512 tokens in q6; overhead at the most" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("exl2:fit=8 apples",), "'8 apples' is no amount"),
        (("exl2:fit=",), "for example exl2:fit=24GiB"),
        (("exl2:fit=0",), "'0' is no amount"),
        (("exl2:fit=8GiB,h7",), "unknown 'h7'"),
        (("exl2:4", "--ctx", "512"), "--ctx: only for fit=, which is not asked for"),
        (("exl2:fit=2GiB", "--ngl", "9"), "--ngl: only for gguf:fit=; exl2:fit=2GiB is on the card whole"),
        (
            ("exl2:fit=8GiB", "--cache", "q8_0"),
            "--cache q8_0: exl2:fit=8GiB is for exllamav2, whose caches are fp16, q8, q6, q4",
        ),
        (
            ("gguf:fit=8GiB", "--cache", "q8"),
            "--cache q8: gguf:fit=8GiB is for llama.cpp, whose caches are f16, q8_0, q4_0",
        ),
        (
            ("exl2:fit=8GiB", "--to", "gguf:fit=8GiB", "--cache", "q8"),
            "one command for each format, or no --cache",
        ),
    ],
)
def test_what_means_nothing_is_a_usage_error(
    demo_folder: Path, tmp_path: Path, run: Run, options: tuple[str, ...], message: str
) -> None:
    done = run("convert", demo_folder, "-o", tmp_path / "out", "--to", *options)
    assert (done.code, message in done.err) == (2, True), done.err


def test_one_command_can_fit_both_formats(demo_folder: Path, tmp_path: Path, run: Run) -> None:
    both = ("--to", "exl2:fit=400MiB", "--to", "gguf:fit=400MiB")
    done = run("convert", demo_folder, "-o", tmp_path / "out", *both, "--ctx", 2000, "--dry-run")
    assert done.code == 0, done.err
    assert "KV cache of 2,048 tokens in fp16" in done.out
