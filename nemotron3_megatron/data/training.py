"""What the loop calls: the micro-batches of the next step, and the position they leave behind.

The samples of a step are a function of (seed, blend, counts) only. Every rank computes the same list and reads its
own part; a layout decides who reads what, never what is read. Steps are prepared ahead in one thread, from positions
computed beforehand, so the saved position is that of the steps handed out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import SourceConfig
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.data.blend import Blend, fingerprint
from nemotron3_megatron.data.position import Position, Sample
from nemotron3_megatron.data.source import Source, open_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one rank's part of a global batch."""

    sources: Mapping[str, Source]
    blend: Blend
    mtp_depths: int
    eod_token: int
    isolate_documents: bool
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int

    @classmethod
    def open(
        cls, configs: Mapping[str, SourceConfig], run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int
    ) -> Reader:
        """Open the sources of a blend for a rank.

        Raises:
            UserError: a source cannot be read, or the weights are unusable.
        """
        data, model = run.data, run.model
        return cls(
            sources=open_sources(
                configs,
                seed=run.seed,
                vocab_size=model.vocab_size,
                document_end=data.eod_token if data.isolate_documents else None,
            ),
            blend=Blend({name: config.weight for name, config in configs.items()}),
            mtp_depths=model.mtp_depths,
            eod_token=data.eod_token,
            isolate_documents=data.isolate_documents,
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_rank=cp_rank,
            cp_size=cp_size,
        )

    def read(self, stage: Stage, samples: list[Sample]) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch, in order.

        Micro-batch m of rank r holds samples ``(m * dp_size + r) * micro_batch_size`` and the following.
        """
        size = stage.micro_batch_size
        if len(samples) != stage.num_microbatches * self.dp_size * size:
            raise ValueError(f"{len(samples)} samples are not num_microbatches * dp_size * micro_batch_size")
        starts = range(self.dp_rank * size, len(samples), self.dp_size * size)
        return [self._micro_batch(stage.seq_length, samples[start : start + size]) for start in starts]

    def _micro_batch(self, seq_length: int, samples: list[Sample]) -> MicroBatch:
        windows = np.stack([self.sources[name].sample(seq_length, index) for name, index in samples])
        batch = build_micro_batch(
            torch.from_numpy(windows),
            mtp_depths=self.mtp_depths,
            eod_token=self.eod_token,
            isolate_documents=self.isolate_documents,
        )
        return batch.shard(self.cp_rank, self.cp_size)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step being prepared."""

    stage: Stage
    after: Position
    batches: Future[list[MicroBatch]]


class TrainingData:
    """The training stream of one rank; all ranks of one (dp, cp) coordinate see the same."""

    def __init__(self, run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int) -> None:
        """Open the blend ``run.data.sources``.

        Raises:
            UserError: a source cannot be read, or the weights are unusable.
        """
        self._reader = Reader.open(run.data.sources, run, dp_rank, dp_size, cp_rank, cp_size)
        self._seed = run.seed
        self._num_prefetch = run.data.num_prefetch
        self._position = Position()
        self._ahead: deque[_Ahead] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-data")

    def next_step(self, stage: Stage) -> list[MicroBatch]:
        """The next optimizer step's micro-batches of this rank: ``stage.num_microbatches`` of them.

        Raises:
            UserError: the data is unusable (see Source.sample).
        """
        if self._ahead and self._ahead[0].stage != stage:
            self._forget_ahead()
        while len(self._ahead) <= self._num_prefetch:
            self._prepare(stage)
        batches = self._ahead[0].batches.result()
        self._position = self._ahead.popleft().after
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Position after the steps handed out, as plain ints and strings; independent of the layout."""
        return {
            "seed": self._seed,
            "blend": fingerprint(self._reader.blend, self._identities()),
            "sources": self._identities(),
            "shares": {name: str(share) for name, share in self._reader.blend.shares.items()},
            **self._position.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], allow_data_change: bool = False) -> None:
        """Continue from a saved position.

        Where a changed blend is allowed, sources of unchanged content go on where they were, others start at
        their beginning, and the shares hold from here on.

        Raises:
            UserError: seed or blend differ from the saved ones and ``allow_data_change`` is false.
        """
        position = Position.from_dict(state)
        changes = self._changes(state)
        if changes and not allow_data_change:
            raise UserError(
                "the data differs from the checkpoint's",
                where="data",
                why="; ".join(changes),
                nearest="the checkpoint's data, or checkpoint.allow_data_change=true to go on with the new one",
            )
        if changes:
            logger.warning("going on with data that differs from the checkpoint's: %s", "; ".join(changes))
            identities = self._identities()
            kept = {name for name, identity in state["sources"].items() if identities.get(name) == identity}
            position = position.under_new_blend(kept if state["seed"] == self._seed else set())
        self._forget_ahead()
        self._position = position

    def close(self) -> None:
        """Stop preparing steps."""
        self._forget_ahead()
        self._thread.shutdown()

    def _prepare(self, stage: Stage) -> None:
        start = self._ahead[-1].after if self._ahead else self._position
        samples, after = start.draw(self._reader.blend, stage.seq_length, stage.global_batch_size)
        self._ahead.append(_Ahead(stage, after, self._thread.submit(self._reader.read, stage, samples)))

    def _forget_ahead(self) -> None:
        for step in self._ahead:
            step.batches.cancel()
        self._ahead.clear()

    def _identities(self) -> dict[str, str]:
        return {name: self._reader.sources[name].identity for name in self._reader.blend.shares}

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        """What differs between the saved data and this one, in words."""
        changes = [] if state["seed"] == self._seed else [f"seed is {self._seed}, was {state['seed']}"]
        identities = self._identities()
        shares = self._reader.blend.shares
        for name in sorted(set(identities) | set(state["sources"])):
            was, now = state["sources"].get(name), identities.get(name)
            if was is None or now is None:
                changes.append(f"source {name!r} is {'gone' if now is None else 'new'}")
            elif was != now:
                changes.append(f"source {name!r} has other content ({now}; was {was})")
            elif state["shares"][name] != str(shares[name]):
                changes.append(f"source {name!r} has the share {shares[name]}, was {state['shares'][name]}")
        return changes


class ValidationData:
    """The same held-out batches at every evaluation, whatever the layout."""

    def __init__(self, run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int) -> None:
        """Open the blend ``run.data.validation``; without sources there are no batches.

        Raises:
            UserError: a source cannot be read, or the weights are unusable.
        """
        configs = run.data.validation
        self._reader = Reader.open(configs, run, dp_rank, dp_size, cp_rank, cp_size) if configs else None
        self._eval_batches = run.telemetry.eval_batches

    def batches(self, stage: Stage) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``telemetry.eval_batches`` global batches of the stage's size.

        There are ``eval_batches * stage.num_microbatches`` of them. They are the beginning of the blend's stream;
        a corpus with fewer windows is read again from its beginning.

        Raises:
            UserError: the data is unusable (see Source.sample).
        """
        if self._reader is None:
            return
        position = Position()
        for _ in range(self._eval_batches):
            samples, position = position.draw(self._reader.blend, stage.seq_length, stage.global_batch_size)
            yield from self._reader.read(stage, samples)
