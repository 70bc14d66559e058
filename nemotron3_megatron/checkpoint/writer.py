"""Megatron's torch_dist format, written by the training process itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save


class InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes the shards through torch's own file writer.

    Megatron-Core 0.19.2 routes even a blocking save through its asynchronous writer, which spawns a manager
    process per training process (dist_checkpointing/strategies/filesystem_async.py:65): seconds for a save of
    a few megabytes, and every entry script would have to be safe to import twice. Its errors lose their
    cause on the way (:307), so that a full disk reads as an assertion. The files are the same.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write this rank's shards and, on rank 0, the index. A collective.

        Raises:
            torch.distributed.checkpoint.CheckpointException: on every rank, when any rank failed; its
                ``failures`` hold the cause by rank.
        """
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save(
            mcore_to_pyt_state_dict(shards),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.thread_count, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
            ),
        )
