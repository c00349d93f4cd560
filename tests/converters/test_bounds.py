"""The table of bounds covers what can be written, and a coarser type never has a tighter bound."""

import pytest

from converters.bounds import BOUNDS, PREDICTION_FACTOR, bound_of, file_bound
from quantize.codecs import CODECS
from quantize.errors import UsageError


@pytest.mark.parametrize("quant", [name for name, kind in CODECS.items() if kind.writable])
def test_every_type_that_can_be_written_has_bounds(quant: str) -> None:
    assert quant in BOUNDS


def test_a_file_has_the_bounds_of_its_coarsest_type() -> None:
    mixed = file_bound(["F16", "Q8_0", "Q4_K", "Q6_K"])
    assert mixed.weights_kl == BOUNDS["Q4_K"].weights_kl
    assert mixed.activations_kl == max(BOUNDS[q].activations_kl for q in ("F16", "Q8_0", "Q4_K", "Q6_K"))
    assert mixed.runtime_kl == mixed.weights_kl


def test_bounds_stay_below_what_is_plainly_wrong() -> None:
    for row in BOUNDS.values():
        assert row.relative_error < 2**0.5
        assert row.weights_kl < 9


def test_a_prediction_replaces_the_tables_bound() -> None:
    assert file_bound(["Q4_K"], predicted_kl=0.02).weights_kl == pytest.approx(PREDICTION_FACTOR * 0.02)


def test_a_type_without_bounds_lists_those_with() -> None:
    with pytest.raises(UsageError, match="no bounds for quant type 'Q9_Z'") as error:
        bound_of("Q9_Z")
    assert "Q8_0" in error.value.hint
