"""Places of a slice in a file: written, read back, spelt and parsed."""

import os
from pathlib import Path

import pytest

from converters.disk import PartialFile
from converters.places import Place, parse_place, read_places

STRIPE, RUN = Place(3, 2, 4, 5), Place(30, 7)


def test_a_stripe_goes_where_it_belongs_and_comes_back(tmp_path: Path) -> None:
    file, data = PartialFile(tmp_path / "a", 40), bytes(range(1, 16))
    file.scatter((STRIPE, RUN), memoryview(data))
    file.flush()
    file.rename()
    content = (tmp_path / "a").read_bytes()
    expected = bytearray(40)
    for i in range(4):
        expected[3 + 5 * i : 5 + 5 * i] = data[2 * i : 2 * i + 2]
    expected[30:37] = data[8:]
    assert content == bytes(expected)
    opened = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        assert read_places(opened, (STRIPE, RUN), 40) == bytearray(data)
        assert read_places(opened, (Place(36, 5),), 40) is None
        assert read_places(opened, (Place(30, 2, 10**12, 1),), 40) is None
        assert read_places(opened, (RUN,), 10**6) == bytearray(data[8:])
        assert read_places(opened, (Place(36, 5),), 10**6) is None  # shorter than was said
    finally:
        os.close(opened)


@pytest.mark.parametrize("place", [STRIPE, RUN, Place(0, 1)])
def test_a_place_can_be_spelt(place: Place) -> None:
    assert parse_place(str(place)) == place


@pytest.mark.parametrize("text", ["", "4", "4:", "-1:4", "1:2:3", "1:2:3:4:5", f"{10**15}:1", "x:1"])
def test_what_is_no_place_is_none(text: str) -> None:
    assert parse_place(text) is None
