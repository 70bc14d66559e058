"""What ranks do in the document isolation test: logits of a packed sequence before and after changing a token."""

from __future__ import annotations

import os
from typing import Any

import torch
from layouts import started
from tiny import EOD, SEQ_LENGTH, VOCABULARY

from nemotron3_megatron.data.batch import build_micro_batch
from nemotron3_megatron.train.step import Trainer

LAST_OF_A = 12
"""Position of document A's last token; document B starts after it. Not at a chunk or shard boundary."""


def logit_changes(worlds: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """For each layout: largest change of any logit at each position when A's last token changes (rank 0's view)."""
    port = int(os.environ["MASTER_PORT"])
    changes = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options) as trainer:
            changes[name] = _changes(trainer)
    return changes


@torch.no_grad()
def _changes(trainer: Trainer) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(1, VOCABULARY, (1, SEQ_LENGTH + 1), generator=generator)
    window[0, 4] = EOD
    window[0, LAST_OF_A] = EOD
    changed = window.clone()
    changed[0, LAST_OF_A - 1] = (window[0, LAST_OF_A - 1] % (VOCABULARY - 1)) + 1
    difference = (_logits(trainer, window) - _logits(trainer, changed)).abs().amax(dim=-1)[0]
    groups, whole = trainer.groups, torch.zeros(SEQ_LENGTH)
    positions = torch.arange(SEQ_LENGTH).chunk(2 * groups.cp.size())
    mine = torch.cat([positions[groups.cp.rank()], positions[2 * groups.cp.size() - 1 - groups.cp.rank()]])
    whole[mine if groups.cp.size() > 1 else torch.arange(SEQ_LENGTH)] = difference.float().cpu()
    whole = whole.to(trainer.platform.device)
    torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX)
    values: list[float] = whole.tolist()
    return values


def _logits(trainer: Trainer, window: torch.Tensor) -> torch.Tensor:
    batch = build_micro_batch(window, mtp_depths=2, eod_token=EOD, isolate_documents=True)
    batch = batch.shard(trainer.groups.cp.rank(), trainer.groups.cp.size()).to(trainer.platform.device)
    isolated = trainer.run.data.isolate_documents
    return trainer.chunks[0](batch.tokens, batch.position_ids, documents=batch.documents if isolated else None)
