"""Long sequences on CUDA kernels: isolated documents under context parallelism, and Mamba-2 in parts."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from isolation import LAST_OF_A, logit_changes
from launch import run_ranks
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
    pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm"),
]

BF16 = 2e-2
"""Relative distance of two BF16 computations of one thing, as in test_specs.py."""
HEADS, GROUPS, WIDTH, LENGTH = 8, 2, 64, 1024


@pytest.mark.parametrize("cp", [1, 2])
def test_documents_do_not_see_each_other(cp: int) -> None:
    """Another token in document A moves A's logits; B's by rounding at most (experts' rows lie elsewhere)."""
    if torch.cuda.device_count() < cp:
        pytest.skip(f"needs {cp} GPUs")
    common = {"cp": cp, "device": "cuda", "spec": "te", "dtype": "bf16"}
    worlds = {"isolated": common, "open": common | {"isolate_documents": False}}
    changes = run_ranks(logit_changes, cp, timeout_s=500, worlds=worlds)[0]
    isolated, unpacked = changes["isolated"], changes["open"]
    assert min(isolated[LAST_OF_A - 1 : LAST_OF_A + 1]) > 0
    assert max(isolated[LAST_OF_A + 1 :]) < BF16 * max(isolated)
    assert max(unpacked[LAST_OF_A + 1 :]) > BF16 * max(unpacked), "without isolation later tokens must see it"


@pytest.mark.parametrize("rank", [0, 1])
def test_segments_on_transformer_engine(rank: int) -> None:
    """A rank's queries of two packed sequences, forward and backward, against dense masks in float32."""
    from transformer_engine.pytorch import DotProductAttention

    from nemotron3_megatron.model.attention import attention_in_blocks, zigzag_slices
    from nemotron3_megatron.model.documents import document_starts
    from nemotron3_megatron.model.segments import segment_attention

    kernel = DotProductAttention(HEADS, WIDTH, num_gqa_groups=GROUPS, attention_dropout=0.0, qkv_format="thd")

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, seen: Tensor, widest: int, longest: int) -> Tensor:
        mask = "padding_causal_bottom_right"
        bounds = {"cu_seqlens_q": ends, "cu_seqlens_kv": seen, "max_seqlen_q": widest, "max_seqlen_kv": longest}
        out: Tensor = kernel(q, k, v, qkv_format="thd", attn_mask_type=mask, **bounds)
        return out

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(LENGTH // 2, 2, HEADS, WIDTH), *[(LENGTH, 2, GROUPS, WIDTH)] * 2]
    exact = [torch.randn(s, device="cuda", generator=generator).bfloat16().float().requires_grad_() for s in shapes]
    rounded = [each.detach().bfloat16().requires_grad_() for each in exact]
    documents = (torch.rand(2, LENGTH, device="cuda", generator=generator) < 0.01).cumsum(1).to(torch.int32)
    slices = zigzag_slices(LENGTH, rank, 2)
    found = segment_attention(*rounded, documents, slices, attend)
    q, k, v = (each.permute(1, 2, 0, 3) for each in exact)
    blocks = attention_in_blocks(q, k, v, document_starts(documents), slices)
    expected = blocks.permute(2, 0, 1, 3).flatten(2)
    ahead = torch.randn(expected.shape, device="cuda", generator=generator)
    (found.float() * ahead).sum().backward()
    (expected * ahead).sum().backward()
    assert _distance(found, expected) < BF16
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert _distance(mine.grad, theirs.grad) < BF16


@pytest.mark.parametrize("parts", [2, 4])
def test_fused_scan_in_parts(parts: int) -> None:
    """Nano's widths (4 groups of 8 heads, state 128), two documents: parts and whole are one computation."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    from nemotron3_megatron.model.mamba_parts import MixWeights, mix_in_parts

    heads, groups, state = 32, 4, 128
    inner, convolved = heads * WIDTH, heads * WIDTH + 2 * groups * state
    generator = torch.Generator("cuda").manual_seed(0)
    zxbcdt = torch.randn(1, LENGTH, inner + convolved + heads, device="cuda", generator=generator).bfloat16()
    conv = torch.randn(convolved, 4, device="cuda", generator=generator).bfloat16()
    vectors = [torch.rand(heads, device="cuda", generator=generator) for _ in range(3)]
    leaves = [zxbcdt.requires_grad_(), conv.requires_grad_(), *(vector.requires_grad_() for vector in vectors)]
    documents = (torch.arange(LENGTH, device="cuda") > 300).int()[None]

    def mixed(count: int) -> Tensor:
        def mix(columns: Tensor, own: MixWeights) -> Tensor:
            options = {"chunk_size": 128, "activation": "silu", "headdim": WIDTH, "ngroups": groups // count}
            out: Tensor = mamba_split_conv1d_scan_combined(columns, *own[:4], D=own.D, seq_idx=documents, **options)
            return out

        weights = MixWeights(leaves[1], None, leaves[2], -leaves[3], leaves[4])
        return mix_in_parts(mix, leaves[0], weights, count, WIDTH)

    whole, found = mixed(1), mixed(parts)
    assert _distance(found, whole) < BF16
    gradients = [torch.autograd.grad(each.float().square().mean(), leaves) for each in (whole, found)]
    for expected, mine in zip(*gradients, strict=True):
        assert _distance(mine, expected) < BF16


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())
