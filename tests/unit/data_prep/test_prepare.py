"""Whole preparations: same tokens from every format, restart after a kill, splits, reports, refusals."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from data_prep import prepare as prepare_module
from data_prep.manifest import Manifest
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.tokenizer import load_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DATA = ["train.bin", "train.idx"]


def contents(directory: Path, names: list[str] = DATA) -> list[bytes]:
    return [(directory / name).read_bytes() for name in names]


def decoded(directory: Path, split: str) -> list[str]:
    """The documents of a split as text; each must end with the EOD and hold no other."""
    tokenizer = load_tokenizer(directory)
    corpus = IndexedTokens(directory / split, vocab_size=tokenizer.vocab_size)
    documents = [corpus.read(i, 0, int(length)).tolist() for i, length in enumerate(corpus.lengths)]
    assert all(document.count(tokenizer.eod) == 1 and document[-1] == tokenizer.eod for document in documents)
    return [tokenizer.decode(document) for document in documents]


def test_every_format_gives_the_same_tokens(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    (tmp_path / "plain").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "plain" / f"{i:03d}.txt").write_text(text, newline="")
    sources = [write_jsonl("t.jsonl", texts), write_jsonl("t.jsonl.gz", texts), write_jsonl("t.jsonl.zst", texts)]
    for number, source in enumerate([*sources, tmp_path / "t.parquet", tmp_path / "plain"]):
        assert prepare([source], f"out{number}") == 0
    assert decoded(tmp_path / "out0", "train") == texts
    # A BPE depends on the order of its text only through ties; here even the tokenizers are the same.
    names = [*DATA, "tokenizer.json"]
    for number in range(1, 5):
        assert contents(tmp_path / f"out{number}", names) == contents(tmp_path / "out0", names)


def test_tekken(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    """In a directory of another tokenizer, which must not remain beside it."""
    pytest.importorskip("mistral_common")
    assert prepare([write_jsonl("t.jsonl", texts)], "out") == 0
    assert prepare([tmp_path / "t.jsonl"], "out", bpe=False) == 0
    assert decoded(tmp_path / "out", "train") == texts
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eod_token) == (131_072, 2)


def test_split_has_no_leak_and_covers_all(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    copies = texts + texts[:20] + [""]
    assert prepare([write_jsonl("t.jsonl", copies)], "out", "validation_fraction=0.3", "shard_bytes=1000") == 0
    train, validation = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "validation")
    assert not set(train) & set(validation)
    assert Counter(train + validation) == Counter(copies[:-1])
    # 60 texts, 30 %: mean 18, standard deviation sqrt(60 * 0.3 * 0.7) = 3.5; 4 sigma.
    assert abs(len(set(validation)) - 18) < 14.2
    assert Manifest.load(tmp_path / "out").empty_documents == 1


def test_unigram_entropies(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    """Against the definition, token by token."""
    assert prepare([write_jsonl("t.jsonl", texts)], "out", "validation_fraction=0.3") == 0
    tokens = {}
    for split in ("train", "validation"):
        corpus = IndexedTokens(tmp_path / "out" / split, vocab_size=280)
        tokens[split] = [t for i, n in enumerate(corpus.lengths) for t in corpus.read(i, 0, int(n)).tolist()]
    train, validation = Counter(tokens["train"]), Counter(tokens["validation"])
    n = len(tokens["validation"])
    cross = -sum(math.log((train[t] + 1) / (len(tokens["train"]) + 280)) for t in tokens["validation"]) / n
    own = -sum(math.log(validation[t] / n) for t in tokens["validation"]) / n
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.unigram is not None
    # float64 sums of at most 280 terms
    assert manifest.unigram.validation_cross_entropy == pytest.approx(cross, rel=1e-12)
    assert manifest.unigram.validation_entropy == pytest.approx(own, rel=1e-12)
    assert manifest.splits["train"].tokens == len(tokens["train"])
    held_out = "".join(decoded(tmp_path / "out", "validation"))
    assert manifest.splits["validation"].text_bytes == len(held_out.encode())


def many_files(write_jsonl, texts) -> list[Path]:
    return [write_jsonl(f"in/{i}.jsonl", texts[i::6]) for i in range(6)]


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((directory / "shards").glob("*.bin"))}


DIES_IN_THIRD = """
import os, signal, sys
from data_prep.__main__ import main
from data_prep.progress import Progress

def advance(progress, _):
    if progress._path.stem == "00002":
        os.kill(os.getpid(), signal.SIGKILL)

Progress.advance = advance
main(sys.argv[1:])
"""


def test_killed_run_goes_on_where_it_was(prepare, arguments, write_jsonl, texts, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third shard; the next run redoes that one and leaves the first two alone."""
    files = many_files(write_jsonl, texts)
    assert prepare(files, "whole", "shard_bytes=1") == 0
    command = [sys.executable, "-c", DIES_IN_THIRD, *arguments(files, "killed", "shard_bytes=1")]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL

    before = times(tmp_path / "killed")
    assert {name.split(".")[0] for name in before} == {"00000", "00001"}
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert prepare(files, "killed", "shard_bytes=1") == 0
    after = times(tmp_path / "killed")
    assert all(after[name] == when for name, when in before.items())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_only_changed_shards_are_redone(prepare, write_jsonl, texts, tmp_path: Path, capsys) -> None:
    tokenizer = tmp_path / "whole" / "tokenizer.json"
    files = many_files(write_jsonl, texts)
    assert prepare(files, "whole", "shard_bytes=1") == 0
    fixed = ("shard_bytes=1", f"tokenizer.path='{tokenizer}'")
    assert prepare(files, "out", *fixed, bpe=False) == 0
    before = times(tmp_path / "out")
    assert prepare(files, "out", *fixed, bpe=False) == 0
    assert "up to date" in capsys.readouterr().err
    assert times(tmp_path / "out") == before

    write_jsonl("in/3.jsonl", ["a new text"])
    assert prepare(files, "out", *fixed, bpe=False) == 0
    after = times(tmp_path / "out")
    assert {name.split(".")[0] for name in before if after[name] != before[name]} == {"00003"}
    assert "a new text" in decoded(tmp_path / "out", "train")

    assert prepare(files[:5], "out", *fixed, bpe=False) == 0
    assert not list((tmp_path / "out" / "shards").glob("00005*"))
    (tmp_path / "out" / "train.bin").write_bytes(b"")
    assert prepare(files[:5], "out", *fixed, bpe=False) == 0
    assert len(decoded(tmp_path / "out", "train")) == 41


def test_another_tokenizer_redoes_everything(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    source = write_jsonl("t.jsonl", texts)
    assert prepare([source], "out") == 0
    before = times(tmp_path / "out")
    assert prepare([source], "out", "tokenizer.vocab_size=270") == 0
    assert times(tmp_path / "out")["00000.train.bin"] != before["00000.train.bin"]
    assert Manifest.load(tmp_path / "out").tokenizer.vocab_size == 270
    assert decoded(tmp_path / "out", "train") == texts


def test_shards_can_be_dropped(prepare, write_jsonl, texts, tmp_path: Path, capsys) -> None:
    source = write_jsonl("t.jsonl", texts)
    assert prepare([source], "out", "keep_shards=false") == 0
    assert not (tmp_path / "out" / "shards").exists()
    assert prepare([source], "out", "keep_shards=false") == 0
    assert "up to date" in capsys.readouterr().err


def test_defects_stop_or_are_reported(prepare, write_jsonl, texts, tmp_path: Path, capsys) -> None:
    source = write_jsonl("t.jsonl", texts)
    source.write_bytes(source.read_bytes() + b'{"text": "cut\n')
    assert prepare([source], "out") == 2
    message = capsys.readouterr().err
    assert "t.jsonl:61" in message
    assert "on_error=skip" in message
    assert "Traceback" not in message
    assert prepare([source], "out", "on_error=skip") == 0
    assert "t.jsonl:61: not JSON" in capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.defects == 1
    assert manifest.defect_examples[0].startswith("t.jsonl:61: not JSON")
    assert decoded(tmp_path / "out", "train") == texts


def test_special_token_in_text_ends_no_document(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    odd = [*texts, "before <|endoftext|> after"]
    assert prepare([write_jsonl("t.jsonl", odd)], "out") == 0
    assert decoded(tmp_path / "out", "train") == odd


@pytest.mark.slow
def test_two_processes_make_the_same(prepare, write_jsonl, texts, tmp_path: Path, capsys) -> None:
    files = many_files(write_jsonl, texts)
    assert prepare(files, "one", "shard_bytes=1") == 0
    assert prepare(files, "two", "shard_bytes=1", "num_workers=2") == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    """Else they would wait for ever, or write into the shards of the next start."""
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\n"
        "def keep(document):\n"
        "    pathlib.Path(__file__).with_name(f'{os.getpid()}.pid').touch()\n"
        "    time.sleep(60)\n"
        "    return True\n"
    )
    command = [sys.executable, "-m", "data_prep", "recipe=files", "filters.hooks=['slow:keep']", "num_workers=2"]
    command += [f"input.paths=[{tmp_path}/in]", f"output={tmp_path}/out", "shard_bytes=1"]
    assert prepare(many_files(write_jsonl, texts), "first") == 0
    command += [f"tokenizer.path={tmp_path}/first/tokenizer.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as started:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        started.kill()
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(lives(worker) for worker in workers))


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for has an empty command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_preparation_at_a_time(prepare, write_jsonl, texts, tmp_path: Path, capsys) -> None:
    source = write_jsonl("t.jsonl", texts)
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert prepare([source], "out") == 2
    assert "another preparation is writing there" in capsys.readouterr().err
    os.close(descriptor)
    assert prepare([source], "out", "tokenizer.vocab_size=260") == 0


def test_a_log_file_tells_how_far_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bars are not shown."""
    monkeypatch.setattr(prepare_module, "_LINE_SECONDS", 0.0)
    console = Console(file=StringIO(), force_terminal=False)
    progress = prepare_module._progress(console)
    bar = progress.add_task("tokens", total=100, amount="0.1 MB")
    progress.add_task("manifest", total=1, amount="", start=False)
    look = prepare_module._log_lines(progress, console)
    for done in (20, 40):
        progress.update(bar, completed=done)
        look()
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "tokens: 20% of 0.1 MB, 0:00:00, ETA ?"
    assert re.fullmatch(r"tokens: 40% of 0.1 MB, 0:00:0\d, ETA 0:00:0\d", lines[1])
    assert len(lines) == 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(prepare, write_jsonl, texts, tmp_path: Path, monkeypatch, capsys) -> None:
    """As the kernel does when memory runs out: the run must end with a message, and go on the next time."""
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib\n"
        "def keep(document):\n"
        "    if pathlib.Path(__file__).with_name('armed').exists() and document.text.endswith(' 2'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = many_files(write_jsonl, texts)
    assert prepare(files, "first", "shard_bytes=1") == 0
    settings = ("shard_bytes=1", "num_workers=2", f"tokenizer.path='{tmp_path}/first/tokenizer.json'")
    hooks = "filters.hooks=['deadly:keep']"
    (tmp_path / "armed").touch()
    assert prepare(files, "out", *settings, hooks, bpe=False) == 2
    assert "a worker process died" in capsys.readouterr().err
    (tmp_path / "armed").unlink()
    assert prepare(files, "out", *settings, hooks, bpe=False) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "first")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["num_workers=0"], "at least 1"),
        (["filters.min_characters=9", "filters.max_characters=3"], "at least 9"),
        (["executor.kind=slurm"], "executor.partition=NAME"),
        (["long.kind=retrieval", "long.lengths=[100]"], "at least 1024"),
        (["long.kind=pack", "long.lengths=[]"], "long.lengths"),
        (["validation_fraction=1.0"], "share of the documents"),
        (["tokenizer.vocab_size=100"], "at least 257"),
        (["tokenizer.vocab_size=20000"], "too little text"),
        (["tokenizer.path=tekken"], "trained, not loaded"),
        (["tokenizer.kind=pretrained"], "needs one"),
        (["on_eror=skip"], "on_error"),
        (["validation_fraction=0.0000001"], "holds out none"),
        (["input.text_field=body"], "no key 'body'"),
        (
            ["input.text_field=body", "on_error=skip", "tokenizer.kind=pretrained", "tokenizer.path=tekken"],
            "0 empty, 60 defective, 0 dropped, 0 held out; t.jsonl:1: no key 'body'",
        ),
    ],
)
def test_user_errors_exit_with_2(prepare, write_jsonl, texts, overrides, expected, capsys) -> None:
    assert prepare([write_jsonl("t.jsonl", texts)], "out", *overrides) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


def test_help_names_every_key(capsys) -> None:
    from data_prep.__main__ import main

    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("quickstart", "input.paths", "tokenizer.kind", "validation_fraction", "num_workers"):
        assert word in text
