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
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import SourceConfig
from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.data.blend import Blend
from nemotron3_megatron.data.composition import UNTAGGED, blends_of, check_amounts, tags_of
from nemotron3_megatron.data.content import Content
from nemotron3_megatron.data.made import warn_of_tokenizers
from nemotron3_megatron.data.position import Position, Sample
from nemotron3_megatron.data.source import Source, open_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one rank's part of a global batch."""

    sources: Mapping[str, Source]
    mtp_depths: int
    eod_token: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tags: Mapping[str, Tensor]
    """By source (t,) bool: which of ``tags_of`` it has; empty where there are none."""

    @classmethod
    def open(
        cls, configs: Mapping[str, SourceConfig], run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int
    ) -> Reader:
        """Open sources for a rank.

        Raises:
            UserError: a source cannot be read.
        """
        data, model = run.data, run.model
        return cls(
            sources=open_sources(
                configs,
                seed=run.seed,
                vocab_size=model.vocab_size,
                eod_token=data.eod_token,
                isolate_documents=data.isolate_documents,
            ),
            mtp_depths=model.mtp_depths,
            eod_token=data.eod_token,
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_rank=cp_rank,
            cp_size=cp_size,
            tags=_tags(configs, tags_of(data)),
        )

    def read(self, shape: Shape, samples: list[Sample]) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch, in order.

        Micro-batch m of rank r holds samples ``(m * dp_size + r) * micro_batch_size`` and the following.
        """
        size = shape.micro_batch_size
        if len(samples) != shape.num_microbatches * self.dp_size * size:
            raise ValueError(f"{len(samples)} samples are not num_microbatches * dp_size * micro_batch_size")
        starts = range(self.dp_rank * size, len(samples), self.dp_size * size)
        return [self._micro_batch(shape.seq_length, samples[start : start + size]) for start in starts]

    def _micro_batch(self, seq_length: int, samples: list[Sample]) -> MicroBatch:
        windows = np.stack([self.sources[name].sample(seq_length, index) for name, index in samples])
        batch = build_micro_batch(
            torch.from_numpy(windows),
            mtp_depths=self.mtp_depths,
            eod_token=self.eod_token,
            isolate_documents=[self.sources[name].isolate_documents for name, _ in samples],
        )
        tags = torch.stack([self.tags[name] for name, _ in samples]) if self.tags else None
        return replace(batch, tags=tags).shard(self.cp_rank, self.cp_size)


def _tags(configs: Mapping[str, SourceConfig], tags: tuple[str, ...]) -> dict[str, Tensor]:
    if not tags:
        return {}
    return {name: torch.tensor([tag == (config.tag or UNTAGGED) for tag in tags]) for name, config in configs.items()}


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step being prepared."""

    shape: Shape
    samples: list[Sample]
    after: Position
    batches: Future[list[MicroBatch]]


class TrainingData:
    """The training stream of one rank; all ranks of one (dp, cp) coordinate see the same."""

    def __init__(self, run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int) -> None:
        """Open all sources that the run's stages read.

        Raises:
            UserError: a source cannot be read, is too short or would be read too often, or weights are unusable.
        """
        self._blends = blends_of(run)
        used = {source for blend in self._blends.values() for source in blend.shares}
        configs = {name: config for name, config in run.data.sources.items() if name in used}
        self._reader = Reader.open(configs, run, dp_rank, dp_size, cp_rank, cp_size)
        check_amounts(run, self._blends, {name: source.num_tokens for name, source in self._reader.sources.items()})
        if dp_rank == cp_rank == 0:
            held_out = {f"{name} (validation)": config for name, config in run.data.validation.items()}
            warn_of_tokenizers({**configs, **held_out})
        identities = {name: source.identity for name, source in self._reader.sources.items()}
        self._content = Content.of(run, self._blends, identities)
        self._num_prefetch = run.data.num_prefetch
        self._position = Position()
        self._samples: list[Sample] = []
        self._lineage: list[dict[str, Any]] = []
        self._ahead: deque[_Ahead] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-data")

    @property
    def samples(self) -> list[Sample]:
        """Of the step handed out last, the whole global batch in order."""
        return self._samples

    def next_step(self, shape: Shape, *following: Shape) -> list[MicroBatch]:
        """The next optimizer step's micro-batches of this rank: ``shape.num_microbatches`` of them.

        Args:
            shape: of the step.
            following: shapes of the steps after it, which are prepared ahead; those not named are like the last.

        Raises:
            UserError: the data is unusable (see Source.sample).
        """
        known = [shape, *following]
        wanted = [known[min(place, len(following))] for place in range(self._num_prefetch + 1)]
        as_wanted = takewhile(lambda pair: pair[0].shape == pair[1], zip(self._ahead, wanted, strict=False))
        self._forget_ahead(keep=sum(1 for _ in as_wanted))
        for each in wanted[len(self._ahead) :]:
            self._prepare(each)
        batches = self._ahead[0].batches.result()
        done = self._ahead.popleft()
        self._position, self._samples = done.after, done.samples
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Position after the steps handed out, as plain ints and strings; independent of the layout."""
        return {**self._content.to_dict(), "lineage": self._lineage, **self._position.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any], allow_data_change: bool = False) -> None:
        """Continue from a saved position.

        Where a changed blend is allowed, sources of unchanged content go on where they were, others start at
        their beginning, and the shares hold from here on; what changed is kept in the state as ``lineage``.

        Raises:
            UserError: seed or blend differ from the saved ones and ``allow_data_change`` is false.
        """
        before, position = Content.from_dict(state), Position.from_dict(state)
        changes = list(self._content.changes_since(before))
        if changes and not allow_data_change:
            raise UserError(
                "the data differs from the checkpoint's",
                where="data",
                why="; ".join(changes),
                nearest="the checkpoint's data, or checkpoint.allow_data_change=true to go on with the new one",
            )
        self._lineage = list(state.get("lineage", ()))
        if changes:
            logger.warning("going on with data that differs from the checkpoint's: %s", "; ".join(changes))
            kept = self._content.unchanged_sources(before)
            self._lineage.append({"drawn": position.to_dict()["drawn"], "changes": changes})
            position = position.under_new_blend(kept)
        self._forget_ahead()
        self._position = position

    def close(self) -> None:
        """Stop preparing steps."""
        self._forget_ahead()
        self._thread.shutdown()

    def _prepare(self, shape: Shape) -> None:
        start = self._ahead[-1].after if self._ahead else self._position
        blend = self._blends[shape.blend]
        samples, after = start.draw(blend, shape.seq_length, shape.global_batch_size, shape.blend)
        self._ahead.append(_Ahead(shape, samples, after, self._thread.submit(self._reader.read, shape, samples)))

    def _forget_ahead(self, keep: int = 0) -> None:
        while len(self._ahead) > keep:
            self._ahead.pop().batches.cancel()


class ValidationData:
    """The same held-out batches at every evaluation, whatever the layout."""

    def __init__(self, run: Run, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int) -> None:
        """Open the blend ``run.data.validation``; without sources there are no batches.

        Raises:
            UserError: a source cannot be read, or is shorter than a sequence of a stage that will be validated, or the
                weights are unusable.
        """
        configs = run.data.validation
        self._reader = Reader.open(configs, run, dp_rank, dp_size, cp_rank, cp_size) if configs else None
        self._blend = Blend({name: config.weight for name, config in configs.items()}) if configs else None
        self._eval_batches = run.telemetry.eval_batches
        if self._reader is not None and self._blend is not None and run.telemetry.eval_every is not None:
            lengths = {stage.seq_length for stage in run.stages if stage.first_step < run.total_steps}
            for name in self._blend.shares:
                self._reader.sources[name].windows_per_epoch(max(lengths))

    def batches(self, shape: Shape) -> Iterator[MicroBatch]:
        """This rank's micro-batches of ``telemetry.eval_batches`` global batches of this shape.

        There are ``eval_batches * shape.num_microbatches`` of them. They are the beginning of the blend's stream;
        a corpus with fewer windows is read again from its beginning.

        Raises:
            UserError: the data is unusable (see Source.sample).
        """
        if self._reader is None or self._blend is None:
            return
        position = Position()
        for _ in range(self._eval_batches):
            samples, position = position.draw(self._blend, shape.seq_length, shape.global_batch_size)
            yield from self._reader.read(shape, samples)
