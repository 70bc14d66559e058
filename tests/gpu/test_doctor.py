"""The doctor's checks on a GPU."""

from __future__ import annotations

import pytest
import torch

from nemotron3_megatron.platform.checks.performing import perform_apart
from nemotron3_megatron.platform.checks.registry import CHECKS
from nemotron3_megatron.platform.kernel_cache import use_kernel_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.timeout(900)
def test_no_kernel_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    """Speeds are measured, not judged: others may be using the GPU."""
    use_kernel_cache()
    results = {result.name: result for result in perform_apart(CHECKS, torch.device("cuda", 0), torch.bfloat16)}
    with capsys.disabled():
        for result in results.values():
            print(result.name, result.verdict, f"{result.seconds:.1f} s", result.reason, result.outcome)
    assert results.keys() == {check.name for check in CHECKS}
    for result in results.values():
        assert not result.traceback, result.traceback
        assert all(each.passed for each in result.outcome.comparisons), result
        assert result.outcome.comparisons or result.outcome.measurements or result.verdict == "skipped", result.reason
    assert results["BF16 product"].outcome.measurements[0].value > 0
