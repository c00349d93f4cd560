"""The small files of a Hugging Face folder, as transformers 4 and 5 read them.

transformers 5 is at hand; set DSCQ_GPTQ_READERS to a folder with autogptq/bin/python, a Python with
transformers 4, to run the same checks there.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.config import read_config, read_json
from converters.hf_folder import folder_files, hf_faults
from converters.hf_tokenizer import tokenizer_json
from converters.probe_strings import BYTE_LETTERS, probe_strings
from converters.tokenizer import CheckpointTokenizer, read_tokenizer, tokenizer_from_vocabulary
from converters.vocabulary import TokenType
from quantize.reference import rotary_tables

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READER = HERE / "hf_reader.py"
POSITIONS = (0, 1, 100, 4097)
QUANTIZATION = {
    **{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    **{"format": "gptq", "checkpoint_format": "gptq"},
}
MESSAGES = [
    {"role": "user", "content": "Sort a list.\n\tFührer"},
    {"role": "assistant", "content": "sorted(x)"},
    {"role": "user", "content": "Backwards."},
]


def code_lines() -> list[str]:
    """Lines of this program's own sources, some alone and some joined, with tabs and other letters."""
    lines = [
        line for path in sorted(HERE.glob("test_[a-h]*.py")) for line in path.read_text("utf-8").split("\n")
    ]
    pieces = ["\n".join(lines[i : i + 3]) for i in range(0, len(lines), 23)]
    tabbed = [piece.replace("    ", "\t") for piece in pieces[::4]]
    return [*pieces[:300], *tabbed, *BYTE_LETTERS, "中文注释 # 한국어\r\n", "  \n\n\t  x", "ü" * 3]


TEXTS = [*probe_strings(), *code_lines()]


def real_tokenizer(shared: Path, folder: Path, kind: str) -> CheckpointTokenizer:
    real = shared / "deepseek-coder"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(real / "tokenizer.json")
    for name in ("tokenizer_config", "generation_config"):
        (folder / f"{name}.json").symlink_to(real / f"{name}.{kind}.json")
    (folder / "config.json").symlink_to(real / f"config.33b-{kind}.json")
    return read_tokenizer(folder, 32256)


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Checkpoint:
    return open_checkpoint(demo_folder)


@pytest.fixture(scope="module")
def checkpoints(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The embedded model, itself and as if from a GGUF; the real family where its files are at hand."""
    rebuilt = tokenizer_from_vocabulary(demo.tokenizer.vocabulary)
    made = {"demo": demo, "demo-from-gguf": replace(demo, tokenizer=rebuilt)}
    shared = Path(os.environ.get("DSCQ_SHARED", ROOT.parent / "shared")).resolve()
    if (shared / "deepseek-coder").is_dir():
        home = tmp_path_factory.mktemp("sources")
        for kind in ("base", "instruct"):
            config = read_config(read_json(shared / "deepseek-coder" / f"config.33b-{kind}.json"))
            made[kind] = replace(demo, config=config, tokenizer=real_tokenizer(shared, home / kind, kind))
    return made


@pytest.fixture(params=("demo", "demo-from-gguf", "base", "instruct"))
def kind(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> str:
    if request.param not in checkpoints:
        pytest.skip("DSCQ_SHARED: no folder with the family's real files")
    return str(request.param)


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("folders")
    for kind, checkpoint in checkpoints.items():
        (home / kind).mkdir()
        for name, content in folder_files(checkpoint, QUANTIZATION).items():
            (home / kind / name).write_bytes(content)
    return {kind: home / kind for kind in checkpoints}


def _python(version: int) -> str:
    if version == 5:
        return sys.executable
    readers = os.environ.get("DSCQ_GPTQ_READERS")
    if readers is None:
        pytest.skip("DSCQ_GPTQ_READERS: not set; needs a folder with autogptq/bin/python")
    return str(Path(readers) / "autogptq" / "bin" / "python")


@pytest.fixture(scope="module", params=[5, 4], ids=["transformers5", "transformers4"])
def answers(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[str, Any]:
    """What one version of transformers reads, by folder."""
    asked = {"folders": list(map(str, folders.values())), "texts": TEXTS, "messages": MESSAGES}
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [_python(request.param), READER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = dict(zip(folders, json.loads(done.stdout), strict=True))
    assert all(answer["version"].startswith(f"{request.param}.") for answer in read.values())
    return read


def test_every_text_gets_the_checkpoints_ids(
    answers: dict[str, Any], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    tokenizer = checkpoints[kind].tokenizer
    expected = [tokenizer.encode(text) for text in TEXTS]
    wrong = [
        text for text, ids, right in zip(TEXTS, answers[kind]["ids"], expected, strict=True) if ids != right
    ]
    assert wrong == []
    assert answers[kind]["plain_ids"] == [ids[1:] for ids in expected]
    assert {ids[0] for ids in answers[kind]["ids"]} == {tokenizer.vocabulary.bos_id}
    assert answers[kind]["pair"] == [*tokenizer.encode("a"), *tokenizer.encode("b")]


def test_the_texts_hold_the_traps(checkpoints: dict[str, Checkpoint]) -> None:
    v = checkpoints["demo"].tokenizer.vocabulary
    seen = {i for text in TEXTS for i in checkpoints["demo"].tokenizer.encode(text)}
    assert {
        i for i, type_ in enumerate(v.token_types) if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED)
    } <= seen
    assert sum("\t" in text for text in TEXTS) > 20


def test_a_chat_begins_with_one_bos(
    answers: dict[str, Any], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    tokenizer = checkpoints[kind].tokenizer
    chat, bos = answers[kind]["chat"], tokenizer.vocabulary.bos_id
    if kind == "base":
        assert chat is None
        return
    assert chat["text"].startswith(tokenizer.vocabulary.tokens[bos or 0])
    assert chat["ids"] == tokenizer.encode(chat["text"], add_bos=False)
    assert chat["ids"].count(bos) == 1
    assert chat["text_ids"] == chat["ids"]
    # The one way to get it twice, as with the model's own files.
    assert chat["text_ids_with_bos"] == [bos, *chat["ids"]]


def test_positions_turn_as_in_the_reference(
    answers: dict[str, Any], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    config = checkpoints[kind].config
    assert (config.rope_theta, config.rope_factor) == (100000.0, 4.0)
    tables = rotary_tables(config, max(POSITIONS) + 1, torch.device("cpu"))
    for name, table in zip(("cos", "sin"), tables, strict=True):
        found = torch.tensor(answers[kind][name])
        assert found.shape == (len(POSITIONS), config.head_dim)
        # An f32 angle of a thousand radians is known to about 1e-4.
        assert (found - table[list(POSITIONS)]).abs().max() < 5e-4


def test_sizes_and_types_arrive(
    answers: dict[str, Any], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    config, found = checkpoints[kind].config, answers[kind]["config"]
    assert answers[kind]["dtype"] == "torch.float16"
    assert found["hidden_size"] == config.hidden_size
    assert found["intermediate_size"] == config.intermediate_size
    assert found["num_hidden_layers"] == config.n_layers
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == (config.n_heads, config.n_kv_heads)
    assert (found["head_dim"], found["vocab_size"]) == (config.head_dim, config.vocab_size)
    assert found["max_position_embeddings"] == config.context_length
    assert found["rms_norm_eps"] == config.rms_norm_eps
    assert found["tie_word_embeddings"] is config.tied_head


def test_the_roles_arrive(answers: dict[str, Any], checkpoints: dict[str, Checkpoint], kind: str) -> None:
    v, found = checkpoints[kind].tokenizer.vocabulary, answers[kind]
    assert found["roles"] == [v.bos_id, v.eos_id, v.pad_id]
    assert found["eos"] == (v.eos_id if v.eot_id is None else [v.eos_id, v.eot_id])
    assert [found["config"][f"{role}_token_id"] for role in ("bos", "eos")] == [v.bos_id, v.eos_id]


def test_dscq_reads_its_own_tokenizer_back(
    folders: dict[str, Path], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    before = checkpoints[kind].tokenizer
    after = read_tokenizer(folders[kind], checkpoints[kind].config.vocab_size)
    assert after.vocabulary == before.vocabulary


def test_dscq_reads_its_own_config_back(
    folders: dict[str, Path], checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    content = read_json(folders[kind] / "config.json")
    assert content.pop("quantization_config") == QUANTIZATION
    assert read_config(content) == checkpoints[kind].config


def test_the_rope_has_the_one_spelling_that_all_read(folders: dict[str, Path]) -> None:
    content = read_json(folders["demo"] / "config.json")
    assert content["rope_theta"] == 100000
    assert content["rope_scaling"] == {"factor": 4.0, "type": "linear"}
    assert "rope_parameters" not in content


def test_a_model_without_scaling_says_none(demo: Checkpoint) -> None:
    plain = replace(demo, config=replace(demo.config, rope_factor=1.0, rope_theta=10000.0))
    content = json.loads(folder_files(plain, QUANTIZATION)["config.json"])
    assert content["rope_theta"] == 10000
    assert "rope_scaling" not in content


def test_completion_leaves_one_stop_token(demo_folder: Path) -> None:
    files = folder_files(open_checkpoint(demo_folder, eos="completion"), QUANTIZATION)
    generation, config = (json.loads(files[f"{name}.json"]) for name in ("generation_config", "config"))
    assert generation["eos_token_id"] == config["eos_token_id"] == 2214
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<｜end▁of▁sentence｜>"


def test_sampling_settings_survive_and_bookkeeping_does_not(demo: Checkpoint) -> None:
    stated = {"temperature": 0.6, "do_sample": True, "_from_model_config": True, "eos_token_id": 7}
    tokenizer = replace(demo.tokenizer, generation=stated | {"transformers_version": "4.1"})
    content = json.loads(folder_files(replace(demo, tokenizer=tokenizer), {})["generation_config.json"])
    roles = {"bos_token_id": 2213, "eos_token_id": [2221, 2214], "pad_token_id": 2214}
    assert content == {"temperature": 0.6, "do_sample": True} | roles


def test_the_same_checkpoint_gives_the_same_bytes(demo: Checkpoint, demo_folder: Path) -> None:
    files = folder_files(demo, QUANTIZATION)
    assert files == folder_files(open_checkpoint(demo_folder), QUANTIZATION)
    assert not any(str(demo_folder).encode() in content for content in files.values())


def test_licence_and_card_travel(demo: Checkpoint, demo_folder: Path) -> None:
    files = folder_files(demo, {"quant_method": "exl2"})
    for name in ("LICENSE", "README.md"):
        assert files[name] == (demo_folder / name).read_bytes()
    assert set(files) == {
        *("LICENSE", "README.md", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_autogptq_finds_its_own_file(demo: Checkpoint) -> None:
    files = folder_files(demo, QUANTIZATION)
    assert json.loads(files["quantize_config.json"]) == QUANTIZATION


def test_a_rule_for_eos_is_written_as_well(demo: Checkpoint) -> None:
    v = replace(demo.tokenizer.vocabulary, add_eos=True)
    tokenizer = replace(demo.tokenizer, vocabulary=v)
    again = replace(tokenizer, json_text=tokenizer_json(tokenizer))
    assert tokenizer_json(again) == tokenizer_json(tokenizer)
    found = again.running.encode("x y").ids
    assert found == tokenizer.encode("x y")
    assert (found[0], found[-1]) == (2213, 2221)


def test_no_rule_is_no_template(demo: Checkpoint) -> None:
    silent = replace(demo.tokenizer, vocabulary=replace(demo.tokenizer.vocabulary, add_bos=False))
    assert "TemplateProcessing" not in tokenizer_json(silent)
    assert hf_faults(replace(demo, tokenizer=silent)) == []


def test_nothing_stands_against_the_family(checkpoints: dict[str, Checkpoint], kind: str) -> None:
    assert hf_faults(checkpoints[kind]) == []


def test_faults_are_told(demo: Checkpoint) -> None:
    v = demo.tokenizer.vocabulary
    mute = replace(demo, tokenizer=replace(demo.tokenizer, vocabulary=replace(v, eos_id=None)))
    assert hf_faults(mute) == [
        "the tokenizer names no EOS token; generation from the folder would never stop"
    ]
