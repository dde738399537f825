"""The ratios of a record, and the record as a plain value."""

import dataclasses
import math

import pytest

from adabatch.diagnostics import Record
from adabatch.diagnostics.record import FIELDS, noise_scale, snr

ROW = tuple(
    {"int": 3, "int | None": None, "float": 0.5, "bool": True, "str": ""}[kind]
    for kind in FIELDS.values()
)  # in the order of the fields


def test_record_is_frozen_and_slotted():
    record = Record(*ROW)
    assert dataclasses.astuple(record) == (*ROW, {})
    assert not hasattr(record, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.loss = 1.0


@pytest.mark.parametrize(("low", "high", "text"), [
    (2.0, 8.0, "noise scale 3 (2 to 8)"), (2.0, math.inf, "noise scale 3 (above 2)"),
    (0.0, math.inf, "noise scale 3)"), (math.inf, math.inf, "noise scale 3)")])
def test_the_repr_shows_intervals_that_say_something_and_no_loss_that_is_not_known(low, high, text):
    record = dataclasses.replace(Record(*ROW), noise_scale_ema=3.0, noise_scale_low=low,
                                 noise_scale_high=high, loss_ema=math.nan)
    assert text in repr(record)
    assert "loss" not in repr(record)


@pytest.mark.parametrize(
    ("trace", "signal", "expected"),
    [
        (6.0, 2.0, 3.0),
        (6.0, 0.0, math.inf),
        (6.0, -1.0, math.inf),
        (-6.0, 2.0, 0.0),
        (math.nan, 1.0, math.nan),
        (1.0, math.nan, math.nan),
    ],
)
def test_noise_scale(trace, signal, expected):
    assert noise_scale(trace, signal) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("trace", "signal", "expected"),
    [
        (4.0, 0.5, 2.0),
        (4.0, -0.5, 0.0),
        (0.0, 0.5, math.inf),
        (-1.0, 0.5, math.inf),
        (0.0, 0.0, math.nan),
        (math.nan, 1.0, math.nan),
    ],
)
def test_snr(trace, signal, expected):
    assert snr(16, trace, signal) == pytest.approx(expected, nan_ok=True)
