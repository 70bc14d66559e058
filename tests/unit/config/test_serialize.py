from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.serialize import from_json, to_json
from nemotron3_megatron.config.typed import UNSET

RECIPE, ORIGINS = compose(["recipe=tiny"])
RUN = resolve(RECIPE, 2, ORIGINS)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
st.register_type_strategy(float, NUMBERS)
# Not the mark of a value that is missing.
st.register_type_strategy(str, st.text().filter(lambda text: text != UNSET))
st.register_type_strategy(Path, st.text("abc/._ é", min_size=1).map(Path))
st.register_type_strategy(
    Duration, st.builds(Duration, st.floats(0, 1e18), st.sampled_from(["tokens", "steps", "seconds"]))
)


def replaced(value: Any, data: st.DataObject) -> Any:
    """A copy of a dataclass in which every plain field has another value of its type."""
    from typing import get_type_hints

    hints = get_type_hints(type(value))
    changes = {}
    for item in dataclasses.fields(value):
        current = getattr(value, item.name)
        nested = dataclasses.is_dataclass(current) and not isinstance(current, Duration)
        changes[item.name] = replaced(current, data) if nested else data.draw(st.from_type(hints[item.name]))
    return dataclasses.replace(value, **changes)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_round_trip_is_exact(data: st.DataObject) -> None:
    run = replaced(RUN, data)
    again = from_json(to_json(run))
    assert again == run
    assert to_json(again) == to_json(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 3}', to_json(RUN).replace('"seed"', '"sed"')])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        from_json(text)


def test_types_survive() -> None:
    again = from_json(to_json(RUN))
    assert isinstance(again, Run)
    assert isinstance(again.run_dir, Path)
    assert isinstance(again.stages, tuple)
    assert isinstance(again.optimizer.lr_warmup, Duration)
