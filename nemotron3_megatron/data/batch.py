"""A micro-batch: what one forward pass reads, built from windows of consecutive tokens by a pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron3_megatron.platform.transfer import send

FEWEST_DOCUMENTS = 16
"""That :meth:`MicroBatch.boundaries` has room for."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tokens of ``b`` sequences of length ``s`` with their targets.

    With context parallelism ``s`` is this rank's part of the sequence (see ``shard``); document indices and
    positions keep their meaning in the whole sequence.
    """

    tokens: Tensor
    """(b, s) int64."""
    labels: Tensor
    """(1 + mtp_depths, b, s) int64; row d is the token d + 1 positions ahead, 0 where there is none."""
    loss_mask: Tensor
    """(1 + mtp_depths, b, s) float32; 1 where the label exists and, if isolated, is in the token's document."""
    position_ids: Tensor
    """(b, s) int64; restarts at 0 in each document when isolated."""
    documents: Tensor
    """(b, s) int32, non-decreasing along s: index of the token's document in its sequence; 0 if not isolated."""
    tags: Tensor | None = None
    """(b, t) bool: which of the data's t tags the source of each sequence has; None: losses are not told apart."""

    def boundaries(self) -> Tensor:
        """(n + 1,) int32 cumulative lengths of the documents, rows end to end, from 0 to all tokens.

        Documents of length 0 at the end make n a power of two, so that few different shapes occur.
        """
        starts = torch.ones_like(self.documents, dtype=torch.bool)
        starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        first = starts.flatten().nonzero().flatten().to(torch.int32)
        padding = max(FEWEST_DOCUMENTS, 1 << (len(first) - 1).bit_length()) - len(first) + 1
        return torch.cat([first, first.new_full((padding,), self.documents.numel())])

    def shard(self, cp_rank: int, cp_size: int) -> MicroBatch:
        """This context-parallel rank's part: chunks ``cp_rank`` and ``2 * cp_size - 1 - cp_rank`` of 2 * cp_size.

        The pairing balances causal attention and is the layout Megatron-Core's context parallelism expects.

        Raises:
            ValueError: the sequence length is not a multiple of 2 * cp_size, or the rank is out of range.
        """
        if not 0 <= cp_rank < cp_size:
            raise ValueError(f"cp_rank {cp_rank} is not in [0, {cp_size})")
        if cp_size == 1:
            return self
        length = self.tokens.shape[-1]
        if length % (2 * cp_size):
            raise ValueError(f"sequence length {length} is not a multiple of 2 * cp_size = {2 * cp_size}")
        pair = torch.tensor([cp_rank, 2 * cp_size - 1 - cp_rank], device=self.tokens.device)
        return self._map(lambda x: x.reshape(*x.shape[:-1], 2 * cp_size, -1).index_select(-2, pair).flatten(-2))

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on ``device``."""
        there = self._map(lambda x: send(x, torch.device(device)))
        return there if self.tags is None else replace(there, tags=send(self.tags, torch.device(device)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        return MicroBatch(
            tokens=function(self.tokens),
            labels=function(self.labels),
            loss_mask=function(self.loss_mask),
            position_ids=function(self.position_ids),
            documents=function(self.documents),
            tags=self.tags,
        )


def build_micro_batch(
    windows: Tensor, *, mtp_depths: int, eod_token: int, isolate_documents: bool | Sequence[bool]
) -> MicroBatch:
    """Split windows of s + 1 consecutive tokens into inputs and the targets of every prediction depth.

    A document ends with ``eod_token``, which belongs to it. A window may begin and end inside a document; its
    positions then count from the window's beginning.

    Args:
        windows: (b, s + 1) int64.
        mtp_depths: further prediction depths; depth d predicts d + 1 tokens ahead, depth 0 is the next token.
        eod_token: what a document ends with.
        isolate_documents: of each window, or of all; a window that is not isolated is one document.

    Raises:
        ValueError: windows is not two-dimensional or has fewer than 2 tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise ValueError(f"windows must be (b, s + 1) with s >= 1, got {tuple(windows.shape)}")
    length = windows.shape[1] - 1
    documents = _documents(windows, eod_token) * torch.as_tensor(isolate_documents, dtype=torch.int64).reshape(-1, 1)
    positions = _positions(documents[:, :-1])

    ahead = torch.arange(1, mtp_depths + 2)[:, None] + torch.arange(length)
    exists = ahead <= length
    ahead = ahead.clamp(max=length)
    same_document = documents[:, ahead] == documents[:, None, :-1]
    mask = (exists & same_document).transpose(0, 1)
    labels = torch.where(exists, windows[:, ahead], 0).transpose(0, 1)
    return MicroBatch(
        tokens=windows[:, :-1].contiguous(),
        labels=labels.contiguous(),
        loss_mask=mask.to(torch.float32).contiguous(),
        position_ids=positions,
        documents=documents[:, :-1].to(torch.int32).contiguous(),
    )


def _documents(windows: Tensor, eod_token: int) -> Tensor:
    """(b, s + 1) int64: the number of EODs before each token."""
    ends = (windows == eod_token).to(torch.int64)
    return ends.cumsum(dim=1) - ends


def _positions(documents: Tensor) -> Tensor:
    """(b, s) int64: distance of each token from the first token of its document inside the window."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
