"""What one process writes down, another reads."""

from __future__ import annotations

import os

from nemotron3_megatron.resilience.place import Place, SharedPlace


def test_what_was_put_is_read_through_the_descriptor_alone() -> None:
    mine = SharedPlace.create()
    its = SharedPlace(os.dup(mine.descriptor))
    assert its.get() is None, "before the first place"
    mine.put(Place("a long phase" * 20, 1_000_000, "main", 5.0, None))
    place = Place("step", 7, 'stage "ü"\n', 12.5, 30.0)
    mine.put(place)  # shorter than the one before
    mine.beat(99.5, 4711)
    seen = its.get()
    assert seen is not None
    assert (seen.place, seen.beat, seen.thread, seen.asked) == (place, 99.5, 4711, False)
    mine.ask()
    seen = its.get()
    assert seen is not None
    assert (seen.place, seen.beat, seen.asked) == (place, 99.5, True)


def test_a_place_that_is_being_written_is_none() -> None:
    mine = SharedPlace.create()
    mine.put(Place("step", 7, "main", 12.5))
    os.pwrite(mine.descriptor, b'{"phase": ""', 64)
    assert mine.get() is None


def test_a_long_name_fits() -> None:
    mine = SharedPlace.create()
    mine.put(Place("step", 7, "ü" * 5000, 12.5))
    seen = mine.get()
    assert seen is not None
    assert seen.place.stage == "ü" * 200


def test_late_is_beyond_the_limit() -> None:
    assert not Place("step", 1, "", 10.0, 5.0).late(15.0)
    assert Place("step", 1, "", 10.0, 5.0).late(15.1)
    assert not Place("end", 1, "", 10.0).late(1e9)
