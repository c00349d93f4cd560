"""The runtime's session: the C library's answers, and what becomes of its failures."""

import importlib.metadata
import importlib.util
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.pipeline import convert
from converters.plan import ConvertOptions
from converters.runtimes import llama_cpp
from converters.runtimes.llama_cpp import LlamaCpp, Session, Worker, sample
from converters.targets import parse_request
from quantize.errors import RuntimeFailedError, RuntimeMissingError, UsageError
from quantize.metrics import kl_divergence
from quantize.reference import ReferenceModel

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.runtime
needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec(llama_cpp.PACKAGE) is None, reason=f"not installed: {llama_cpp.INSTALL}"
)


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint())


@pytest.fixture
def path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    options = ConvertOptions(tmp_path / "out")
    return convert(checkpoint, [parse_request("gguf:F32")], options)[0].paths[0]


@pytest.fixture
def session(path: Path) -> Iterator[Session]:
    with LlamaCpp().open(path, n_ctx=1100, n_threads=1) as session:
        yield session


@needs_runtime
def test_logits_at_every_position_across_batches(session: Session, checkpoint: Checkpoint) -> None:
    ids = torch.randint(0, 2000, (1100,), generator=torch.Generator().manual_seed(0))
    model = ReferenceModel(checkpoint.config, checkpoint.weights)
    wanted = model.logits(model.hidden([ids])[0])
    batches = list(session.logits(ids.tolist()))
    assert [(start, len(logits)) for start, logits in batches] == [(0, 512), (512, 512), (1024, 76)]
    got = torch.from_numpy(np.concatenate([logits for _, logits in batches]))
    assert kl_divergence(wanted, got).max() < 1e-5


@needs_runtime
def test_rows_do_not_see_each_other(session: Session) -> None:
    [(_, first)] = session.logits([5, 6, 7])
    [(_, other)] = session.logits([900, 901, 902, 903])
    [(_, again)] = session.logits([5, 6, 7])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other[:3])


@needs_runtime
def test_facts_are_those_of_the_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    facts, vocabulary = session.facts, checkpoint.tokenizer.vocabulary
    assert (facts.bos, facts.eos, facts.add_bos) == (vocabulary.bos_id, vocabulary.eos_id, True)
    fim = (vocabulary.fim_prefix, vocabulary.fim_suffix, vocabulary.fim_middle)
    assert (facts.fim_pre, facts.fim_suf, facts.fim_mid) == fim
    assert facts.n_vocab == len(vocabulary.tokens)
    assert facts.rope_scale == 0.25
    assert vocabulary.eos_id in facts.stops


@needs_runtime
def test_token_ids(session: Session, checkpoint: Checkpoint) -> None:
    texts = ["", "def f(x):\n    return 1234\n", "a\x00b", "\U0001f642 你好 ü", "x" * 5000]
    assert session.tokenize(texts) == [checkpoint.tokenizer.encode(text) for text in texts]
    bare = session.tokenize(texts, add_special=False)
    assert bare == [checkpoint.tokenizer.encode(text, add_bos=False) for text in texts]


@needs_runtime
def test_greedy_generation_takes_the_most_likely_token(session: Session, checkpoint: Checkpoint) -> None:
    prompt = checkpoint.tokenizer.encode("def add(a, b):\n")
    generated = list(session.generate(prompt, n_tokens=5))
    for i, token in enumerate(generated):
        [(_, logits)] = session.logits([*prompt, *generated[:i]])
        assert token == logits[-1].argmax()
    assert len(generated) == 5 or logits[-1].argmax() in session.facts.stops


@needs_runtime
def test_sampling_repeats_with_its_seed(session: Session) -> None:
    one, same, other = (
        list(session.generate([3, 4], n_tokens=12, temperature=1.0, seed=s)) for s in (1, 1, 2)
    )
    assert one == same != other


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.3], dtype=np.float32))
    generator = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, 1.0, generator) for _ in range(4000)], minlength=3) / 4000
    assert drawn == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert sample(logits, 0.0, generator) == 0


@needs_runtime
def test_a_truncated_file_is_refused_in_the_librarys_words(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RuntimeFailedError, match="does not load") as error:
        LlamaCpp().open(path, n_ctx=16, n_threads=1)
    assert any("data is not within the file bounds" in reason for reason in error.value.reasons)


@needs_runtime
def test_a_crash_is_an_error_and_not_the_end(session: Session) -> None:
    session._worker.process.send_signal(signal.SIGABRT)
    session._worker.process.wait()
    with pytest.raises(RuntimeFailedError, match="was ended by SIGABRT while it worked on"):
        session.tokenize(["x"])


@needs_runtime
def test_ids_out_of_range_are_refused(session: Session) -> None:
    with pytest.raises(RuntimeFailedError, match="1 ids of 0 to 2303"):
        list(session.logits([2304]))
    assert session.tokenize(["still there"])


@needs_runtime
@pytest.mark.parametrize("field", ["n_ctx", "n_batch"])
def test_a_library_with_another_struct_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    # The guard is asked by a worker that puts its parameters where another version has something else.
    worker = llama_cpp._WORKER.read_text("utf-8")
    slot = {"n_ctx": "parameters.u32[0]", "n_batch": "parameters.u32[1]"}[field]
    assert slot in worker
    shifted = tmp_path / "worker.py"
    shifted.write_text(worker.replace(slot, "parameters.u32[200]"), "utf-8")
    monkeypatch.setattr(llama_cpp, "_WORKER", shifted)
    with pytest.raises(RuntimeFailedError, match="llama_context_params are laid out otherwise: asked for"):
        LlamaCpp().open(path, n_ctx=600, n_threads=1)


def test_a_library_that_is_no_libllama_is_refused() -> None:
    standard_library = Path(next(iter(Path("/lib").glob("*/libm.so.6")), "/lib/libm.so.6"))
    if not standard_library.exists():
        pytest.skip("no libm.so.6 to try")
    with pytest.raises(
        UsageError, match=r"--llama-lib .* is no libllama, or one of another age: it lacks llama_"
    ):
        LlamaCpp(standard_library).check()


def test_a_named_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--llama-lib .*: no such file"):
        LlamaCpp(tmp_path / "libllama.so")


@needs_runtime
def test_the_installed_library_is_loaded_without_a_model() -> None:
    LlamaCpp().check()


def test_a_wheel_that_does_not_load_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "xllamacpp.abi3.so"
    broken.write_text("no library")
    runtime = LlamaCpp(broken)
    monkeypatch.setattr(runtime, "_named", False)
    with pytest.raises(RuntimeFailedError, match="the library does not load") as error:
        runtime.check()
    assert error.value.hint == f"{llama_cpp.INSTALL} --force-reinstall"


def test_a_system_that_starts_no_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", no_process)
    with pytest.raises(RuntimeFailedError, match=r"cannot be started: .*temporarily unavailable"):
        Worker("llama.cpp")


def test_without_the_package_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(RuntimeMissingError) as error:
        LlamaCpp()
    assert error.value.hint == llama_cpp.INSTALL


def test_the_install_line_names_the_extras_pin() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (requirement,) = extras["llama"]
    assert f"pip install {requirement}" == llama_cpp.INSTALL


@needs_runtime
def test_the_wheel_is_the_pinned_one() -> None:
    assert importlib.metadata.version(llama_cpp.PACKAGE) == llama_cpp.VERSION
