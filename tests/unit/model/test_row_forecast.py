"""Room for a layer's rows before their number is known."""

from __future__ import annotations

from nemotron3_megatron.model.row_forecast import ROUNDED_TO, RowForecast


def test_balanced_routing_is_expected_at_first() -> None:
    assert 6 * 8192 < RowForecast(6).room(8192) < 6 * 8192 * 1.07 + ROUNDED_TO


def test_there_is_room_for_what_came_before() -> None:
    forecast = RowForecast(6)
    forecast.learn(80_000, 8192)
    assert forecast.room(8192) > 80_000
    assert forecast.room(4096) > 40_000, "of another number of tokens the same share"
    for _ in range(10):
        forecast.learn(1, 8192)
    assert forecast.room(8192) > 70_000, "the largest of late, not the last"


def test_room_shrinks_with_time() -> None:
    forecast = RowForecast(6)
    for _ in range(1000):
        forecast.learn(100, 8192)
    assert 100 < forecast.room(8192) <= ROUNDED_TO


def test_there_is_always_a_row() -> None:
    """Transformer Engine's sort wants one."""
    forecast = RowForecast(0.0)
    forecast.learn(0, 8192)
    assert forecast.room(8192) == ROUNDED_TO


def test_a_graph_has_more_room_and_twice_the_margin_after_each_lack() -> None:
    forecast = RowForecast(4, most_per_token=16)
    assert forecast.room(8192, captured=True) == 6 * 8192
    forecast.widen()
    assert forecast.room(8192, captured=True) == 8 * 8192
    forecast.widen()
    forecast.widen()
    assert forecast.room(8192, captured=True) == 16 * 8192, "more cannot come"
    assert forecast.room(8192) == 4.25 * 8192
