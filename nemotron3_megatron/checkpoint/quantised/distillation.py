"""Quantisation-aware distillation: a quantised model learns to predict what the model it was made from predicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import modelopt.torch.distill as mtd
import torch
from torch import Tensor, nn

from nemotron3_megatron.config.recipe import OptimizerConfig
from nemotron3_megatron.data.batch import MicroBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """How long and how fast."""

    steps: int
    batch: int
    """Sequences of a step."""
    lr: float
    """Constant, and without weight decay: the weights are to stay near the teacher's."""


def distil(
    student: nn.Module,
    teacher: nn.Module,
    rule: Distillation,
    optimizer: OptimizerConfig,
    batches: Iterator[MicroBatch],
    logits: Callable[[nn.Module, MicroBatch], Tensor],
) -> list[float]:
    """Train the student's weights by AdamW on float32 copies; its scales, and MTP, stay as they are.

    The loss is ModelOpt's, KL(teacher || student) of every position's next token. Rounding passes gradients through.
    Both are in evaluation mode: the router balances nothing.

    Args:
        student: calibrated.
        teacher: as trained.
        rule: steps, batch and learning rate.
        optimizer: moments' decay and the largest norm of a gradient.
        batches: of one sequence each.
        logits: of a model for a batch.

    Returns:
        The mean loss of each step, in nats per token, before its update.
    """
    trained = [each for name, each in student.named_parameters() if not name.startswith("mtp.")]
    masters = [each.detach().float().clone() for each in trained]
    betas = (optimizer.adam_beta1, optimizer.adam_beta2)
    adam = torch.optim.AdamW(masters, rule.lr, betas, optimizer.adam_eps, weight_decay=0.0)
    divergence = mtd.LogitsDistillationLoss(reduction="none")
    losses = []
    for step in range(rule.steps):
        total = 0.0
        for _ in range(rule.batch):
            batch = next(batches)
            with torch.no_grad():
                target = logits(teacher, batch)
            loss = divergence(logits(student, batch).float(), target.float()).mean() / rule.batch
            loss.backward()
            total += loss.item()
        for master, parameter in zip(masters, trained, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, optimizer.clip_grad)
        adam.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        losses.append(total)
        _log.info("distillation step %d of %d: %.3g nats per token from the teacher", step + 1, rule.steps, total)
    return losses
