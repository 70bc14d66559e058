"""Documents packed in one sequence do not see each other: Mamba state, convolution and attention, CP = 1 and 2.

(Megatron-Bridge pull requests #3474 and #3484: Mamba state leaked across packed documents, also under CP.)
"""

from __future__ import annotations

import pytest
from isolation import LAST_OF_A, logit_changes
from launch import run_ranks


@pytest.mark.parametrize("cp", [1, 2])
def test_last_token_of_one_document_moves_no_logit_of_the_next(cp: int) -> None:
    worlds = {"isolated": {"cp": cp}, "open": {"cp": cp, "isolate_documents": False}}
    changes = run_ranks(logit_changes, cp, worlds=worlds)[0]
    isolated, unpacked = changes["isolated"], changes["open"]
    assert max(isolated[: LAST_OF_A - 1]) == 0, "a token changed logits before it"
    assert min(isolated[LAST_OF_A - 1 : LAST_OF_A + 1]) > 0, "the token must change its own document's logits"
    assert max(isolated[LAST_OF_A + 1 :]) == 0, "the next document saw the token"
    assert min(unpacked[LAST_OF_A + 1 :]) > 0, "without isolation every later token must see it"
