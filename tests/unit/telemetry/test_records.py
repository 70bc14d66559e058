"""Records survive JSON bit for bit, and JSON stays strict."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.telemetry import EvalRecord, StepRecord

_numbers = st.floats(allow_nan=False, allow_infinity=False)
_steps = st.builds(
    StepRecord,
    step=st.integers(1),
    tokens=st.integers(1),
    stage=st.text(),
    loss=_numbers,
    mtp_losses=st.lists(_numbers, max_size=3).map(tuple),
    grad_norm=_numbers,
    lr=_numbers,
    tokens_per_s=_numbers,
    step_time_s=_numbers,
    skipped=st.booleans(),
    skip_reason=st.text(),
    peak_memory_gib=st.none() | _numbers,
)
_evals = st.builds(
    EvalRecord,
    step=st.integers(1),
    tokens=st.integers(1),
    stage=st.text(),
    validation_loss=_numbers,
    mtp_losses=st.lists(_numbers, max_size=3).map(tuple),
)


@given(_steps)
def test_a_step_reads_back_to_the_same_bits(record: StepRecord) -> None:
    assert StepRecord.from_json(record.to_json()) == record
    assert "\n" not in record.to_json()


@given(_evals)
def test_an_evaluation_reads_back_to_the_same_bits(record: EvalRecord) -> None:
    assert EvalRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_json_cannot_hold_are_null(bad: float) -> None:
    record = EvalRecord(step=1, tokens=2, stage="a", validation_loss=bad, mtp_losses=(bad, 1.0))
    text = record.to_json()

    assert json.loads(text, parse_constant=pytest.fail)["validation_loss"] is None
    again = EvalRecord.from_json(text)
    assert math.isnan(again.validation_loss)
    assert math.isnan(again.mtp_losses[0])
    assert again.mtp_losses[1] == 1.0


def test_a_newer_version_s_keys_are_passed_over() -> None:
    record = EvalRecord(step=1, tokens=2, stage="a", validation_loss=1.5)
    assert EvalRecord.from_json(json.dumps({**json.loads(record.to_json()), "novel": 1})) == record


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"step": 1}', "3"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        StepRecord.from_json(text)
