"""``debug.fault``: what is read, and what is refused."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.fault import Fault, IllegalFaultError, parse_faults
from nemotron3_megatron.config.run import Run

ALLOW = "debug.allow_faults=true"


def resolved(*overrides: str) -> Run:
    recipe, origins = compose(["recipe=tiny", *overrides])
    return resolve(recipe, 2, origins)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ()),
        ("kill:rank=1,step=20", (Fault(kind="kill", rank=1, step=20),)),
        ("hang", (Fault(kind="hang"),)),
        (
            "slow:rank=1,step=3,steps=5,seconds=0.5; nan:step=4,times=0",
            (Fault(kind="slow", rank=1, step=3, steps=5, seconds=0.5), Fault(kind="nan", step=4, times=0)),
        ),
    ],
)
def test_what_is_read(text: str, faults: tuple[Fault, ...]) -> None:
    assert parse_faults(text) == faults


@pytest.mark.parametrize("text", ["explode", "kill:rnk=1", "kill:rank=one", "kill:rank=-1", "kill:step=0", "kill:rank"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(IllegalFaultError):
        parse_faults(text)


def test_when_it_is_due() -> None:
    fault = Fault(kind="slow", step=3, steps=2)
    assert [step for step in range(1, 8) if fault.due(step)] == [3, 4]


@pytest.mark.parametrize("quoted", ["debug.fault=kill:rank=1,step=20", "debug.fault='kill:rank=1,step=20'"])
def test_the_command_line_needs_no_quotes(quoted: str) -> None:
    """Hydra alone would take the comma for a sweep and the second ``=`` for an error."""
    run = resolved(quoted, ALLOW)
    assert run.debug.fault == "kill:rank=1,step=20"


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (("debug.fault=kill:rank=1,step=20",), "allow_faults"),
        (("debug.fault=kil", ALLOW), "is none of"),
        (("debug.fault=kill:rank=2", ALLOW), "world of 2"),
        (("resilience.spike=rollback", "checkpoint.every=null"), "checkpoint.every"),
        (("resilience.non_finite=rollback", "checkpoint.keep_last=1", "resilience.rollback_checkpoints=2"), "kept"),
        (("resilience.step_timeout_s=0.0",), "positive"),
        (("resilience.spike_window_steps=1",), "median"),
        (("resilience.straggler_factor=1.0",), "above 1"),
        (("telemetry.health_every=0 steps",), "health_every"),
    ],
)
def test_recipes_that_are_refused(overrides: tuple[str, ...], word: str) -> None:
    with pytest.raises(UserError, match=word):
        resolved(*overrides)


def test_allowing_faults_alone_is_harmless() -> None:
    assert not resolved(ALLOW).debug.fault
