"""The embedded and the real tokenizers, and a maker of corpora from them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from converters.config import read_config, read_json
from converters.corpus.build import build_corpus
from converters.corpus.rows import Corpus, CorpusOptions
from converters.tokenizer import CheckpointTokenizer, read_tokenizer
from quantize.llama import LlamaConfig

Model = tuple[CheckpointTokenizer, LlamaConfig]
Build = Callable[..., Corpus]


def read_model(folder: Path) -> Model:
    """The tokenizer and the config of a checkpoint folder."""
    config = read_config(read_json(folder / "config.json"))
    return read_tokenizer(folder, config.vocab_size), config


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> Model:
    """The embedded model, which has a chat template."""
    return read_model(demo_folder)


@pytest.fixture(scope="session", params=["base", "instruct"])
def real(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The family's real tokenizer; base models have no chat template."""
    folder, family = tmp_path_factory.mktemp(request.param), shared / "deepseek-coder"
    shutil.copy(family / "tokenizer.json", folder)
    for name in ("tokenizer_config", "generation_config"):
        shutil.copy(family / f"{name}.{request.param}.json", folder / f"{name}.json")
    shutil.copy(family / f"config.1.3b-{request.param}.json", folder / "config.json")
    return read_model(folder)


@pytest.fixture(scope="session")
def demo_corpus(demo: Model) -> Corpus:
    """The default corpus of the embedded model."""
    return build_corpus(*demo, CorpusOptions())


@pytest.fixture
def build(demo: Model) -> Build:
    """Return `build(*sources, context=None, **options)` for the embedded model."""

    def call(*sources: Path | str, context: int | None = None, **options: object) -> Corpus:
        tokenizer, config = demo
        if context is not None:
            config = replace(config, context_length=context)
        names = tuple(map(str, sources)) or None
        return build_corpus(tokenizer, config, CorpusOptions(sources=names, **options))  # type: ignore[arg-type]

    return call
