"""What ranks do in the tests of verification and self-test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from emulation import blocky_run
from layouts import started
from torch import Tensor

from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.lowering.torch import installed_gemms, lower, trial
from nemotron3_megatron.precision.operands import gemms
from nemotron3_megatron.precision.plan import PrecisionPlan, precision_plan
from nemotron3_megatron.precision.policy import Nvfp4, Policy, Rule
from nemotron3_megatron.precision.selftest import Linear, PrecisionSelfTestError, directions, self_test
from nemotron3_megatron.precision.verify import PrecisionMismatchError, verify

POLICY = Policy(
    default="nvfp4", rules=(Rule(format="mxfp8", role=("mamba.out_proj",)), Rule(format="bf16", layers=("last 2",)))
)


def verification(pp: int) -> dict[str, str]:
    """The message of ``verify`` after each kind of damage to rank 1's last chunk; empty where it is content."""
    messages = {}
    with started({"pp": pp}, blocky_run) as trainer:
        plan = precision_plan(POLICY, trainer.run.model)
        generator = torch.Generator()
        chunks = trainer.chunks
        messages["nothing installed"] = _verify(plan, chunks)
        lower(plan, chunks, generator)
        messages["as planned"] = _verify(plan, chunks)
        name, module = next((n, m) for n, m in named_linears(chunks[-1]).items() if installed_gemms(m))
        kept = module.gemm
        if torch.distributed.get_rank() == 1:
            module.gemm = type(kept)(gemms("nvfp4", Nvfp4(hadamard=None)), generator)
        messages["no rotation on rank 1"] = _verify(plan, chunks)
        module.gemm = kept
        more = replace(plan.rows[0], module="decoder.layers.99.mixer.in_proj")
        messages["planned and not built"] = _verify(PrecisionPlan((*plan.rows, more)), chunks)
        messages["built and not planned"] = _verify(PrecisionPlan(plan.rows[1:]), chunks)
        messages["damaged"] = name
    return messages


def _verify(plan: PrecisionPlan, chunks: Any) -> str:
    try:
        verify(plan, chunks, installed_gemms)
    except PrecisionMismatchError as error:
        return str(error)
    return ""


def trials() -> dict[str, str]:
    """The message of ``self_test`` for sound linears, and for ones that are broken on rank 1 only."""
    messages = {}
    with started({}, blocky_run) as trainer:
        used = directions(precision_plan(POLICY, trainer.run.model))
        sound = {name: trial(operands, torch.Generator()) for name, operands in used.items()}

        def broken(change: Any) -> dict[str, Linear]:
            def linear(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                results = sound["nvfp4"](x, w, dy)
                return change(x, w, dy, *results) if torch.distributed.get_rank() == 1 else results

            return {**sound, "nvfp4": linear}

        nearest = trial(gemms("nvfp4", Nvfp4(stochastic_rounding=None)), torch.Generator())
        cases = {
            "sound": sound,
            "zeros": broken(lambda x, w, dy, y, dx, dw: (y, torch.zeros_like(dx), dw)),
            "nan": broken(lambda x, w, dy, y, dx, dw: (y, dx, dw * torch.nan)),
            "not quantised": broken(lambda x, w, dy, y, dx, dw: (x @ w.T, dx, dw)),
            "not stochastic": {**sound, "nvfp4": nearest},
        }
        for name, linears in cases.items():
            try:
                self_test(used, linears, torch.device("cpu"), torch.float32)
                messages[name] = ""
            except PrecisionSelfTestError as error:
                messages[name] = str(error)
    return messages
