"""The rows of a corpus: the budget, the kinds, what every row must and must not hold."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters.corpus.build import build_corpus
from converters.corpus.rows import Corpus, CorpusOptions, Shares, ids_digest
from converters.tokenizer import CheckpointTokenizer
from converters.vocabulary import TokenType
from quantize.errors import CorpusError, UsageError
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]
Build = Callable[..., Corpus]


ROOT = Path(__file__).parents[3]
PINNED_IDS = "d5f7d8276904cae3a971daac035f5b558307bfff33eae174061d63b63f3c001e"
REAL_IDS = {
    "base": "1a3cb72fda7a817b39fab73f0a21f7d8623e21c3219c1ec445bf9bf5a9e4dcf7",
    "instruct": "1b924f1ee37efb243c2be9bebf4c6a28be4f71feae0f8961219cd595a244bea0",
}


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A file of 2,000 lines, no two alike: some 8,000 tokens."""
    path = tmp_path / "a.py"
    path.write_text("".join(f"value_{i} = compute({i})\n" for i in range(2000)))
    return path


def test_the_default_corpus_is_pinned(demo_corpus: Corpus) -> None:
    """Equal on every machine: the ids follow from the bundled text and the embedded tokenizer alone."""
    assert demo_corpus.identity["ids_sha256"] == PINNED_IDS == ids_digest(demo_corpus.rows)


def test_another_process_with_another_hash_seed_gives_the_same_rows() -> None:
    code = (
        "from pathlib import Path\n"
        "from converters.config import read_config, read_json\n"
        "from converters.corpus.build import build_corpus\n"
        "from converters.corpus.rows import CorpusOptions\n"
        "from converters.tokenizer import read_tokenizer\n"
        "demo = Path('scripts/demo-coder')\n"
        "config = read_config(read_json(demo / 'config.json'))\n"
        "corpus = build_corpus(read_tokenizer(demo, config.vocab_size), config, CorpusOptions())\n"
        "print(corpus.identity['ids_sha256'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == PINNED_IDS


def test_the_identity_is_complete(demo_corpus: Corpus) -> None:
    identity = json.loads(json.dumps(demo_corpus.identity))
    assert identity["name"] == "built-in" and identity["options"]["seed"] == 0
    assert identity["n_rows"] == len(demo_corpus.rows) == sum(k["rows"] for k in identity["kinds"].values())
    assert (
        identity["n_tokens"] == demo_corpus.n_tokens == sum(k["tokens"] for k in identity["kinds"].values())
    )
    assert all(len(file["sha256"]) == 64 and file["licence"] for file in identity["files"])
    names = {file["name"] for file in identity["files"]}
    assert "conversations.jsonl" in names and len(names) == len(identity["files"]) > 200


def test_the_budget_is_shared_as_asked(demo_corpus: Corpus) -> None:
    budget, kinds = 128 * 2048, demo_corpus.identity["kinds"]
    assert abs(demo_corpus.n_tokens - budget) < 2048
    assert kinds["infill"]["tokens"] == pytest.approx(0.25 * budget, abs=2048)
    assert kinds["chat"]["tokens"] == pytest.approx(0.10 * budget, abs=2048)
    assert kinds["repository"]["tokens"] == pytest.approx(0.15 * budget + 6144, abs=2048)


def test_bos_stands_first_and_only_there(demo_corpus: Corpus, demo: Model) -> None:
    bos = demo[0].vocabulary.bos_id
    assert bos is not None
    for row in demo_corpus.rows:
        assert row.ids.dtype == torch.int64 and row.ids.dim() == 1
        assert (row.ids == bos).nonzero().flatten().tolist() == [0], row.source


def test_nothing_is_padding(demo_corpus: Corpus, demo: Model) -> None:
    v = demo[0].vocabulary
    unused = {i for i, kind in enumerate(v.token_types) if kind is TokenType.UNUSED}
    pad = v.tokens.index("<pad>")
    # The model's pad token is its end of sentence, which closes each infill and stands nowhere else.
    for row in demo_corpus.rows:
        ids = row.ids.tolist()
        assert not unused & set(ids) and pad not in ids
        assert ids.count(v.pad_id) == (row.kind == "infill")
        assert 32 <= len(ids) <= 6144


def test_no_file_is_in_two_rows_of_different_kinds(demo_corpus: Corpus) -> None:
    single = [row for row in demo_corpus.rows if row.kind in ("infill", "completion")]
    infill = {row.source for row in single if row.kind == "infill"}
    assert not infill & {row.source for row in single if row.kind == "completion"}


def test_two_rows_pass_4096_when_the_context_allows(demo_corpus: Corpus) -> None:
    long = [row for row in demo_corpus.rows if len(row.ids) > 4096]
    assert sorted(row.kind for row in long) == ["completion", "repository"]
    assert all(len(row.ids) > 6000 for row in long)


@pytest.mark.parametrize(
    ("context", "options", "note"),
    [
        (4096, {}, "no row passes position 4096: the context has 4096 positions"),
        (16384, {"n_rows": 4}, "no row passes position 4096: too few tokens asked for, it takes 12,288"),
    ],
)
def test_no_long_rows_is_noted(build: Build, context: int, options: dict[str, int], note: str) -> None:
    corpus = build(context=context, **options)
    assert max(len(row.ids) for row in corpus.rows) <= 2048
    assert note in corpus.notes


def test_a_short_context_bounds_the_rows(build: Build) -> None:
    corpus = build(context=256, n_rows=16)
    assert max(len(row.ids) for row in corpus.rows) <= 256
    assert corpus.identity["options"]["length"] == 256


def test_real_tokenizer(real: Model) -> None:
    """One BOS and at most one end in each row; chat for the instruct model only, and long rows."""
    tokenizer, config = real
    corpus = build_corpus(tokenizer, config, CorpusOptions())
    kinds = corpus.identity["kinds"]
    instruct = tokenizer.vocabulary.chat_template is not None
    assert set(kinds) == {"completion", "infill", "repository", *(["chat"] if instruct else [])}
    assert corpus.identity["ids_sha256"] == REAL_IDS["instruct" if instruct else "base"]
    told = "no chat rows: the model has no chat template; their share goes to completion"
    assert (told in corpus.notes) is not instruct
    assert all((row.ids == 32013).nonzero().flatten().tolist() == [0] for row in corpus.rows)
    assert sum(len(row.ids) > 4096 for row in corpus.rows) == 2
    assert abs(corpus.n_tokens - 128 * 2048) < 2048
    for row in corpus.rows:
        assert set(row.ids[row.ids > 32014].tolist()) <= {
            "infill": {32015, 32016, 32017},
            "chat": {32021},
        }.get(row.kind, set())


def test_options_are_refused_all_at_once(build: Build) -> None:
    with pytest.raises(UsageError) as error:
        build(n_rows=0, length=20_000, n_long=1, long_length=4096, shares=Shares(infill=0, chat=-1.0))
    told = "completion 0.5, infill 0, repository 0.15, chat -1, noise 0"
    assert str(error.value).splitlines() == [
        "the calibration rows cannot be made as asked",
        "  - rows: found 0, expected 1 or more",
        "  - length: found 20000, expected 32 to the model's context of 16384",
        "  - long length: found 4096, expected more than 4096",
        f"  - shares: found {told}; expected 0 or more, and some text",
    ]


def test_too_little_text_is_fewer_rows_and_a_note(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(x):\n    return x + 1\n" * 40)
    corpus = build(tmp_path / "a.py")
    assert len(corpus.rows) == 1 and corpus.rows[0].source == "a.py"
    told = f"the text gives {corpus.n_tokens:,} of the 262,144 tokens asked for: fewer rows are used"
    assert told in corpus.notes


def test_noise_is_not_counted_as_text(build: Build, numbered: Path) -> None:
    corpus = build(numbered, n_rows=8, n_long=0, shares=Shares(noise=0.25))
    n_text = sum(len(row.ids) for row in corpus.rows if row.kind != "noise")
    told = f"the text gives {n_text:,} of the {round(8 * 2048 * 0.8):,} tokens asked for: fewer rows are used"
    assert told in corpus.notes


def test_corpora_without_noise_are_called_what_they_were_before_there_was_any(build: Build) -> None:
    without, with_noise = (build(n_rows=2, n_long=0, shares=Shares(noise=n)) for n in (0.0, 0.2))
    assert set(without.identity["options"]["shares"]) == {"completion", "infill", "repository", "chat"}
    assert with_noise.identity["options"]["shares"]["noise"] == 0.2


def test_no_row_at_all_is_an_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(
        CorpusError, match=r"no row can be made of the text: found \d+ tokens, a row has 32 at least"
    ):
        build(tmp_path / "a.py")


def test_a_model_without_marks_gets_no_infill(demo: Model) -> None:
    tokenizer, config = demo
    bare = replace(tokenizer, vocabulary=replace(tokenizer.vocabulary, fim_middle=None))
    corpus = build_corpus(bare, config, CorpusOptions(n_rows=8, n_long=0))
    assert "infill" not in corpus.identity["kinds"]
    assert "no infill rows: the model has no marks for them; their share goes to completion" in corpus.notes


def test_only_one_kind_when_the_other_shares_are_zero(build: Build) -> None:
    corpus = build(n_rows=8, n_long=0, shares=Shares(completion=0, infill=1, repository=0, chat=0))
    assert set(corpus.identity["kinds"]) == {"infill"}
    assert corpus.n_tokens > 7 * 2048


def test_noise_has_its_share_and_no_marks(build: Build, demo: Model) -> None:
    corpus = build(shares=Shares(noise=0.1))
    noise = [row.ids for row in corpus.rows if row.kind == "noise"]
    assert sum(map(len, noise)) == pytest.approx(corpus.n_tokens * 0.1 / 1.1, abs=256)
    assert corpus.n_tokens == pytest.approx(128 * 2048, abs=2304)
    kinds, drawn = demo[0].vocabulary.token_types, torch.cat([ids[1:] for ids in noise])
    assert {len(ids) for ids in noise} == {256} and len({int(ids[0]) for ids in noise}) == 1
    assert {kinds[i] for i in drawn.tolist()} == {TokenType.NORMAL}
    # All of 2,000 tokens come about a dozen times each: a part of the vocabulary alone would show.
    ordinary = sum(kind is TokenType.NORMAL for kind in kinds)
    assert len(set(drawn.tolist())) > 0.99 * ordinary


@pytest.mark.parametrize(("shares", "n_rows"), [(Shares(), 0), (Shares(noise=0.1), 3), (Shares(noise=1), 32)])
def test_noise_is_a_share_of_the_text_that_there_is(
    build: Build, numbered: Path, shares: Shares, n_rows: int
) -> None:
    corpus = build(numbered, n_long=0, shares=shares)
    assert corpus.identity["kinds"].get("noise", {}).get("rows", 0) == n_rows


def test_another_seed_gives_other_rows(build: Build) -> None:
    digests = {build(n_rows=8, seed=seed).identity["ids_sha256"] for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_no_share_for_anything_that_the_model_has_is_an_error(demo: Model) -> None:
    tokenizer, config = demo
    bare = replace(tokenizer, vocabulary=replace(tokenizer.vocabulary, fim_middle=None))
    shares = Shares(completion=0, infill=1, repository=0, chat=0)
    with pytest.raises(CorpusError, match="no row can be made of the text") as error:
        build_corpus(bare, config, CorpusOptions(n_rows=8, n_long=0, shares=shares))
    told = (
        "no infill rows: the model has no marks for them; their share goes to nobody, as completion has none"
    )
    assert error.value.reasons == (told,)


def test_a_small_text_is_used_up(build: Build, demo: Model, numbered: Path) -> None:
    """What an infill's window leaves of a file becomes completion rows, and no line is in two rows."""
    corpus = build(numbered, n_long=0, shares=Shares(repository=0, chat=0))
    assert set(corpus.identity["kinds"]) == {"completion", "infill"}
    assert corpus.identity["kinds"]["completion"]["rows"] >= 2
    told = [re.findall(r"compute\((\d+)\)", demo[0].decode(row.ids.tolist())) for row in corpus.rows]
    numbers = [number for row in told for number in row]
    assert len(numbers) == len(set(numbers)) > 500


def test_no_text_is_in_two_long_rows(
    build: Build, demo: tuple[CheckpointTokenizer, LlamaConfig], tmp_path: Path
) -> None:
    names = [f"{project}{name}" for project in "stuv" for name in "ab"]
    for name in names:
        (tmp_path / name[0]).mkdir(exist_ok=True)
        # A short file and a long one: together they make a long repository row, the long one a row alone.
        lines = (f"int {name}_{number} = {number};" for number in range(60 if name[1] == "a" else 500))
        (tmp_path / name[0] / f"{name}.c").write_text("\n".join(lines))
    corpus = build(*(tmp_path / project for project in "stuv"), n_rows=60, n_long=8)
    texts = [demo[0].decode(row.ids.tolist()) for row in corpus.rows if len(row.ids) > 4096]
    assert {row.kind for row in corpus.rows if len(row.ids) > 4096} == {"repository", "completion"}
    assert max(sum(f"int {name}_50 = 50;" in text for text in texts) for name in names) == 1
