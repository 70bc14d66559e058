"""Our Mamba-2 kernels against other people's.

Hugging Face transformers' own pure-torch ``nemotron_h`` layers are always here (a dev dependency), but work in
float32 whatever they are given. mamba-ssm's and causal-conv1d's published reference functions also work in float64;
they come with the ``cuda`` extra, and their tests are skipped where it is not installed (they need no GPU, but the
packages do not build without CUDA's compiler). The definition itself, in float64, is the oracle of tests/unit/model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig

from nemotron3_megatron.model.conv import causal_conv1d
from nemotron3_megatron.model.gated_norm import GatedRMSNorm
from nemotron3_megatron.model.mamba2 import mamba2_mix
from nemotron3_megatron.model.ssd import ssd

FLOAT32 = 200 * 2.0**-24
"""Relative to the largest value: sums of at most n + q + p = 60 products, their decays, on both sides of a comparison,
forward and backward; test_ssd.py bounds our side elementwise."""


def draw(dtype: torch.dtype, batch: int = 2, seq: int = 75, groups: int = 2, rep: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, p, n = groups * rep, 8, 16
    tensors = dict(
        x=torch.randn(batch, seq, heads, p, generator=generator),
        dt=F.softplus(torch.randn(batch, seq, heads, generator=generator) - 3),
        A=-1 - 7 * torch.rand(heads, generator=generator),
        B=torch.randn(batch, seq, groups, n, generator=generator),
        C=torch.randn(batch, seq, groups, n, generator=generator),
        D=torch.randn(heads, generator=generator),
    )
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    """Values, and gradients of one random weighting by the leaves, relative to the largest of each."""
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours.dtype)
    pairs = [(ours, theirs)]
    if leaves:
        pairs += zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (ours, theirs)), strict=True)
    for index, (found, expected) in enumerate(pairs):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"output {index} (0: value, then gradients): {error:.1e}"


def test_ssd_against_transformers(nemotron_h: ModuleType) -> None:
    t = draw(torch.float32)
    ours = ssd(**t, chunk_size=16)
    theirs = nemotron_h.mamba2_chunk_scan(t["x"], *(t[k] for k in ("dt", "A", "B", "C")), chunk_size=16, D=t["D"])
    assert_same(ours, theirs, list(t.values()), FLOAT32)


def test_conv_against_transformers(nemotron_h: ModuleType) -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 33, 12), (12, 4), (12,)))
    theirs = nemotron_h.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert_same(causal_conv1d(x, weight, bias), theirs, [x, weight, bias], FLOAT32)


def test_gated_norm_against_transformers(nemotron_h: ModuleType) -> None:
    x, z = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 24, requires_grad=True)
    ours = GatedRMSNorm(24, eps=1e-5, group_size=8, norm_before_gate=False)
    theirs = nemotron_h.NemotronHRMSNormGated(24, group_size=8, eps=1e-5)
    weight = torch.nn.Parameter(torch.randn(24))
    ours.weight = theirs.weight = weight
    assert_same(ours(x, z), theirs(x, z), [x, z, weight], FLOAT32)


def test_mixer_against_transformers(nemotron_h: ModuleType) -> None:
    """The whole mixer. transformers clamps dt to time_step_min, which Megatron-Core does not: lifted here."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=32,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=16,
        layers_block_type=["linear_attention"],
        time_step_min=1e-30,
    )
    mixer = nemotron_h.NemotronHMamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        mixer.dt_bias.uniform_(-4, 0)
        mixer.norm.weight.uniform_(0.5, 2)
        mixer.D.uniform_(-1, 1)
    norm = GatedRMSNorm(32, eps=1e-5, group_size=16, norm_before_gate=False)
    norm.weight = mixer.norm.weight
    x = torch.randn(2, 41, 32, requires_grad=True)
    mixed = mamba2_mix(
        mixer.in_proj(x),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log),
        mixer.D,
        head_dim=8,
        num_groups=2,
        chunk_size=16,
    )
    assert_same(mixer.out_proj(norm(mixed)), mixer(x), [x, *mixer.parameters()], FLOAT32)


@pytest.fixture
def reference() -> Iterator[Callable[[str], ModuleType]]:
    """Import a submodule of a package without its ``__init__``, which wants compiled CUDA extensions."""
    before = dict(sys.modules)

    def load(name: str) -> ModuleType:
        package = name.partition(".")[0]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"{package} is not installed")
        namespace = ModuleType(package)
        namespace.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = namespace
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} does not import here: {error}")

    yield load
    for name in set(sys.modules) - set(before):
        if name.startswith(("mamba_ssm", "causal_conv1d")):
            del sys.modules[name]
    sys.modules.update(before)


def test_ssd_against_listing_1(reference: Callable[[str], ModuleType]) -> None:
    """mamba-ssm's ``ssd_minimal_discrete`` (listing 1 of the Mamba-2 paper), float64; one head per group, no D."""
    minimal = reference("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    t = draw(torch.float64, seq=64, rep=1)
    del t["D"]
    theirs, last = minimal(t["x"] * t["dt"].unsqueeze(-1), t["A"] * t["dt"], t["B"], t["C"], 16)
    ours, state = ssd(**t, chunk_size=8, return_final_states=True)
    assert_same(ours, theirs, list(t.values()), 1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


def test_ssd_against_selective_state_update(reference: Callable[[str], ModuleType]) -> None:
    """mamba-ssm's decoding step, token by token, float64."""
    step = reference("mamba_ssm.ops.triton.selective_state_update").selective_state_update_ref
    t = {name: tensor.detach() for name, tensor in draw(torch.float64).items()}
    batch, seq, heads, p = t["x"].shape
    state = torch.zeros(batch, heads, p, t["B"].shape[-1], dtype=torch.float64)
    a = t["A"][:, None, None].expand(state.shape[1:])
    d = t["D"][:, None].expand(heads, p)
    steps = [
        step(state, t["x"][:, i], t["dt"][:, i].unsqueeze(-1).expand(batch, heads, p), a, t["B"][:, i], t["C"][:, i], d)
        for i in range(seq)
    ]
    ours, last = ssd(**t, chunk_size=16, return_final_states=True)
    torch.testing.assert_close(ours, torch.stack(steps, dim=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-12)


def test_ssd_against_chunk_scan_ref(reference: Callable[[str], ModuleType]) -> None:
    """mamba-ssm's ``ssd_chunk_scan_combined_ref`` with softplus, dt_bias and z, which takes dt in float32.

    Values only: its gradients are NaN (it masks the decays after an exp that overflows above the diagonal).
    """
    scan = reference("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    t = draw(torch.float32, seq=64)
    z, bias = torch.randn_like(t["x"]), torch.randn(4)
    theirs = scan(
        *(t[k] for k in ("x", "dt", "A", "B", "C")), chunk_size=16, D=t["D"], z=z, dt_bias=bias, dt_softplus=True
    )
    ours = ssd(**(t | dict(dt=F.softplus(t["dt"] + bias))), chunk_size=16) * F.silu(z)
    assert_same(ours, theirs, [], FLOAT32)


def test_gated_norm_against_rms_norm_ref(reference: Callable[[str], ModuleType]) -> None:
    ref = reference("mamba_ssm.ops.triton.layernorm_gated").rms_norm_ref
    x, z = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(24))
    for before in (False, True):
        norm = GatedRMSNorm(24, eps=1e-5, group_size=8, norm_before_gate=before)
        norm.weight = weight
        theirs = ref(x, weight, None, z=z, eps=1e-5, group_size=8, norm_before_gate=before)
        assert_same(norm(x, z), theirs, [x, z, weight], FLOAT32)


def test_conv_against_causal_conv1d_ref(reference: Callable[[str], ModuleType]) -> None:
    ref = reference("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    shapes = ((2, 33, 12), (12, 4), (12,))
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    theirs = ref(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert_same(causal_conv1d(x, weight, bias), theirs, [x, weight, bias], 1e-10)
