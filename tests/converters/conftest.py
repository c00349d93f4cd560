"""Fixtures of the converters' tests that take time to make."""

from pathlib import Path

import pytest

from tests.converters.exl2_model import Model, make_model


@pytest.fixture(scope="session")
def model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The embedded model's first block with its archive and its measurement. Read it, never write to it."""
    return make_model(demo_folder, tmp_path_factory.mktemp("exl2"))
