"""Long documents: lengths in tokens, order of files, and ground truth found again in the text by other means."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data_prep.long import repositories as repositories_module
from data_prep.long.order import dependency_order
from data_prep.manifest import Manifest
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.tokenizer import load_tokenizer

BPE = ("tokenizer.vocab_size=280",)


def long_documents(directory: Path, split: str = "train") -> tuple[list[list[int]], list[dict]]:
    tokenizer = load_tokenizer(directory)
    corpus = IndexedTokens(directory / split, vocab_size=tokenizer.vocab_size)
    truth = directory / f"{split}.truth.jsonl"
    lines = [json.loads(line) for line in truth.read_text().splitlines()] if truth.exists() else []
    return [corpus.read(i, 0, int(n)).tolist() for i, n in enumerate(corpus.lengths)], lines


def text_of(directory: Path, ids: list[int]) -> str:
    return load_tokenizer(directory).decode(ids)


def test_both_preparations_hold_out_the_same_repositories(prepare, tmp_path: Path) -> None:
    """Files of a held-out package, alone or put together, are on one side; files beside packages are of none."""
    for package in range(12):
        for name in ("one", "two", "three"):
            path = tmp_path / "code" / f"package{package}" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# package {package} file {name}\n" * 3)
    (tmp_path / "code" / "alone.py").write_text("# no package\n")
    held_out = "validation_fraction=0.4"
    assert prepare([tmp_path / "code"], "files", held_out, "validation_by=repository", *BPE) == 0
    whole = ("+long.kind=repositories", "+long.lengths=[4096]")
    assert prepare([tmp_path / "code"], "repositories", held_out, *whole, *BPE) == 0
    packages = {}
    for kind, split in product(("files", "repositories"), ("train", "validation")):
        documents, _ = long_documents(tmp_path / kind, split)
        texts = [text_of(tmp_path / kind, ids) for ids in documents]
        packages[kind, split] = {found for text in texts for found in re.findall(r"# package (\d+) file", text)}
    assert packages["files", "train"] == packages["repositories", "train"]
    assert packages["files", "validation"] == packages["repositories", "validation"]
    assert not packages["files", "train"] & packages["files", "validation"]
    assert len(packages["files", "train"] | packages["files", "validation"]) == 12
    assert packages["files", "validation"]


def test_packed_text_cannot_hold_out_repositories(prepare, filler, capsys) -> None:
    assert prepare([filler], "out", "+long.kind=pack", "validation_by=repository", *BPE) == 2
    assert "validation_by=repository" in capsys.readouterr().err


@pytest.fixture
def filler(write_jsonl) -> Path:
    lines = [f"Paragraph {i}: the tide tables of the {i % 7}th harbour were copied by hand." for i in range(400)]
    return write_jsonl("filler.jsonl", ["\n\n".join(lines[i : i + 4]) for i in range(0, 400, 4)])


def test_packed_text_is_the_input_and_has_the_lengths(prepare, filler, tmp_path: Path) -> None:
    assert prepare([filler], "out", "+long.kind=pack", "+long.lengths=[1000,3000]", *BPE) == 0
    documents, _ = long_documents(tmp_path / "out")
    lengths = [len(ids) for ids in documents]
    assert len(lengths) > 4
    wanted = [(1000, 3000)[i % 2] for i in range(len(lengths))]
    assert lengths[:-1] == wanted[:-1]
    assert lengths[-1] <= wanted[-1]
    joined = "".join(text_of(tmp_path / "out", ids) for ids in documents)
    originals = [json.loads(line)["text"] for line in filler.read_text().splitlines()]
    assert joined == "".join(f"{text}\n\n" for text in originals)


def recomputed(kind: str, text: str, question: str) -> str:
    """The answer, from the statements in the text."""
    if kind == "retrieval":
        place, thing = re.fullmatch(r"Under which number does the archive of (\w+) keep its (.+)\?", question).groups()
        (code,) = re.findall(rf"The archive of {place} keeps a {thing} under the number (\d+)\.", text)
        return code
    if kind == "multi_hop":
        holder, parcel = re.fullmatch(r"(\w+) had (parcel \d+) first\. Who had it last\?", question).groups()
        steps = dict(re.findall(rf"(\w+) handed {parcel} to (\w+)\.", text))
        while holder in steps:
            holder = steps.pop(holder)
        assert not steps
        return holder
    thing, station = re.fullmatch(
        r"How many (\w+) do all reports from the (\w+) station mention together\?", question
    ).groups()
    return str(sum(map(int, re.findall(rf"A report from the {station} station mentions (\d+) {thing}\.", text))))


@pytest.mark.parametrize(("kind", "evidence"), [("retrieval", 1), ("multi_hop", 3), ("aggregation", 3)])
def test_answers_follow_from_the_text(prepare, filler, tmp_path: Path, kind: str, evidence: int) -> None:
    settings = (f"+long.kind={kind}", "+long.lengths=[6000,9000]", "+long.items=3", "+long.hops=3", *BPE)
    assert prepare([filler], "out", *settings) == 0
    documents, truth = long_documents(tmp_path / "out")
    lengths = [len(ids) for ids in documents]
    assert len(documents) == len(truth) > 2
    wanted = [(6000, 9000)[i % 2] for i in range(len(lengths))]
    assert lengths[:-1] == wanted[:-1]
    assert lengths[-1] <= wanted[-1]
    depths = []
    for ids, line in zip(documents, truth, strict=True):
        text = text_of(tmp_path / "out", ids)
        assert (line["kind"], line["tokens"]) == (kind, len(ids))
        assert len(line["questions"]) == 3
        for item in line["questions"]:
            assert recomputed(kind, text, item["question"]) == item["answer"]
            assert f"Question: {item['question']}\nAnswer: {item['answer']}\n" in text
            assert len(item["evidence"]) == evidence
            for offset in item["evidence"]:
                statement = text_of(tmp_path / "out", ids[offset : offset + 120]).split("\n")[0]
                assert statement.endswith(".")
                assert statement in text
                depths.append(offset / len(ids))
    # Places are uniform: of at least 9 draws none in the first or none in the last half has probability below 2^-8.
    assert min(depths) < 0.5 < max(depths)
    assert prepare([filler], "again", *settings) == 0
    assert long_documents(tmp_path / "again") == (documents, truth)
    assert prepare([filler], "other", *settings, "+long.seed=2") == 0
    assert long_documents(tmp_path / "other")[1] != truth


def test_no_room_for_questions(prepare, filler, capsys) -> None:
    assert prepare([filler], "out", "+long.kind=multi_hop", "+long.lengths=[1024]", "+long.items=9", *BPE) == 2
    assert "statements and questions alone have" in capsys.readouterr().err


def test_sides_of_the_split_share_no_document(prepare, filler, tmp_path: Path) -> None:
    settings = ("+long.kind=retrieval", "+long.lengths=[3000]", "+long.items=1", "validation_fraction=0.4", *BPE)
    assert prepare([filler], "out", *settings) == 0
    seen = {}
    for split in ("train", "validation"):
        documents, truth = long_documents(tmp_path / "out", split)
        assert len(documents) == len(truth) > 0
        text = "".join(text_of(tmp_path / "out", ids) for ids in documents)
        seen[split] = set(re.findall(r"Paragraph (\d+):", text))
    # A number may be cut at the end of a document: compare whole paragraphs' numbers of three digits only.
    three = {split: {number for number in numbers if len(number) == 3} for split, numbers in seen.items()}
    assert not three["train"] & three["validation"]
    assert len(three["train"] | three["validation"]) > 250


def test_document_qa(prepare, tmp_path: Path) -> None:
    records = [
        {"text": f"Notes of day {i}. " + f"It rained {i} times. " * 12, "questions": [
            {"question": f"How often did it rain on day {i}?", "answer": str(i)}, {"question": "Dry?", "answer": "no"}]}
        for i in range(30)
    ]  # fmt: skip
    records += [{"text": "too long " * 3000, "questions": []}, {"text": "no list", "questions": "none"}]
    source = tmp_path / "qa.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ("+long.kind=document_qa", "+long.lengths=[2000]", *BPE)
    assert prepare([source], "stopped", *settings) == 2
    assert prepare([source], "out", *settings, "on_error=skip") == 0
    documents, truth = long_documents(tmp_path / "out")
    assert len(documents) > 2
    assert all(len(ids) <= 2000 for ids in documents)
    asked = 0
    for ids, line in zip(documents, truth, strict=True):
        text = text_of(tmp_path / "out", ids)
        for item in line["questions"]:
            number, question = re.fullmatch(r"\(document (\d+)\) (.*)", item["question"]).groups()
            (start,) = item["evidence"]
            about = text_of(tmp_path / "out", ids[start : start + 60])
            assert about.startswith(f"Document {number}\n\n")
            if question != "Dry?":
                assert about.split("Notes of day ")[1].split(".")[0] == item["answer"]
            assert f"Question: {item['question']}\nAnswer: {item['answer']}\n" in text
            asked += 1
    assert asked == 60
    dropped = Manifest.load(tmp_path / "out").dropped
    assert sorted(dropped.values()) == [1, 1]


def test_dependency_order() -> None:
    files = {
        "app/main.py": "from app import util\nimport lib.core as c\n",
        "app/util.py": "from .deep.base import thing\n",
        "app/deep/base.py": "import os\n",
        "lib/core.py": "from app.util import x\n",
        "a.c": '#include "z.h"\n#include <stdio.h>\n#include <inner/y.h>\n',
        "z.h": "",
        "include/inner/y.h": '#include "x.h"\n',
        "include/inner/x.h": "",
        "web/a.ts": "import {b} from './b'\nconst c = require('../c.js')\n",
        "web/b.ts": "import x from './a'\n",  # a cycle
        "c.js": "",
        "README.md": "import nothing",
    }
    order = dependency_order(files)
    assert sorted(order) == sorted(files)
    before = [
        ("app/deep/base.py", "app/util.py"), ("app/util.py", "app/main.py"), ("lib/core.py", "app/main.py"),
        ("app/util.py", "lib/core.py"), ("z.h", "a.c"), ("include/inner/y.h", "a.c"),
        ("include/inner/x.h", "include/inner/y.h"), ("web/b.ts", "web/a.ts"), ("c.js", "web/a.ts"),
    ]  # fmt: skip
    assert all(order.index(first) < order.index(second) for first, second in before)
    assert order.index("README.md") < order.index("app/deep/base.py")  # the rest by path


def test_long_import_chain() -> None:
    files = {f"m{i:05d}.py": f"import m{i + 1:05d}\n" for i in range(3000)}
    assert dependency_order(files) == sorted(files, reverse=True)


@pytest.mark.parametrize("as_records", [False, True])
def test_repositories(prepare, tmp_path: Path, as_records: bool) -> None:
    repositories: dict[str, dict[str, str]] = defaultdict(dict)
    for name in ("one", "two", "three"):
        for i in range(6):
            text = f"import m{i + 1}\n# file {i} of {name}\n" + "value = 1\n" * 20
            repositories[name][f"src/m{i}.py"] = text
    repositories["big"]["all.py"] = "x = 'long line'\n" * 400
    extra: tuple[str, ...] = ()
    if as_records:
        source = tmp_path / "files.jsonl"
        rows = [{"text": t, "repo": n, "path": p} for n, files in repositories.items() for p, t in files.items()]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        extra = ("+long.repository_field=repo",)
    else:
        source = tmp_path / "corpus"
        for name, files in repositories.items():
            for path, text in files.items():
                (source / name / path).parent.mkdir(parents=True, exist_ok=True)
                (source / name / path).write_text(text)
    settings = ("+long.kind=repositories", "+long.lengths=[1500]", "shard_bytes=1", *BPE, *extra)
    assert prepare([source], "out", *settings) == 0
    documents, _ = long_documents(tmp_path / "out")
    assert all(len(ids) <= 1500 for ids in documents)
    texts = [text_of(tmp_path / "out", ids) for ids in documents]
    for name in ("one", "two", "three"):
        own = [text for text in texts if f"of {name}\n" in text]
        found = [int(number) for text in own for number in re.findall(rf"# file (\d) of {name}\n", text)]
        assert found == [5, 4, 3, 2, 1, 0]  # what is imported comes first
        assert not any(f"of {other}\n" in text for text in own for other in {"one", "two", "three"} - {name})
        assert re.findall(r"==> (.*) <==", own[0])[0].endswith("src/m5.py")
    assert sum(text.count("x = 'long line'\n") for text in texts) >= 400 - len(texts)  # cut lines are in two documents


def test_files_without_a_place_of_their_own_are_counted(prepare, tmp_path: Path, capsys) -> None:
    """A path that occurs twice in a repository, and records that name no repository, which are not one together."""
    rows = [{"text": f"file {i}\n" * 30, "repo": "one", "path": f"{min(i, 2)}.txt"} for i in range(4)]
    rows += [{"text": "nobody's\n" * 30, "repo": None, "path": "a.txt"}]
    source = tmp_path / "files.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        "+long.kind=repositories",
        "+long.lengths=[1500]",
        "+long.repository_field=repo",
        "tokenizer.vocab_size=260",
    )
    assert prepare([source], "out", *settings) == 2
    assert "files.jsonl:5: its repository or path is no text" in capsys.readouterr().err
    assert prepare([source], "out", *settings, "on_error=skip") == 0
    assert Manifest.load(tmp_path / "out").dropped == {
        "its path occurs twice in the repository": 1,
        "its repository or path is no text": 1,
    }
    ((ids,), _) = long_documents(tmp_path / "out")
    assert re.findall(r"==> (.*) <==\nfile (\d)", text_of(tmp_path / "out", ids)) == [
        (f"{i}.txt", f"{i}") for i in range(3)
    ]


@pytest.mark.parametrize("batch", [1, 150, 10**6])
def test_a_large_repository_is_tokenised_in_batches(tmp_path: Path, prepare, monkeypatch, batch: int) -> None:
    """Where batches end decides nothing: documents hold the files' own ids, each file once."""
    (tmp_path / "text.txt").write_text("value = file\n" * 50)
    assert prepare([tmp_path / "text.txt"], "out", "tokenizer.vocab_size=260") == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    monkeypatch.setattr(repositories_module, "_BATCH_CHARACTERS", batch)
    files = {f"m{number}.txt": f"file {number}\n" * (3 * number + 1) for number in range(9)}
    found = list(repositories_module.repository_documents(files, 200, tokenizer))
    expected = [tokenizer.encode(f"==> {name} <==\n{text.rstrip()}\n\n") for name, text in files.items()]
    assert np.concatenate([packed.ids for packed in found]).tolist() == [token for ids in expected for token in ids]
    assert all(tokenizer.decode(packed.ids.tolist()) == packed.text for packed in found)
