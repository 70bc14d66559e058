"""Tokens a second of one core: data_prep, Megatron-LM's preprocess_data.py loop, and the bare ``tokenizers`` library.

    apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb . && tar -xf usr/src/linux-source-6.1.tar.xz
    python benchmarks/tokenization.py corpus=linux-source-6.1 rounds=9 slice_mb=16 [tokenizer=FILE]

Every peer runs in its own process, all pinned to the same core. In each round each of them tokenises the same slice of
the corpus, one after the other in an order that rotates, so that a busy machine slows all of them; what counts is the
median over the rounds of their ratio. Time is CPU time of a process with its children, and time on the clock. All read
the same JSONL file, except ``bare``, which gets its texts in memory and only counts tokens: it is what the library
itself can do. All must count the same tokens, and ours and megatron's must write the same bytes.

- ours: the pipeline of ``python -m data_prep recipe=files``: read, decide the side, tokenise, count, write, hash.
- megatron: what tools/preprocess_data.py does with --workers 1 --append-eod: a pool encodes document by document, the
  main process writes with IndexedDatasetBuilder. (It encodes with ``tokenizers`` itself, not through transformers.)
- bare: ``Tokenizer.encode_batch`` on batches of 1 MB; bare_fast: ``encode_batch_fast``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import nemotron3_megatron  # noqa: F401  adapts Megatron-Core to this machine before it is imported

if TYPE_CHECKING:
    import tokenizers

BATCH_BYTES = 1_000_000
VOCABULARY = 32_768
"""Entries of the tokenizer that is trained when none is given."""

Work = Callable[[Path, Path, Path], int]
"""Tokenise a JSONL file with a tokenizer.json into a directory; how many tokens."""


def texts_of(source: Path) -> Iterator[str]:
    """The documents of a JSONL file."""
    with source.open() as stream:
        for line in stream:
            yield json.loads(line)["text"]


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in batches of about BATCH_BYTES."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def loaded(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json for which special tokens spelt out in a text are text, as they are for ours."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def ours(source: Path, tokenizer: Path, output: Path) -> int:
    """The whole command, without starting Python and without composing its recipe (0.2 s)."""
    from rich.console import Console

    from data_prep.prepare import prepare
    from data_prep.recipe import InputConfig, PreparationRecipe, TokenizerConfig

    recipe = PreparationRecipe(
        name="files",
        input=InputConfig(paths=(str(source),)),
        output=str(output),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        num_workers=1,
    )
    manifest = prepare(recipe, Console(stderr=True, quiet=True))
    assert manifest is not None
    return manifest.splits["train"].tokens


class _Encoder:
    """Megatron-LM's Encoder: a tokenizer in each worker, one document at a time."""

    tokenizer: tokenizers.Tokenizer | None = None

    def __init__(self, path: Path, eod: int) -> None:
        self._path = path
        self._eod = eod

    def initialise(self) -> None:
        _Encoder.tokenizer = loaded(self._path)

    def encode(self, line: str) -> list[int]:
        assert _Encoder.tokenizer is not None
        return [*_Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, self._eod]


def megatron(source: Path, tokenizer: Path, output: Path) -> int:
    """tools/preprocess_data.py: Pool.imap with chunks of 32 lines, then IndexedDatasetBuilder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from nemotron3_megatron.data.tokenizer import load_tokenizer

    output.mkdir(parents=True, exist_ok=True)
    known = load_tokenizer(tokenizer)
    encoder = _Encoder(tokenizer, known.eod)
    builder = IndexedDatasetBuilder(str(output / "train.bin"), dtype=DType.optimal_dtype(known.vocab_size))
    tokens = 0
    fork = multiprocessing.get_context("fork")
    with source.open() as stream, fork.Pool(1, initializer=encoder.initialise) as pool:
        for ids in pool.imap(encoder.encode, stream, 32):
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
        pool.close()
        pool.join()  # so that the CPU time of the worker counts
    builder.finalize(str(output / "train.idx"))
    return tokens


class Bare:
    """The library alone; texts are in memory before the clock starts."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._texts: list[str] = []
        self._encode: Callable[[list[str]], list[tokenizers.Encoding]]

    def load(self, source: Path, tokenizer: Path) -> None:
        """What is not timed."""
        self._texts = list(texts_of(source))
        self._encode = partial(getattr(loaded(tokenizer), self._method), add_special_tokens=False)

    def __call__(self, source: Path, tokenizer: Path, output: Path) -> int:
        return sum(len(encoding) + 1 for batch in batches(self._texts) for encoding in self._encode(batch))


PEERS: dict[str, Work] = {
    "ours": ours,
    "megatron": megatron,
    "bare": Bare("encode_batch"),
    "bare_fast": Bare("encode_batch_fast"),
}


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


@dataclass(frozen=True, slots=True)
class Result:
    """What a peer made of a file."""

    tokens: int
    cpu_seconds: float
    seconds: float
    peak_mib: float
    """Of its process so far, and the largest of its children."""
    digest: str | None
    """Of what it wrote."""


def peer(name: str, tokenizer: Path, connection: Connection) -> None:
    """A peer's process: tokenises the files that are sent."""
    os.environ.update(RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work = PEERS[name]
    while (source := connection.recv()) is not None:
        with tempfile.TemporaryDirectory() as output:
            if isinstance(work, Bare):
                work.load(source, tokenizer)
            started, cpu_started = time.perf_counter(), cpu_seconds()
            tokens = work(source, tokenizer, Path(output) / "out")
            seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
            written = Path(output) / "out" / "train.bin"
            digest = hashlib.sha256(written.read_bytes()).hexdigest() if written.exists() else None
        own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        connection.send(Result(tokens, cpu, seconds, (own.ru_maxrss + children.ru_maxrss) / 1024, digest))


def slices(corpus: Path, megabytes: float, count: int, folder: Path) -> list[Path]:
    """JSONL files of about so many MB each (the first a tenth), of text files of the corpus in random order."""
    files = sorted(path for path in corpus.rglob("*") if path.is_file() and not path.is_symlink())
    random.Random(0).shuffle(files)
    found, remaining = [], iter(files)
    for number in range(count):
        path, size = folder / f"{number}.jsonl", 0
        with path.open("w") as stream:
            while size < megabytes * (1e6 if number else 1e5):
                try:
                    text = next(remaining).read_text()
                except UnicodeDecodeError:
                    continue
                except StopIteration:
                    raise SystemExit(f"{corpus} is too small for {count} slices of {megabytes} MB") from None
                if text:
                    stream.write(json.dumps({"text": text}) + "\n")
                    size += len(text)
        found.append(path)
    return found


def train(source: Path, path: Path) -> None:
    """A byte-level BPE of VOCABULARY entries, trained on one slice."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(source), trainer=trainer)
    tokenizer.save(str(path))


def main(arguments: Sequence[str]) -> None:
    """Measure and print a table."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    corpus, rounds = Path(settings["corpus"]), int(settings.get("rounds", "9"))
    folder = Path(tempfile.mkdtemp())
    files = slices(corpus, float(settings.get("slice_mb", "16")), rounds + 1, folder)
    tokenizer = Path(settings["tokenizer"]) if "tokenizer" in settings else folder / "tokenizer.json"
    if not tokenizer.exists():
        train(files[1], tokenizer)
    spawn = multiprocessing.get_context("spawn")
    connections = {}
    for name in PEERS:
        connections[name], theirs = spawn.Pipe()
        spawn.Process(target=partial(peer, name, tokenizer, theirs), daemon=False).start()
    results: list[dict[str, Result]] = []
    for number, source in enumerate(files):  # the first slice warms up: imports and compiled regular expressions
        order = [*PEERS][number % len(PEERS) :] + [*PEERS][: number % len(PEERS)]
        found: dict[str, Result] = {}
        for name in order:
            connections[name].send(source)
            found[name] = connections[name].recv()
        assert len({result.tokens for result in found.values()}) == 1, found
        assert found["ours"].digest == found["megatron"].digest, found
        results.append(found)
        print(
            number, {name: f"{found[name].tokens / found[name].cpu_seconds / 1e3:.0f}k/s" for name in PEERS}, flush=True
        )
    for connection in connections.values():
        connection.send(None)
    shutil.rmtree(folder)
    report(results[1:])


def report(rounds: Sequence[dict[str, Result]]) -> None:
    """One line a peer."""
    tokens = sum(found["ours"].tokens for found in rounds)
    print(f"{platform.processor() or platform.machine()}, {tokens:,} tokens, {time.strftime('%Y-%m-%d')}")
    print(f"{'peer':10} {'tokens/s a core':>16} {'ours is':>10} {'(rounds)':>14} {'on the clock':>13} {'peak MiB':>9}")
    for name in PEERS:
        ratios = sorted(found[name].cpu_seconds / found["ours"].cpu_seconds for found in rounds)
        speed = statistics.median(found[name].tokens / found[name].cpu_seconds for found in rounds)
        clock = statistics.median(found[name].seconds / found["ours"].seconds for found in rounds)
        spread = f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
        peak = max(found[name].peak_mib for found in rounds)
        print(f"{name:10} {speed:>16,.0f} {statistics.median(ratios):>9.2f}x {spread:>14} {clock:>12.2f}x {peak:>9.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
