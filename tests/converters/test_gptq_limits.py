"""Who reads a GPTQ folder: the rules, on the family's real shapes."""

from dataclasses import replace
from pathlib import Path

import pytest

from converters.config import read_config, read_json
from converters.targets.gptq_limits import Verdict, limit_faults, reader_verdicts, verdict_rows
from quantize.llama import LlamaConfig

# hidden, intermediate, layers, heads, KV heads of the four members.
SIZES = {
    "1.3b": (2048, 5504, 24, 16, 16),
    "5.7bmqa": (4096, 11008, 32, 32, 1),
    "6.7b": (4096, 11008, 32, 32, 32),
    "33b": (7168, 19200, 62, 56, 8),
}
READERS = (
    *("auto-gptq", "GPTQModel torch", "GPTQModel torch_fused", "GPTQModel triton", "GPTQModel exllamav2"),
    *("GPTQModel marlin", "GPTQModel machete", "transformers", "exllamav2", "vLLM gptq", "vLLM gptq_marlin"),
)


def family(member: str) -> LlamaConfig:
    hidden, inner, layers, heads, kv_heads = SIZES[member]
    return LlamaConfig(
        *(hidden, inner, layers, heads, kv_heads, 128, 32256, 16384, 1e-6, 1e5), rope_factor=4.0
    )


def verdicts(
    config: LlamaConfig,
    bits: int = 4,
    group: int = 128,
    *,
    sym: bool = True,
    desc_act: bool = False,
    tp: int = 1,
) -> dict[str, Verdict]:
    return {v.reader: v for v in reader_verdicts(config, bits, group, sym, desc_act, tp)}


def loading(found: dict[str, Verdict]) -> set[str]:
    return {reader for reader, verdict in found.items() if verdict.loads}


@pytest.mark.parametrize("member", SIZES)
def test_these_are_the_real_shapes(shared: Path, member: str) -> None:
    assert family(member) == read_config(read_json(shared / "deepseek-coder" / f"config.{member}-base.json"))


@pytest.mark.parametrize("member", SIZES)
def test_every_reader_takes_the_usual_settings_on_one_gpu(member: str) -> None:
    found = verdicts(family(member))
    assert tuple(found) == READERS
    assert loading(found) == set(READERS)
    assert limit_faults(family(member), 4, 128) == []
    kernels = "torch, torch_fused, triton, exllamav2, marlin, machete"
    assert found["transformers"].kernel_note == f"through optimum and GPTQModel: {kernels}"


# Under tensor parallelism: the group sizes that vLLM gptq takes, and those that are left to marlin.
TP = [
    ("1.3b", 2, {64, 32}, set()),
    ("1.3b", 4, {32}, set()),
    ("6.7b", 2, {128, 64, 32}, {128, 64, 32}),
    ("6.7b", 4, {64, 32}, set()),
    ("5.7bmqa", 2, {128, 64, 32}, {128, 64, 32}),
    ("5.7bmqa", 4, {64, 32}, set()),
    ("33b", 2, {128, 64, 32}, {128, 64, 32}),
    ("33b", 4, {64, 32}, set()),
    ("33b", 8, {32}, set()),
]


@pytest.mark.parametrize(("member", "tp", "plain", "marlin"), TP)
def test_groups_under_tensor_parallelism(member: str, tp: int, plain: set[int], marlin: set[int]) -> None:
    found = {group: loading(verdicts(family(member), group=group, tp=tp)) for group in (128, 64, 32)}
    assert {group for group, readers in found.items() if "vLLM gptq" in readers} == plain
    assert {group for group, readers in found.items() if "vLLM gptq_marlin" in readers} == marlin


def test_one_group_per_row_is_never_cut() -> None:
    assert {"vLLM gptq"} <= loading(verdicts(family("33b"), group=-1, tp=8))
    assert {"vLLM gptq", "vLLM gptq_marlin"} <= loading(verdicts(family("33b"), group=-1, tp=2))


def test_the_message_says_what_works_and_what_it_costs() -> None:
    found = verdicts(family("33b"), tp=4)
    (reason,) = found["vLLM gptq"].reasons
    assert reason == (
        "down_proj: 19200 / 4 = 4800 columns are no multiple of the group size 128 (what works: "
        "group size 64 or 32 at --tp 4, without marlin (down_proj: 19200 / 4 = 4800 columns are no multiple "
        "of 128), or --tp 2 or 1 at group size 128)"
    )
    assert len(found["vLLM gptq_marlin"].reasons) == 2
    # One GPU at a time does not care.
    assert loading(found) == set(READERS) - {"vLLM gptq", "vLLM gptq_marlin"}


def test_heads_are_divided_or_repeated() -> None:
    assert verdicts(family("33b"), tp=3)["vLLM gptq"].reasons == (
        "56 heads cannot be divided among 3 GPUs",
        "8 KV heads can be neither divided among 3 GPUs nor repeated evenly",
    )
    assert verdicts(family("6.7b"), tp=128)["vLLM gptq_marlin"].reasons == (
        "32 heads cannot be divided among 128 GPUs",
    )
    # More GPUs than KV heads: each is repeated, and 128 rows stay whole.
    assert "vLLM gptq" in loading(verdicts(family("5.7bmqa"), tp=2))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, {"auto-gptq", "GPTQModel torch", "GPTQModel triton", "transformers", "vLLM gptq"}),
        (3, {"auto-gptq", "GPTQModel torch", "transformers", "vLLM gptq"}),
        (8, set(READERS) - {"GPTQModel torch_fused", "GPTQModel exllamav2", "exllamav2"}),
    ],
)
def test_other_widths_have_fewer_readers(bits: int, expected: set[str]) -> None:
    found = verdicts(family("6.7b"), bits)
    assert loading(found) == expected
    assert found["exllamav2"].reasons == (
        f"{bits} bits; it takes every GPTQ folder for 4 bits: wrong weights",
    )
    assert limit_faults(family("6.7b"), bits, 128) == []


def test_transformers_names_the_kernels_that_are_left() -> None:
    assert verdicts(family("6.7b"), 3)["transformers"].kernel_note.endswith("GPTQModel: torch")
    assert verdicts(family("6.7b"), 8, 32)["transformers"].kernel_note.endswith("torch, triton, marlin")


def test_asymmetric_grids_lose_marlin() -> None:
    found = verdicts(family("6.7b"), sym=False)
    lost = set(READERS) - loading(found)
    assert lost == {"GPTQModel torch_fused", "GPTQModel marlin", "vLLM gptq_marlin"}
    assert found["vLLM gptq_marlin"].reasons == ("asymmetric; it takes symmetric grids alone",)
    assert "it ignores zero points: wrong weights" in found["GPTQModel torch_fused"].reasons[0]


def test_large_groups_lose_the_fast_kernels() -> None:
    found = verdicts(family("33b"), group=256)
    assert loading(found) == {
        *("auto-gptq", "GPTQModel torch", "GPTQModel triton", "transformers", "exllamav2", "vLLM gptq")
    }
    assert found["GPTQModel machete"].reasons == ("group size 256; it takes -1, 64 or 128",)


def test_desc_act_is_read_by_all_and_noted_under_tensor_parallelism() -> None:
    found = verdicts(family("6.7b"), desc_act=True, tp=2)
    assert loading(found) == set(READERS)
    assert found["vLLM gptq"].kernel_note.startswith("desc_act under --tp: the slow kernel")
    assert found["vLLM gptq_marlin"].kernel_note.endswith("desc_act repeats all scales per GPU")
    assert verdicts(family("6.7b"), desc_act=True)["vLLM gptq"].kernel_note == "exllama kernel, float16 alone"


def test_tiles_of_small_models() -> None:
    small = replace(family("1.3b"), hidden_size=288, n_heads=9, n_kv_heads=3, head_dim=32)
    found = verdicts(small, group=32)
    assert limit_faults(small, 4, 32) == []
    lost = set(READERS) - loading(found)
    assert lost == {"GPTQModel marlin", "GPTQModel machete", "vLLM gptq_marlin"}
    assert found["GPTQModel marlin"].reasons[0] == (
        "self_attn.q_proj, self_attn.o_proj (288 x 288) is not made of tiles of 64 x 128 or 128 x 64"
    )


def test_exllamav2_wants_a_head_of_its_own() -> None:
    found = verdicts(replace(family("1.3b"), tied_head=True))
    assert found["exllamav2"].reasons == ("the head is tied, and it wants a tensor lm_head.weight",)


def test_what_cannot_be_written_is_said_once_a_shape() -> None:
    assert limit_faults(family("1.3b"), 4, 256) == [
        "mlp.down_proj (2048 x 5504): 5504 columns are no multiple of the group size 256"
    ]
    odd = replace(family("1.3b"), intermediate_size=5512)
    gate = "mlp.gate_proj, mlp.up_proj (5512 x 2048)"
    assert limit_faults(odd, 4, 64) == [
        f"{gate}: 5512 rows are no multiple of 32, by which zero points are packed",
        "mlp.down_proj (2048 x 5512): 5512 columns are no multiple of the group size 64",
        "mlp.down_proj (2048 x 5512): 5512 columns are no multiple of 32, by which codes are packed",
    ]


def test_unknown_settings_list_the_known_ones() -> None:
    assert limit_faults(family("6.7b"), 5, 96) == [
        "5 bits: no reader knows the width; expected 2, 3, 4 or 8",
        "group size 96: GPTQModel takes none but -1, 16, 32, 64, 128, 256, 512 or 1024",
        *(
            f"{names}: {k} columns are no multiple of the group size 96"
            for names, k in (
                (
                    "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj (4096 x 4096)",
                    4096,
                ),
                ("mlp.gate_proj, mlp.up_proj (11008 x 4096)", 4096),
                ("mlp.down_proj (4096 x 11008)", 11008),
            )
        ),
    ]


def test_rows_of_the_table() -> None:
    rows = verdict_rows(reader_verdicts(family("6.7b"), 3, 128, True, False, 1))
    assert [row[0] for row in rows] == list(READERS)
    assert rows[1] == ("GPTQModel torch", "loads", "any device, slow")
    assert rows[4] == ("GPTQModel exllamav2", "no", "3 bits; it takes 4")
