"""Which starts are restarts by torchrun; that they work is tested in ``tests/distributed/resilience``."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.resilience.restart import restart_number

SHARED = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 0),
        (SHARED | {"TORCHELASTIC_RESTART_COUNT": "0"}, 0),
        (SHARED | {"TORCHELASTIC_RESTART_COUNT": "2"}, 2),
        (SHARED | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "False"}, 0),
    ],
)
def test_restarts_are_counted_where_the_store_is_shared(environment: dict[str, str], number: int) -> None:
    assert restart_number(environment) == number


def test_several_nodes_need_stores_of_their_own() -> None:
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        restart_number(SHARED | {"TORCHELASTIC_RESTART_COUNT": "1", "WORLD_SIZE": "4"})
