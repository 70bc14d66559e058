"""Which checkpoints stay."""

from __future__ import annotations

import math

import pytest

from nemotron3_megatron.checkpoint.retention import Retention, Saved, kept, retention_of
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError

RUN = [Saved(step, step * 100, loss) for step, loss in [(1, 9.0), (2, 3.0), (3, None), (4, 5.0), (5, 3.0), (6, 8.0)]]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (Retention(), {1, 2, 3, 4, 5, 6}),
        (Retention(keep_every=Duration(300, "tokens")), {1, 2, 3, 4, 5, 6}),  # keep_last=None keeps all
        (Retention(2), {5, 6}),
        (Retention(0), {6}),
        (Retention(1, keep_best=1), {2, 6}),  # the earlier of equals
        (Retention(1, keep_best=3), {2, 5, 4, 6}),
        (Retention(1, keep_best=99), {1, 2, 4, 5, 6}),
        (Retention(1, keep_every=Duration(200, "tokens")), {2, 4, 6}),
        (Retention(1, keep_every=Duration(250, "tokens")), {3, 5, 6}),  # the first at or after 250, 500
        (Retention(1, keep_every=Duration(10_000, "tokens")), {6}),
        (Retention(1, keep_every=Duration(2, "steps")), {2, 4, 6}),
        (Retention(1, keep_every=Duration(300, "tokens"), keep_best=1), {2, 3, 6}),
    ],
)
def test_kept(rule: Retention, steps: set[int]) -> None:
    assert kept(RUN, rule) == steps
    assert kept(RUN[::-1], rule) == steps


def test_what_is_kept_for_merging_stays_as_the_run_goes_on() -> None:
    rule = Retention(1, keep_every=Duration(250, "tokens"))
    present: list[Saved] = []
    for saved in RUN:
        present = [s for s in [*present, saved] if s.step in kept([*present, saved], rule)]
    assert [saved.step for saved in present] == [3, 5, 6]


def test_without_token_counts_nothing_is_kept_for_merging() -> None:
    assert kept([Saved(1, None, None), Saved(2, None, None)], Retention(1, keep_every=Duration(1, "tokens"))) == {2}


def test_the_recipe_s_wish() -> None:
    recipe, _ = compose(["recipe=tiny", "checkpoint.keep_last=2", "checkpoint.keep_every='20 steps'"])
    run = resolve(recipe, recipe.world_size or 1)
    assert retention_of(run) == Retention(2, Duration(20, "steps"), 0)


@pytest.mark.parametrize("override", ["checkpoint.keep_every='90 min'", "checkpoint.keep_best=-1"])
def test_what_cannot_be_kept(override: str) -> None:
    recipe, origins = compose(["recipe=tiny", override])
    with pytest.raises(UserError, match=override.partition("=")[0]):
        resolve(recipe, recipe.world_size or 1, origins)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (2, 3, 1)])
def test_a_loss_that_is_not_a_number_is_never_the_best(order: tuple[int, ...]) -> None:
    """Of a run that has diverged; Python's sort leaves what stands around a NaN where it is."""
    losses = {1: 3.0, 2: math.nan, 3: 2.0}
    renumbered = {place: losses[number] for place, number in enumerate(order, 1)}
    found = [*(Saved(step, None, loss) for step, loss in renumbered.items()), Saved(9, None, None)]
    best = min(step for step in renumbered if order[step - 1] == 3)
    assert kept(found, Retention(1, keep_best=1)) == {best, 9}
