"""Training and validation data: layout independence, explicit position, refusal of changed data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemotron3_megatron.config.duration import EVERY_10_STEPS
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.data.training import TrainingData, ValidationData


@pytest.fixture
def two_sources(write_corpus, numbered):
    rng = np.random.default_rng(1)
    a = write_corpus("a", numbered(rng.integers(2, 30, 40).tolist()))
    b = write_corpus("b", numbered(rng.integers(2, 30, 25).tolist(), first=3000))
    return {"a": (a, 0.7), "b": (b, 0.3)}


def tokens_of(steps: list[list[MicroBatch]]) -> list[list[list[int]]]:
    return [[row for batch in step for row in batch.tokens.tolist()] for step in steps]


def same(a: MicroBatch, b: MicroBatch) -> bool:
    pairs = ((getattr(a, name), getattr(b, name)) for name in MicroBatch.__slots__)
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("num_prefetch", [0, 1, 3])
def test_resume_equals_uninterrupted_whatever_the_prefetch(make_run, make_stage, two_sources, num_prefetch) -> None:
    stage = make_stage()
    whole = TrainingData(make_run(two_sources, num_prefetch=0), 0, 1, 0, 1)
    expected = [whole.next_step(stage) for _ in range(12)]

    first = TrainingData(make_run(two_sources, num_prefetch=num_prefetch), 0, 1, 0, 1)
    steps = [first.next_step(stage) for _ in range(5)]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = TrainingData(make_run(two_sources, num_prefetch=num_prefetch), 0, 1, 0, 1)
    second.next_step(stage)
    second.load_state_dict(state)
    steps += [second.next_step(stage) for _ in range(7)]
    assert all(same(x, y) for got, want in zip(steps, expected, strict=True) for x, y in zip(got, want, strict=True))
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("dp", "micro_batch_size"), [(2, 2), (4, 1), (2, 4), (1, 8)])
def test_global_batch_is_the_same_under_every_layout(make_run, make_stage, two_sources, dp, micro_batch_size) -> None:
    run = make_run(two_sources)
    reference = TrainingData(run, 0, 1, 0, 1)
    expected = tokens_of([reference.next_step(make_stage(micro_batch_size=1)) for _ in range(3)])

    stage = make_stage(micro_batch_size=micro_batch_size, dp=dp)
    ranks = [TrainingData(run, rank, dp, 0, 1) for rank in range(dp)]
    for step in range(3):
        parts = [rank.next_step(stage) for rank in ranks]
        assert all(len(part) == stage.num_microbatches for part in parts)
        rows = [row for m in range(stage.num_microbatches) for part in parts for row in part[m].tokens.tolist()]
        assert rows == expected[step]
    assert all(rank.state_dict() == reference.state_dict() for rank in ranks)


def test_context_parallel_ranks_share_the_sequence(make_run, make_stage, two_sources) -> None:
    run, stage = make_run(two_sources), make_stage()
    whole = TrainingData(run, 0, 1, 0, 1).next_step(stage)
    for cp_rank in range(2):
        part = TrainingData(run, 0, 1, cp_rank, 2).next_step(stage)
        assert all(same(x, y.shard(cp_rank, 2)) for x, y in zip(part, whole, strict=True))


def tagged(run: Run, **tags: str) -> Run:
    """The run with tags for its sources, and a validation source that is tagged ``math``."""
    sources = {name: replace(source, tag=tags.get(name, "")) for name, source in run.data.sources.items()}
    validation = {"held_out": replace(sources["a"], tag="math")}
    return replace(run, data=replace(run.data, sources=sources, validation=validation))


@pytest.mark.parametrize("dp", [1, 2])
def test_every_sequence_carries_the_tag_of_its_source(make_run, make_stage, two_sources, dp: int) -> None:
    """Tags are those of sources in the order of the recipe, then of validation: code, untagged, math."""
    run, stage = tagged(make_run(two_sources), a="code"), make_stage(dp=dp, micro_batch_size=2)
    ranks = [TrainingData(run, rank, dp, 0, 1) for rank in range(dp)]
    parts = [rank.next_step(stage) for rank in ranks]
    rows = [row for m in range(stage.num_microbatches) for part in parts for row in part[m].tags.tolist()]
    assert {name for name, _ in ranks[0].samples} == {"a", "b"}
    assert rows == [[name == "a", name == "b", False] for name, _ in ranks[0].samples]
    held_out = ValidationData(run, 0, 1, 0, 1).batches(make_stage())
    assert all(row == [False, False, True] for batch in held_out for row in batch.tags.tolist())


def test_without_different_tags_nothing_is_carried(make_run, make_stage, two_sources) -> None:
    for run in (make_run(two_sources), tagged(make_run({"a": two_sources["a"]}), a="math")):
        assert all(batch.tags is None for batch in TrainingData(run, 0, 1, 0, 1).next_step(make_stage()))


def test_shares_and_no_repetition_within_an_epoch(make_run, make_stage, two_sources) -> None:
    data = TrainingData(make_run(two_sources), 0, 1, 0, 1)
    rows = tokens_of([data.next_step(make_stage()) for _ in range(5)])
    flat = [tuple(row) for step in rows for row in step]
    assert len(set(flat)) == len(flat) == 40
    assert data.state_dict()["drawn"] == {"8": {"a": 28, "b": 12}}


def test_a_change_of_stage_forgets_nothing_and_skips_nothing(make_run, make_stage, two_sources) -> None:
    """Prefetched steps of the old stage are dropped, their samples are drawn again by the next stage."""
    run = make_run(two_sources, num_prefetch=3)
    data, reference = TrainingData(run, 0, 1, 0, 1), TrainingData(run, 0, 1, 0, 1)
    small, large, long = make_stage(), make_stage(global_batch_size=16), make_stage(seq_length=16)
    expected = [row for _ in range(4) for batch in reference.next_step(small) for row in batch.tokens.tolist()]
    steps = [data.next_step(small), data.next_step(large)]
    long_steps = [data.next_step(long)]
    steps.append(data.next_step(small))
    assert [row for step in tokens_of(steps) for row in step] == expected
    assert all(batch.tokens.shape == (2, 16) for batch in long_steps[0])
    assert {length: sum(c.values()) for length, c in data.state_dict()["drawn"].items()} == {"8": 32, "16": 8}


def test_changed_data_is_refused_and_said_in_words(make_run, make_stage, two_sources, write_corpus, numbered) -> None:
    data = TrainingData(make_run(two_sources), 0, 1, 0, 1)
    data.next_step(make_stage())
    state = data.state_dict()
    a, b = two_sources["a"][0], two_sources["b"][0]
    other = write_corpus("other", numbered([9] * 30))

    def refusal(sources, **settings) -> str:
        with pytest.raises(UserError) as caught:
            TrainingData(make_run(sources, **settings), 0, 1, 0, 1).load_state_dict(state)
        return str(caught.value)

    assert "'a' has the share 1/2, was 7/10" in refusal({"a": (a, 1), "b": (b, 1)})
    assert "'c' is new" in refusal({**two_sources, "c": (other, 0.1)})
    assert "'b' is gone" in refusal({"a": (a, 1)})
    assert "'b' has other content" in refusal({"a": (a, 0.7), "b": (other, 0.3)})
    assert "seed is 8, was 7" in refusal(two_sources, seed=8)
    assert "allow_data_change" in refusal(two_sources, seed=8)


def test_the_same_data_elsewhere_is_accepted(make_run, two_sources, tmp_path) -> None:
    state = TrainingData(make_run(two_sources), 0, 1, 0, 1).state_dict()
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx"):
        two_sources["a"][0].with_suffix(suffix).rename(moved.with_suffix(suffix))
    run = make_run({"b": (two_sources["b"][0], 3), "a": (moved, 7)})
    TrainingData(run, 0, 1, 0, 1).load_state_dict(state)


def test_allowed_change_keeps_unchanged_sources_and_restarts_the_shares(
    make_run, make_stage, two_sources, write_corpus, numbered, caplog
) -> None:
    stage = make_stage()
    data = TrainingData(make_run(two_sources), 0, 1, 0, 1)
    for _ in range(4):
        data.next_step(stage)
    state = data.state_dict()
    drawn_before = state["drawn"]["8"]["a"]
    new = write_corpus("new", numbered([9] * 30, first=6000))
    changed = TrainingData(make_run({"a": (two_sources["a"][0], 0.5), "c": (new, 0.5)}), 0, 1, 0, 1)
    with caplog.at_level("WARNING"):
        changed.load_state_dict(state, allow_data_change=True)
    assert "'b' is gone" in caplog.text
    # The newcomer gets its half at once, and does not first make up for the 32 samples drawn without it.
    rows = tokens_of([changed.next_step(stage)])[0]
    assert sum(max(row) >= 6000 for row in rows) == 4
    assert changed.state_dict()["drawn"]["8"] == {"a": drawn_before + 4, "c": 4}


def test_unusable_data_surfaces_from_the_thread(make_run, make_stage, two_sources) -> None:
    data = TrainingData(make_run(two_sources, vocab_size=100), 0, 1, 0, 1)
    with pytest.raises(UserError, match="vocabulary has 100"):
        data.next_step(make_stage(global_batch_size=64))


def test_wrong_batch_arithmetic_is_a_programming_error(make_run, make_stage, two_sources) -> None:
    with pytest.raises(ValueError, match="num_microbatches"):
        TrainingData(make_run(two_sources), 0, 2, 0, 1).next_step(make_stage(dp=1))


def test_validation_is_fixed_and_independent_of_the_layout(make_run, make_stage, two_sources) -> None:
    run = make_run(two_sources, validation={"held_out": two_sources["b"]}, eval_batches=2)
    stage = make_stage()
    data = ValidationData(run, 0, 1, 0, 1)
    first, second = list(data.batches(stage)), list(data.batches(stage))
    assert len(first) == 2 * stage.num_microbatches
    assert all(same(x, y) for x, y in zip(first, second, strict=True))

    halves = [list(ValidationData(run, rank, 2, 0, 1).batches(make_stage(dp=2))) for rank in range(2)]
    interleaved = [batch.tokens.tolist() for pair in zip(*halves, strict=True) for batch in pair]
    assert interleaved == [batch.tokens.tolist() for batch in first]


def test_too_little_held_out_text_is_found_before_training(make_run, make_stage, two_sources, write_corpus) -> None:
    short = {"held_out": (write_corpus("short", [[5, 6, 7, 0]]), 1.0)}
    run = make_run(two_sources, validation=short)
    ValidationData(run, 0, 1, 0, 1)  # is never read
    with pytest.raises(UserError, match="'held_out'"):
        ValidationData(replace(run, telemetry=replace(run.telemetry, eval_every=EVERY_10_STEPS)), 0, 1, 0, 1)


def test_sources_of_different_tokenizers_are_named(make_run, write_corpus, numbered, tmp_path, caplog) -> None:
    """As their manifests tell; a source without one, or with another tool's, says nothing."""
    sources = {}
    for name, manifest in (("a", "0a"), ("b", "0a"), ("c", "0c"), ("d", None), ("e", 5)):
        (tmp_path / name).mkdir()
        sources[name] = (write_corpus(f"{name}/train", numbered([30] * 9)), 1.0)
        if manifest is not None:
            content = {"tokenizer": {"fingerprint": manifest}} if isinstance(manifest, str) else [manifest]
            (tmp_path / name / "manifest.json").write_text(json.dumps(content))
    TrainingData(make_run({name: sources[name] for name in "abde"}), 0, 1, 0, 1).close()
    assert not caplog.records
    run = make_run({name: sources[name] for name in "ad"}, validation={"c": sources["c"]})
    TrainingData(run, 0, 1, 0, 1).close()
    assert "different tokenizers" in caplog.text
    assert "a: 0a; c (validation): 0c" in caplog.text


def test_no_validation_sources_no_batches(make_run, make_stage, two_sources) -> None:
    assert list(ValidationData(make_run(two_sources), 0, 1, 0, 1).batches(make_stage())) == []
