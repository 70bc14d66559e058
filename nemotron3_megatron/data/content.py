"""What a run's data is, so that a change is seen on resume: contents of sources, and the shares each stage reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.blend import Blend

Shares = Mapping[str, str]
"""Fractions by source, such as ``7/10``."""


@dataclass(frozen=True, slots=True)
class Content:
    """All that decides which samples are drawn, but for the position."""

    seed: int
    sources: Mapping[str, str]
    """Identity by name; paths do not matter."""
    stages: Mapping[str, tuple[Shares, ...]]
    """The shares of each blend that a stage reads."""

    @classmethod
    def of(cls, run: Run, blends: Mapping[str | None, Blend], identities: Mapping[str, str]) -> Self:
        """The content of a run."""
        shares = {name: {source: str(part) for source, part in blend.shares.items()} for name, blend in blends.items()}
        return cls(
            seed=run.seed,
            sources=dict(identities),
            stages={
                stage.name: tuple(shares[name] for name in dict.fromkeys(shape.blend for shape in stage.shapes))
                for stage in run.stages
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain ints and strings."""
        stages = {name: [dict(shares) for shares in read] for name, read in self.stages.items()}
        return {"seed": self.seed, "sources": dict(self.sources), "stages": stages}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        stages = {name: tuple(read) for name, read in state["stages"].items()}
        return cls(state["seed"], state["sources"], stages)

    def changes_since(self, before: Content) -> Iterator[str]:
        """What differs, in words. A stage that was added or left out is no change: nothing of it was read."""
        if self.seed != before.seed:
            yield f"seed is {self.seed}, was {before.seed}"
        for name in sorted(set(self.sources) & set(before.sources)):
            was, now = before.sources[name], self.sources[name]
            if was != now:
                yield f"source {name!r} has other content ({now}; was {was})"
        several = len(self.stages) > 1
        for stage in (stage for stage in self.stages if stage in before.stages):
            where = f" in stage {stage}" if several else ""
            now_read, was_read = self.stages[stage], before.stages[stage]
            if len(now_read) != len(was_read):
                yield f"stage {stage} reads {len(now_read)} blends, was {len(was_read)}"
                continue
            for now_shares, was_shares in zip(now_read, was_read, strict=True):
                yield from (text + where for text in _share_changes(now_shares, was_shares))

    def unchanged_sources(self, before: Content) -> set[str]:
        """Sources that can go on where they were: same content, read in the same order."""
        if self.seed != before.seed:
            return set()
        return {name for name, identity in before.sources.items() if self.sources.get(name) == identity}


def _share_changes(now: Shares, was: Shares) -> Iterator[str]:
    for name in sorted(set(now) | set(was)):
        if name not in was:
            yield f"source {name!r} is new"
        elif name not in now:
            yield f"source {name!r} is gone"
        elif now[name] != was[name]:
            yield f"source {name!r} has the share {now[name]}, was {was[name]}"
