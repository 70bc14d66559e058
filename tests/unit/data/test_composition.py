"""Blends by stage, their epochs and what inspection says, against the samples that training really draws."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nemotron3_megatron.cli import main
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import DataConfig, SourceConfig
from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.config.stage import Span, Stage
from nemotron3_megatron.data.composition import blend_of, blends_of, planned_tokens
from nemotron3_megatron.data.training import TrainingData


def shape(seq_length: int, sequences: int, blend: str | None) -> Shape:
    return Shape(
        tokens_per_step=seq_length * sequences,
        seq_length=seq_length,
        global_batch_size=sequences,
        micro_batch_size=2,
        num_microbatches=sequences // 2,
        blend=blend,
    )


@pytest.fixture
def curriculum(make_run, write_corpus, numbered) -> Run:
    """Two stages: blend ``one`` at length 8, then lengths 16 and 8 in turn, of ``two`` and ``one``."""
    rng = np.random.default_rng(1)
    a = write_corpus("a", numbered(rng.integers(2, 30, 80).tolist()))
    b = write_corpus("b", numbered(rng.integers(2, 30, 80).tolist(), first=3000))
    run = make_run({"a": (a, 1), "b": (b, 1)})
    blends = {"one": {"a": 0.75, "b": 0.25}, "two": {"b": 1.0, "one": 1.0}}
    first, long, short = shape(8, 4, "one"), shape(16, 2, "two"), shape(8, 4, "one")
    spans = (Span(first_step=10, first_token=320, shapes=(long, short), order=(0, 1)),)
    own = {name: getattr(first, name) for name in Shape.__slots__}
    stages = (
        Stage(name="first", first_step=0, steps=10, first_token=0, **own),
        Stage(name="second", first_step=10, steps=10, first_token=320, spans=spans, **{**own, "blend": "two"}),
    )
    return replace(run, data=replace(run.data, blends=blends), stages=stages, total_steps=20)


def drawn(run: Run, steps: int) -> Counter[str]:
    """Tokens of each source that training reads."""
    data = TrainingData(run, 0, 1, 0, 1)
    found: Counter[str] = Counter()
    for step in range(steps):
        data.next_step(run.shape_at(step), run.shape_at(step + 1))
        found.update({name: 0 for name in ("a", "b")})
        for name, _ in data.samples:
            found[name] += run.shape_at(step).seq_length
    data.close()
    return found


def test_a_blend_of_blends_has_their_shares() -> None:
    sources = {name: SourceConfig(path=name, weight=2.0) for name in "abc"}
    data = DataConfig(sources=sources, blends={"p": {"a": 3, "b": 1}, "q": {"p": 79, "c": 20, "a": 1}})
    assert blend_of(data, "q").shares == {
        "a": Fraction(79 * 3, 400) + Fraction(1, 100),
        "b": Fraction(79, 400),
        "c": Fraction(1, 5),
    }
    assert blend_of(data, None).shares == dict.fromkeys("abc", Fraction(1, 3))


def test_what_is_planned_is_what_is_drawn(curriculum: Run) -> None:
    planned = planned_tokens(curriculum, blends_of(curriculum))
    # first: 10 steps of 32 tokens of one; second: 5 of 32 of two (3/8 a), 5 of 32 of one
    assert planned == {"a": 320 * Fraction(3, 4) + 160 * Fraction(3, 8) + 160 * Fraction(3, 4), "b": 640 - 420}
    found = drawn(curriculum, 20)
    for name, tokens in planned.items():  # a sequence more or less in each of three streams of turns
        assert abs(found[name] - tokens) <= 8 + 16 + 8
    assert planned_tokens(replace(curriculum, total_steps=10), blends_of(curriculum)) == {"a": 240, "b": 80}


def test_a_source_goes_on_through_blends_and_stages(curriculum: Run) -> None:
    data = TrainingData(curriculum, 0, 1, 0, 1)
    indices: dict[tuple[str, int], list[int]] = {}
    for step in range(20):
        data.next_step(*(curriculum.shape_at(ahead) for ahead in range(step, step + 3)))
        length = curriculum.shape_at(step).seq_length
        for name, index in data.samples:
            indices.setdefault((name, length), []).append(index)
    assert set(indices) == {("a", 8), ("b", 8), ("a", 16), ("b", 16)}
    assert all(found == list(range(len(found))) for found in indices.values())
    assert set(data.state_dict()["drawn_from_blend"]) == {"one@8", "two@16"}


def test_prefetched_steps_of_another_shape_are_kept(curriculum: Run, monkeypatch) -> None:
    """Knowing the shapes of the next steps, alternating lengths cost no preparation twice."""
    prepared = []
    run = replace(curriculum, data=replace(curriculum.data, num_prefetch=2))
    data = TrainingData(run, 0, 1, 0, 1)
    prepare = data._prepare
    monkeypatch.setattr(data, "_prepare", lambda each: (prepared.append(each.seq_length), prepare(each)))
    for step in range(10, 16):
        data.next_step(*(run.shape_at(ahead) for ahead in range(step, step + 3)))
    assert prepared == [16, 8, 16, 8, 16, 8, 16, 8]


def test_more_epochs_than_allowed_are_refused(curriculum: Run) -> None:
    tokens = TrainingData(curriculum, 0, 1, 0, 1)._reader.sources["a"].num_tokens
    limit = 420 / tokens

    def with_limit(epochs: float) -> Run:
        a = replace(curriculum.data.sources["a"], max_epochs=epochs)
        return replace(curriculum, data=replace(curriculum.data, sources={**curriculum.data.sources, "a": a}))

    TrainingData(with_limit(limit + 1e-6), 0, 1, 0, 1)
    with pytest.raises(UserError, match=r"data\.sources\.a\.max_epochs"):
        TrainingData(with_limit(limit - 1e-6), 0, 1, 0, 1)


def test_a_source_too_short_for_a_later_stage_is_refused_at_the_start(curriculum: Run, write_corpus) -> None:
    """Not when that stage begins, perhaps weeks later; a run that ends before it may read the source."""
    sources = {**curriculum.data.sources, "b": SourceConfig(path=str(write_corpus("b", [[5] * 15 + [0]])))}
    run = replace(curriculum, data=replace(curriculum.data, sources=sources))
    with pytest.raises(UserError, match=r"sources\.b has 16 tokens: stage second reads windows of seq_length=16"):
        TrainingData(run, 0, 1, 0, 1)
    TrainingData(replace(run, total_steps=10), 0, 1, 0, 1).close()


def test_documents_of_a_source_may_see_each_other(curriculum: Run) -> None:
    sources = dict(curriculum.data.sources)
    sources["b"] = replace(sources["b"], isolate_documents=False)
    run = replace(curriculum, data=replace(curriculum.data, sources=sources))
    data = TrainingData(run, 0, 1, 0, 1)
    seen = {"a": 0, "b": 0}
    for step in range(20):
        rows = [row for batch in data.next_step(run.shape_at(step)) for row in batch.documents]
        for (name, _), documents in zip(data.samples, rows, strict=True):
            seen[name] = max(seen[name], int(documents.max()))
    assert seen["a"] > 0
    assert seen["b"] == 0


def test_a_blend_changed_on_resume_is_refused_and_recorded_when_allowed(curriculum: Run) -> None:
    data = TrainingData(curriculum, 0, 1, 0, 1)
    data.next_step(curriculum.shape_at(0))
    state = json.loads(json.dumps(data.state_dict()))
    blends = {**curriculum.data.blends, "two": {"b": 3.0, "one": 1.0}}
    changed = replace(curriculum, data=replace(curriculum.data, blends=blends))
    with pytest.raises(UserError, match="'a' has the share 3/16, was 3/8 in stage second"):
        TrainingData(changed, 0, 1, 0, 1).load_state_dict(state)
    allowed = TrainingData(changed, 0, 1, 0, 1)
    allowed.load_state_dict(state, allow_data_change=True)
    lineage = allowed.state_dict()["lineage"]
    assert [len(entry["changes"]) for entry in lineage] == [2]
    assert lineage[0]["drawn"] == {"8": {"a": 3, "b": 1}}
    # Without a further change the next start records nothing more; a stage that is added is no change.
    third = replace(changed.stages[1], name="third", first_step=20)
    again = TrainingData(replace(changed, stages=(*changed.stages, third)), 0, 1, 0, 1)
    again.load_state_dict(allowed.state_dict())
    assert again.state_dict()["lineage"] == lineage


def test_inspect_says_what_the_blend_really_is(write_corpus, numbered, tmp_path: Path, capsys) -> None:
    a, b = write_corpus("a", numbered([30] * 20)), write_corpus("b", numbered([300] * 4))
    words = ["recipe=tiny", f"run_dir={tmp_path}/run", "data=custom", "stages.main.blend=mix"]
    words += [f"data.sources.a={{path: {a}, tag: short}}", f"data.sources.b={{path: {b}, tag: long}}"]
    words += ["data.blends.mix={a: 3, b: 1}", "stages.main.tokens=10 steps", "stages.main.seq_length=64"]
    words += ["optimizer.lr_warmup=1 steps", "optimizer.lr_wsd_decay=2 steps"]
    assert main(["data", "inspect", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["source"]: row for row in found["sources"]}
    assert (rows["a"]["tokens"], rows["a"]["documents"], rows["b"]["longest"]) == (600, 20, 300)
    assert rows["a"]["read_tokens"] == 10 * 16 * 64 * 3 // 4
    assert rows["a"]["epochs"] == pytest.approx(7680 / 600)
    assert [(row["stage"], row["seq_length"], row["share"]) for row in found["stages"]] == [
        ("main", 64, 0.75),
        ("main", 64, 0.25),
    ]
    assert (tmp_path / "run/document_lengths.png").stat().st_size > 1000
    assert main(["data", "look"]) == 2


def test_inspect_names_what_training_would_refuse(write_corpus, numbered, tmp_path: Path, capsys) -> None:
    """After everything else is shown; here two blends at one length, one of them with a source of a single window."""
    a, b = write_corpus("a", numbered([30] * 20)), write_corpus("b", numbered([65]))
    words = ["recipe=tiny", f"run_dir={tmp_path}/run", "data=custom", "stages.main.blend=one", "data.blends.one={a: 1}"]
    words += [f"data.sources.a.path={a}", f"data.sources.b.path={b}", "data.blends.two={a: 1, b: 1}"]
    words += ["optimizer.lr_warmup=1 steps", "optimizer.lr_wsd_decay=2 steps", "stages.main.tokens=10 steps"]

    def inspect(length: int, *more: str) -> int:
        other = f"stages.main.other_lengths.other={{seq_length: {length}, share: 0.5, blend: two}}"
        return main(["data", "inspect", *words, other, "stages.main.seq_length=64", "--json", *more])

    assert inspect(64) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [(row["source"], row["share"], row["tokens"]) for row in rows] == [
        ("a", 1.0, 5 * 16 * 64),
        ("a", 0.5, 5 * 8 * 64),
        ("b", 0.5, 5 * 8 * 64),
    ]
    for length, more, why in (
        (64, ["data.sources.b.max_epochs=2"], "65 tokens 39.4 times"),
        (128, [], "has 65 tokens"),
    ):
        assert inspect(length, *more) == 2
        captured = capsys.readouterr()
        assert len(json.loads(captured.out)["sources"]) == 2
        assert why in captured.err


def test_inspect_shows_documents_from_everywhere(write_corpus, tmp_path: Path, capsys) -> None:
    """The beginnings of three of ten documents; of a source of two, both."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[x]": 0, "<|endoftext|>": 1, **{f"word{number}": 2 + number for number in range(10)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[x]"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ten = write_corpus("ten", [[2 + number] * (number + 1) + [1] for number in range(10)])
    two = write_corpus("two", [[2, 2, 1], [3, 3, 1]])
    settings = ["recipe=tiny", f"run_dir={tmp_path}/run", "data=custom", f"data.tokenizer={tmp_path}/tokenizer.json"]
    settings += [f"data.sources.ten={{path: {ten}}}", f"data.sources.two={{path: {two}}}", "data.eod_token=1"]
    settings += ["stages.main.seq_length=4", "stages.main.tokens=3 steps", "optimizer.lr_warmup=1 steps"]
    assert main(["data", "inspect", *settings, "optimizer.lr_wsd_decay=1 steps"]) == 0
    shown = [line.split(" begins: ") for line in capsys.readouterr().out.splitlines() if " begins: " in line]
    expected = {f"ten, document {number}": " ".join([f"word{number}"] * (number + 1)) for number in (1, 5, 8)}
    expected |= {f"two, document {number}": f"word{number} word{number}" for number in (0, 1)}
    assert dict(shown) == {name: repr(text) for name, text in expected.items()}
