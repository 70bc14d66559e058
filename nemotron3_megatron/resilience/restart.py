"""Restarts by torchrun (``--max-restarts``): the new processes must not find the addresses of those that ended.

torchrun's agent keeps one store over all restarts (torch 2.11, ``_create_c10d_store``; pytorch issue 135712). What gloo
and NCCL left in it sends the new ranks to ports where nobody listens.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from nemotron3_megatron.config.errors import UserError

SEPARATE_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def restart_number(environment: Mapping[str, str]) -> int:
    """How often torchrun has restarted this process in the store that it shares; 0 in an ordinary start.

    Raises:
        UserError: on several nodes, where torchrun counts restarts differently on each.
    """
    number = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if number == 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return 0
    if environment.get("LOCAL_WORLD_SIZE") != environment.get("WORLD_SIZE"):
        raise UserError(
            "torchrun --max-restarts on several nodes",
            why="its store still holds the addresses of the processes that ended",
            nearest=f"{SEPARATE_STORES}=1 torchrun --max-restarts=N, on every node",
        )
    return number


def rendezvous(environment: Mapping[str, str], timeout: timedelta) -> dict[str, Any]:
    """Arguments of ``init_process_group`` that let a restarted world meet; empty in an ordinary start."""
    number = restart_number(environment)
    if number == 0:
        return {}
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return {"store": PrefixStore(f"restart_{number}", store), "rank": rank, "world_size": world_size}
