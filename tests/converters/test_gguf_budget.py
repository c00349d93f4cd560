"""GGUFs of a size that was asked for: budgets, pins, plans as files, the curve, and what is refused."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from converters import curve as curves
from converters import type_losses
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.cli import dscq
from converters.corpus import rows
from converters.curve import curve
from converters.gguf_file import read_head
from converters.pipeline import plan_exports
from converters.plan import ConvertOptions, Plan, Request
from converters.plan_file import read_plan, write_plan
from converters.runtime_memory import Runtime, beside_weights, buffer_bytes, cache_bytes
from converters.sizes import parse_size
from converters.stats.archive import Archive, open_archive
from converters.stats.prepare import CalibrateOptions
from converters.stats.run import calibrate_checkpoint
from converters.targets import parse_request
from converters.targets.gguf import gguf_types
from converters.targets.gguf_budget import predicted_loss
from converters.targets.gguf_speed import TIE, excluded_types, without_slower
from converters.type_losses import kept_losses, measured_losses
from quantize import type_errors
from quantize.allocate import Option
from quantize.codecs import codec
from quantize.errors import DscqError, PlanError, UsageError
from quantize.llama import EMBEDDING, HEAD, LlamaConfig
from tests.converters.test_gptq_target import Row

LARGE = LlamaConfig(4096, 11008, 32, 32, 32, 128, 32256, 16384, 1e-6, 1e5)


@pytest.fixture(scope="module")
def checkpoint(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


@pytest.fixture(scope="module")
def options(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConvertOptions]:
    """Options with an archive of few tokens and the losses predicted from it, by few rows."""
    generator = torch.Generator().manual_seed(1)
    ids = [Row(torch.randint(0, 2300, (160,), generator=generator)) for _ in range(6)]
    folder = tmp_path_factory.mktemp("stats")
    archive = calibrate_checkpoint(checkpoint, ids, {"name": "random"}, CalibrateOptions(folder))
    chosen = ConvertOptions(Path("out"), archive=archive, compensate=True, importances=archive.importances())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type_errors, "ROWS", 24)
        yield replace(chosen, losses=measured_losses(checkpoint, chosen))


def planned(checkpoint: Checkpoint, options: ConvertOptions, quant: str, **changes: Any) -> Plan:
    return plan_exports(checkpoint, [parse_request(f"gguf:{quant}")], replace(options, **changes))[0]


def loss(checkpoint: Checkpoint, options: ConvertOptions, quant: str) -> float:
    found = predicted_loss(gguf_types(checkpoint, parse_request(f"gguf:{quant}"), options))
    assert found is not None
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dscq, [str(argument) for argument in arguments])


def error(*arguments: object) -> DscqError:
    exception = run(*arguments).exception
    assert isinstance(exception, DscqError), exception
    return exception


@pytest.mark.parametrize("bpw", [2.5, 2.9, 3.5, 4.25, 5.0, 6.6, 8.0, 12.0])
def test_a_budget_is_never_passed_and_hardly_missed(
    checkpoint: Checkpoint, options: ConvertOptions, bpw: float
) -> None:
    budget = bpw * checkpoint.config.n_parameters / 8
    for changes in ({}, {"split_max_bytes": 900_000}) if bpw < 4 else ({},):
        plan = planned(checkpoint, options, f"bpw={bpw}", **changes)
        assert 0.995 * budget < plan.n_bytes <= budget
        assert {t.quant for t in plan.tensors if len(t.shape) == 1} == {"F32"}


def test_more_bytes_never_lose_more_and_no_recipe_loses_less(
    checkpoint: Checkpoint, options: ConvertOptions
) -> None:
    points = curve(checkpoint, options)
    allocated = [point for point in points if point.quant.startswith("bpw=")]
    recipes = [point for point in points if not point.quant.startswith("bpw=")]
    assert len(allocated) > 10 and {"Q2_K", "Q4_K_M", "Q8_0", "F16"} <= {point.quant for point in recipes}
    losses = [point.predicted_kl or 0.0 for point in allocated]
    assert losses == sorted(losses, reverse=True)
    for point in recipes:
        # The head of a file that importances were used for says so; that of a Q8_0 has no need.
        size = f"size={point.n_bytes + 500}"
        assert loss(checkpoint, options, size) <= (point.predicted_kl or 0.0) * (1 + TIE)


def test_where_the_richest_types_fit_there_is_nothing_to_share(
    checkpoint: Checkpoint, options: ConvertOptions
) -> None:
    plan = planned(checkpoint, options, "size=1GB")
    assert plan.n_bytes == planned(checkpoint, options, "F16").n_bytes
    # A type as good as F16 would be chosen for its bytes: none is.
    assert {tensor.quant for tensor in plan.tensors if len(tensor.shape) > 1} == {"F16"}


def test_pins_are_kept_and_counted(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    pins: dict[str, Any] = {"tensor_types": (("attn_v", "F32"), ("ffn_down", "Q5_1"))}
    pins |= {"output_tensor_type": "Q6_K", "token_embedding_type": "BF16"}
    plan = planned(checkpoint, options, "size=3.9MB", **pins)
    assert 0.995 * 3_900_000 < plan.n_bytes <= 3_900_000
    types = {tensor.written_name: tensor.quant for tensor in plan.tensors}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "BF16"
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(5)} == {"F32"}
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(5)} == {"Q5_1"}
    plan = planned(checkpoint, options, "size=3.9MB", tensor_types=((".", "Q4_0"),))
    assert {tensor.quant for tensor in plan.tensors if len(tensor.shape) > 1} == {"Q4_0"}


def test_excluded_types_are_not_chosen(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    chosen = {tensor.quant for tensor in planned(checkpoint, options, "bpw=3.2").tensors}
    assert any(quant.startswith("IQ") for quant in chosen)
    excluded = excluded_types(("iq*",))
    plan = planned(checkpoint, options, "bpw=3.6", excluded=excluded)
    assert not {tensor.quant for tensor in plan.tensors} & {*excluded}
    assert 0.995 * 3.6 * checkpoint.config.n_parameters / 8 < plan.n_bytes
    assert any("IQ4_XS" in note and "excluded" in note for note in plan.notes)
    with pytest.raises(PlanError, match="every type that these matrices can have is excluded"):
        planned(checkpoint, options, "bpw=3.6", excluded=excluded_types(("*",)))


def test_of_two_types_alike_the_faster_one_is_chosen() -> None:
    slow, fast = "IQ3_S", "Q3_K"
    for bits, nats, kept in ((8, 1.015, [fast]), (8, 1.03, [slow, fast]), (9, 1.0, [slow, fast])):
        options = {slow: Option(8, 1.0), fast: Option(bits, nats)}
        assert [quant for quant, _ in without_slower(options)] == kept
    assert len(without_slower({fast: Option(8, 1.0), slow: Option(8, 1.01)})) == 1


def test_what_is_too_small_is_refused_with_the_smallest_size(
    checkpoint: Checkpoint, options: ConvertOptions
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(checkpoint, options, "bpw=1.2")
    assert "the smallest types need 1,3" in caught.value.reasons[0]
    with pytest.raises(PlanError) as caught:
        planned(checkpoint, options, "fit=30MB", runtime=Runtime(context=16384))
    assert "of the memory are for KV cache, buffers and reserve" in caught.value.reasons[0]


def test_a_fit_leaves_room_for_the_cache(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    runtime = Runtime(context=1000, cache="q8_0", reserve=100_000)
    beside = beside_weights(checkpoint.config, runtime)
    plan = planned(checkpoint, options, f"fit={beside + 2_500_000}", runtime=runtime)
    assert plan.n_bytes == planned(checkpoint, options, "size=2500000").n_bytes
    assert [file.name for file in plan.files] == [f"demo-coder-fit-{beside + 2_500_000}.gguf"]


def is_best_head(plan: Plan, options: ConvertOptions, budget: int) -> bool:
    """Say whether no type in which the output matrix alone fits is better than its own."""
    assert options.losses is not None
    (n_rows, n_columns), losses = plan.by_name[HEAD].shape, options.losses[HEAD]
    fitting = [loss for name, loss in losses.items() if n_rows * codec(name).row_bytes(n_columns) <= budget]
    return losses[plan.by_name[HEAD].quant] == min(fitting)


@pytest.mark.parametrize(
    ("layers", "blocks"), [(1, ()), (3, (3, 4)), (6, (0, 1, 2, 3, 4)), (99, (0, 1, 2, 3, 4))]
)
def test_with_layers_in_main_memory_those_on_the_card_fill_it(
    checkpoint: Checkpoint, options: ConvertOptions, layers: int, blocks: tuple[int, ...]
) -> None:
    """llama.cpp: the output matrix is the first layer that goes to the card, the last blocks follow."""
    config = checkpoint.config
    prefixes = ("output", *(f"blk.{number}." for number in blocks))

    def there(plan: Plan) -> int:
        return sum(tensor.n_bytes for tensor in plan.tensors if tensor.written_name.startswith(prefixes))

    runtime = Runtime(context=1000, gpu_layers=layers)
    whole = Runtime(context=1000)
    assert cache_bytes(config, runtime) == cache_bytes(config, whole) * len(blocks) // config.n_layers
    smaller, larger = (planned(checkpoint, options, f"bpw={bpw}") for bpw in (3.0, 5.0))
    budget = (there(smaller) + there(larger)) // 2
    fit = beside_weights(config, runtime) + budget
    plan = planned(checkpoint, options, f"fit={fit}", runtime=runtime)
    assert there(plan) <= budget
    assert there(plan) > 0.9 * budget or (not blocks and is_best_head(plan, options, budget))
    assert smaller.n_bytes < plan.n_bytes < larger.n_bytes
    assert any("on the card: the output matrix and" in note for note in plan.notes)


def test_layers_in_main_memory_leave_more_room_for_the_others(
    checkpoint: Checkpoint, options: ConvertOptions
) -> None:
    fit = beside_weights(checkpoint.config, Runtime(context=1000)) + 2_000_000
    sizes = [
        planned(checkpoint, options, f"fit={fit}", runtime=Runtime(context=1000, gpu_layers=layers)).n_bytes
        for layers in (6, 5, 4, 2)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    with pytest.raises(PlanError) as caught:
        tight = Runtime(context=1000, gpu_layers=4)
        planned(checkpoint, options, f"fit={beside_weights(checkpoint.config, tight) + 1000}", runtime=tight)
    assert "the smallest types need" in caught.value.reasons[0]


def test_the_cache_of_a_known_model() -> None:
    """Llama 7B at 4096 tokens: 2 GiB in halves, as llama.cpp logs it; 8.5 and 4.5 of 16 bits otherwise."""
    assert cache_bytes(LARGE, Runtime(4096, "f16")) == 2 << 30
    assert cache_bytes(LARGE, Runtime(4096, "q8_0")) == (2 << 30) * 17 // 32
    assert cache_bytes(LARGE, Runtime(4000, "q4_0")) == (2 << 30) * 9 // 32


@pytest.mark.parametrize(
    ("config", "context", "logged"),
    [
        (LlamaConfig(768, 1536, 30, 12, 4, 64, 49152, 8192, 1e-6, 1e5), 4096, 107.51),
        (LlamaConfig(768, 1536, 30, 12, 4, 64, 49152, 8192, 1e-6, 1e5), 512, 104.01),
        (LARGE, 4096, 100.51),
        (LlamaConfig(256, 640, 5, 4, 2, 64, 2304, 16384, 1e-6, 1e5), 8192, 13.76),
    ],
)
def test_the_buffers_are_at_least_those_that_llama_cpp_logs(
    config: LlamaConfig, context: int, logged: float
) -> None:
    """The compute buffer of a CPU, in MiB: a bound that is met where the logits are large."""
    found = buffer_bytes(config, Runtime(context)) / 2**20
    assert logged - 0.02 <= found <= 1.1 * logged


def test_losses_are_kept_and_told_apart(
    checkpoint: Checkpoint, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.losses is not None
    assert kept_losses(options) == options.losses
    assert list(options.losses) == [n for n, s in checkpoint.config.tensor_shapes().items() if len(s) > 1]
    assert "IQ2_XS" not in options.losses[EMBEDDING] and "Q2_K" in options.losses[EMBEDDING]
    assert kept_losses(replace(options, compensate=False)) is None
    assert kept_losses(replace(options, importances=None)) is None
    for name, value in (("SOLVING", 99), ("compensated_types", lambda: ("Q2_K",))):
        with monkeypatch.context() as patch:
            patch.setattr(type_losses, name, value)
            assert kept_losses(options) is None


def test_losses_do_not_depend_on_threads(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    work = type_losses._Work(checkpoint, _archive(options), options)
    assert options.losses is not None
    assert work.predict("model.layers.0.self_attn.k_proj.weight") == pytest.approx(
        options.losses["model.layers.0.self_attn.k_proj.weight"]
    )


def _archive(options: ConvertOptions) -> Archive:
    assert options.archive is not None
    return options.archive


def test_a_damaged_file_of_losses_is_as_good_as_none(options: ConvertOptions, tmp_path: Path) -> None:
    archive = _archive(options)
    (path,) = archive.folder.glob("type-losses-*.json")
    whole = path.read_text()
    try:
        for text in ("", "{}", "[]", '{"key": 1, "kl": {"a": 3}}', whole.replace("lm_head", "head")):
            path.write_text(text)
            assert kept_losses(options) is None
    finally:
        path.write_text(whole)
    assert open_archive(archive.folder).linears() == archive.linears()


def test_a_plan_is_written_edited_and_given_back(
    demo_folder: Path, options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second size is quick: nothing is measured again.
    monkeypatch.setattr(type_losses, "measured_losses", None)
    stats, plan = _archive(options).folder, tmp_path / "mine.toml"
    made = run("plan", demo_folder, "--stats", stats, "--to", "gguf:bpw=3.1", "-o", plan, "--json")
    assert made.exit_code == 0, made.output
    types = json.loads(made.stdout)["plan"]["types"]
    assert tomllib.loads(plan.read_text())["types"] == types == read_plan(plan)
    plan.write_text(
        plan.read_text().replace(f'"output.weight" = "{types["output.weight"]}"', '"output.weight" = "q6_k"')
    )
    out = tmp_path / "out"
    done = run("convert", demo_folder, "--stats", stats, "--plan", plan, "-o", out, "--no-proof")
    assert done.exit_code == 0, done.output
    head = read_head(out / "demo-coder-plan-mine.gguf")
    written = {tensor.name: tensor.quant for tensor in head.tensors if len(tensor.shape) > 1}
    assert written == types | {"output.weight": "Q6_K"}
    assert head.metadata["dscq.recipe"] == "plan=mine"
    again = error("plan", demo_folder, "--stats", stats, "--to", "gguf:bpw=3.1", "-o", plan)
    assert "nothing is overwritten" in str(again)


def test_every_fault_of_a_plan_is_named(demo_folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "odd.toml"
    plan.write_text('[types]\n"blk.9.attn_q.weight" = "Q4_K"\n"blok" = "Q4_K"\n"output.weight" = "Q9"\n'
                    '"blk.0.ffn_down.weight" = "Q4_K"\n')  # fmt: skip
    reasons = str(error("convert", demo_folder, "--plan", plan, "-o", tmp_path / "out"))
    for part in (
        "blk.9.attn_q.weight: the model has no such matrix",
        "blok: the model has no such matrix",
        "output.weight: 'Q9' is no type that can be written; known: F32, F16",
        "blk.0.ffn_down.weight: Q4_K has blocks of 256, the rows 640 columns",
        "token_embd.weight: the plan has no type for it",
    ):
        assert part in reasons
    for text, message in (
        ("types = 3", "[types] is missing"),
        ("a = ", "no plan"),
        ("[types]\na = 1", "a: 1 is no text"),
    ):
        plan.write_text(text)
        assert message in str(error("convert", demo_folder, "--plan", plan, "-o", tmp_path / "out"))


def test_the_names_in_a_plan_file_are_quoted(
    checkpoint: Checkpoint, options: ConvertOptions, tmp_path: Path
) -> None:
    plan = planned(checkpoint, options, "bpw=3")
    write_plan(tmp_path / "a.toml", 'odd "name"\\', plan, 1e-05)
    found = tomllib.loads((tmp_path / "a.toml").read_text())
    assert (found["model"], found["request"], found["bytes"]) == ('odd "name"\\', "gguf:bpw=3", plan.n_bytes)
    assert found["predicted_kl"] == 1e-05


def test_without_an_archive_one_is_made_and_the_file_fits(
    demo_folder: Path, options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(rows.CorpusOptions, n_rows=4, length=96, n_long=0)
    monkeypatch.setattr(rows, "CorpusOptions", few)
    monkeypatch.setattr(type_losses, "measured_losses", lambda *_: options.losses)
    done = run(
        "convert", demo_folder, "--to", "gguf:size=2.3MB", "-o", tmp_path, "--no-proof", "--effort", "fast"
    )
    assert done.exit_code == 0, done.output
    assert "calibrating: statistics on the built-in text" in done.stderr
    assert "predicted KL divergence" in done.stderr and "provisional" not in done.stderr
    path = tmp_path / "demo-coder-size-2.3MB.gguf"
    assert 0.995 * 2_300_000 < path.stat().st_size <= 2_300_000
    assert len(read_head(path).tensors) == 48


def test_a_dry_run_without_losses_says_that_types_are_provisional(demo_folder: Path, tmp_path: Path) -> None:
    done = run("convert", demo_folder, "--to", "gguf:bpw=4", "--dry-run", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the types are provisional: no losses have been predicted yet" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_curve_is_drawn(
    demo_folder: Path, options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "SIZES", (3.0, 5.0))
    stats = _archive(options).folder
    picture = tmp_path / "curve.svg"
    pytest.importorskip("matplotlib")
    done = run("plan", demo_folder, "--stats", stats, "--curve", "--plot", picture, "--json")
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["curve"]
    assert "Q4_K_M" in {point["quant"] for point in points}
    assert "Q4_K_M" in picture.read_text()


def test_the_curve_shows_what_reports_have_measured(
    checkpoint: Checkpoint, options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "SIZES", (3.0, 5.0))
    sizes = {quant: planned(checkpoint, options, quant).n_bytes for quant in ("Q4_K_M", "bpw=3.7")}
    own = asdict(checkpoint.config)
    for number, (quant, n_bytes, kl, config) in enumerate(
        [
            ("Q4_K_M", sizes["Q4_K_M"], 0.25, own),
            ("bpw=3.7", sizes["bpw=3.7"], 0.5, own),
            ("Q2_K", 123, 0.75, own),
            ("Q3_K_M", 124, 0.75, own | {"n_layers": 9}),
        ]
    ):
        figures = [{"pair": "checkpoint -> file", "positions": "all", "mean": kl}]
        report = {"config": config, "source": {"name": checkpoint.provenance.name}}
        report |= {"plan": {"request": f"gguf:{quant}", "n_bytes": n_bytes}, "proof": {"figures": figures}}
        (tmp_path / f"{number}.report.json").write_text(json.dumps(report))
    (tmp_path / "other.report.json").write_text("{}")
    points = {point.quant: point for point in curve(checkpoint, options, tmp_path) if point.measured_kl}
    assert {quant: point.measured_kl for quant, point in points.items()} == {
        "Q4_K_M": 0.25,
        "bpw=3.7": 0.5,
        "Q2_K": 0.75,
    }
    assert points["bpw=3.7"].predicted_kl == pytest.approx(loss(checkpoint, options, "bpw=3.7"))
    assert points["Q2_K"].predicted_kl is None and points["Q2_K"].n_bytes == 123


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf:bpw=much"), "'much' is no amount"),
        (("--to", "gguf:bpw=nan"), "'nan' is no amount"),
        (("--to", "gguf:size=0"), "'0' is no amount"),
        (("--to", "gguf:fit=8 apples"), "for example gguf:fit=8GiB"),
        (("--to", "gguf:plan=x"), "unknown type 'plan=x'"),
        (("--to", "gguf:bpw=4", "--ctx", "512"), "--ctx: only for fit=, which is not asked for"),
        (("--to", "gguf:bpw=4", "--pure"), "--pure: no recipe is asked for"),
        ((), "--to is missing"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(
    demo_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    caught = error("convert", demo_folder, *arguments)
    assert isinstance(caught, UsageError) and message in str(caught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to plan"),
        (("--to", "gptq:4bit-128g"), "only GGUF has types to plan"),
        (("--curve", "-o", "plan.toml"), "-o: only with --to"),
        (("--to", "gguf:bpw=4", "--plot", "a.svg"), "--plot draws the curve"),
        (("--to", "gguf:bpw=4", "--reports", "."), "--reports is for the curve"),
        (("--to", "gguf:bpw=4", "--reserve", "1G"), "--reserve: only for fit="),
        (("--to", "gguf:bpw=4", "--ngl", "9"), "--ngl: only for fit="),
        (("--to", "gguf:bpw=4", "--exclude-type", "IQ9*"), "--exclude-type IQ9*: no type has such a name"),
        (("--to", "gguf:Q4_K_M", "--exclude-type", "IQ*"), "--exclude-type: only for gguf:bpw="),
    ],
)
def test_plans_that_mean_nothing_are_usage_errors(
    demo_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    caught = error("plan", demo_folder, "--stats", tmp_path, *arguments)
    assert isinstance(caught, UsageError) and message in str(caught)


def test_budgets_have_one_spelling() -> None:
    assert parse_request("GGUF:BPW = 3.5") == Request("gguf", "bpw=3.5")
    assert parse_request("gguf:size=4.1 GB") == Request("gguf", "size=4.1GB")
    assert [parse_size(text) for text in ("10", "4k", "1.5GiB")] == [10, 4000, 3 << 29]
