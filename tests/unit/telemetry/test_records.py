"""Records survive JSON bit for bit, and JSON stays strict."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.records import TagLoss

_numbers = st.floats(allow_nan=False, allow_infinity=False)
_operands = st.builds(
    OperandRecord,
    layer=st.none() | st.integers(0),
    **{name: st.text() for name in ("module", "role", "tensor", "direction", "format")},
    **{name: _numbers for name in ("flush_to_zero", "saturation", "relative_error", "amax")},
    **{name: _numbers for name in ("scale_min", "scale_max", "scale_zero", "scale_subnormal")},
)
_tags = st.dictionaries(st.text(), st.builds(TagLoss, loss=_numbers, tokens=st.integers(1)), max_size=3)
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
    precision=st.lists(_operands, max_size=3).map(tuple),
    tags=_tags,
)
_evals = st.builds(
    EvalRecord,
    step=st.integers(1),
    tokens=st.integers(1),
    stage=st.text(),
    validation_loss=_numbers,
    mtp_losses=st.lists(_numbers, max_size=3).map(tuple),
    tags=_tags,
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


def test_operands_stand_in_the_object_of_their_step_only(
    step: Callable[..., StepRecord], operands: tuple[OperandRecord, ...]
) -> None:
    assert "precision" not in json.loads(step(1).to_json())
    found = json.loads(step(1, precision=operands).to_json())["precision"]
    assert [operand["flush_to_zero"] for operand in found] == [0.0, 0.1, 0.05, 0.3, 0.0]
    assert found[4]["layer"] is None


def test_operands_that_are_not_finite_are_null(
    step: Callable[..., StepRecord], operands: tuple[OperandRecord, ...]
) -> None:
    bad = dataclasses.replace(operands[4], amax=math.inf, scale_min=math.nan)
    text = step(1, precision=(bad,)).to_json()

    (found,) = json.loads(text, parse_constant=pytest.fail)["precision"]
    assert (found["amax"], found["scale_min"], found["scale_max"]) == (None, None, 448.0)
    (again,) = StepRecord.from_json(text).precision
    assert math.isnan(again.amax)
    assert math.isnan(again.scale_min)
    assert again.layer is None


def test_tags_stand_by_name_and_are_left_out_where_there_are_none(step: Callable[..., StepRecord]) -> None:
    assert "tags" not in json.loads(step(1).to_json())
    text = step(1, tags={"code": TagLoss(1.5, 7), "web": TagLoss(math.inf, 9)}).to_json()
    found = json.loads(text, parse_constant=pytest.fail)["tags"]
    assert found == {"code": {"loss": 1.5, "tokens": 7}, "web": {"loss": None, "tokens": 9}}
    again = StepRecord.from_json(text).tags
    assert again["code"] == TagLoss(1.5, 7)
    assert math.isnan(again["web"].loss)


def test_a_newer_version_s_keys_are_passed_over() -> None:
    record = EvalRecord(step=1, tokens=2, stage="a", validation_loss=1.5)
    assert EvalRecord.from_json(json.dumps({**json.loads(record.to_json()), "novel": 1})) == record


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"step": 1}', "3"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        StepRecord.from_json(text)
