"""`--to exl2:`: what is understood, what is refused, and what a size means in bits."""

from fractions import Fraction

import pytest

from converters.targets import parse_request
from converters.targets.exl2_spec import Exl2Spec, parse_spec
from converters.targets.exl2_types import parse_layout
from quantize.errors import UsageError
from quantize.layouts import ATTENTION, DOWN, GATE_UP, HEAD


@pytest.mark.parametrize(
    ("text", "spec", "spelling", "folder"),
    [
        ("4.25", Exl2Spec(Fraction("4.25")), "4.25", "exl2-4.25"),
        ("6.0", Exl2Spec(Fraction(6)), "6", "exl2-6"),
        (" 2.3 , H8 ", Exl2Spec(Fraction("2.3"), 8), "2.3,h8", "exl2-2.3-h8"),
        ("8,h6", Exl2Spec(Fraction(8)), "8", "exl2-8"),
        ("FIT = 24 GiB", Exl2Spec(None, fit="24GiB"), "fit=24GiB", "exl2-fit-24GiB"),
        ("fit=12.5GB, h8", Exl2Spec(None, 8, "12.5GB"), "fit=12.5GB,h8", "exl2-fit-12.5GB-h8"),
    ],
)
def test_a_size_has_one_spelling(text: str, spec: Exl2Spec, spelling: str, folder: str) -> None:
    assert parse_spec(text) == spec
    assert (str(spec), spec.directory) == (spelling, folder)
    assert str(parse_request(f"EXL2:{text}")) == f"exl2:{spelling}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2.2", "expected bits per weight, 2.3 to 8"),
        ("8.01", "expected bits per weight"),
        ("4bit", "expected bits per weight"),
        ("", "expected bits per weight"),
        ("nan", "expected bits per weight"),
        ("4.25,h7", "unknown 'h7'"),
        ("4.25,h6,h8", "the head's bits are said 2 times"),
    ],
)
def test_other_sizes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec(text)


def test_every_layouts_name_is_the_layout() -> None:
    for layout in {*ATTENTION, *GATE_UP, *DOWN, *HEAD.values()}:
        for n_inputs in (32, 256, 5504, 19200):
            assert parse_layout(layout.name).groups(n_inputs) == layout.groups(n_inputs)
