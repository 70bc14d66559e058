"""The loss that is made with the output layer in one pass (its kernels interpreted) in training steps on two ranks.

Parameters that are gathered during the forward pass arrive by hooks on modules: one that is used past its module is
never waited for, and Megatron-Core fails in the second step.
"""

from __future__ import annotations

from typing import Any

import pytest
import vocabulary
from launch import run_ranks


@pytest.mark.parametrize(
    "layout",
    [{"overlap": True}, {"tp": 2}],
    ids=["parameters_gathered_in_the_forward_pass", "vocabulary_on_two_ranks"],
)
def test_training_is_that_of_logits_and_loss(layout: dict[str, Any]) -> None:
    """Bounds as in test_layouts: the same float32 sums in another order."""
    expected = run_ranks(vocabulary.steps, 2, layout=layout, one_pass=False)[0]
    found = run_ranks(vocabulary.steps, 2, env={"TRITON_INTERPRET": "1"}, layout=layout, one_pass=True)[0]
    assert len(found) == 3
    for step, reference in zip(found, expected, strict=True):
        assert step[:-1] == pytest.approx(reference[:-1], rel=1e-6)
        assert step[-1] == pytest.approx(reference[-1], rel=1e-4)
