"""Multi-token prediction against a straightforward implementation: losses of every depth and all gradients.

The model follows the DeepSeek-V3 report (arXiv:2412.19437, section 2.2) in plain torch, one document at a time, with
transformers' ``nemotron_h`` blocks as layers. The batch is cut into micro-batches with very uneven loss masks, and the
loss is normalised by counts over the whole batch, as train/loss.py states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transplant import errors, in_double, their_names, transplant

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.data.batch import build_micro_batch
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.train.loss import loss_weights, mean_losses, weighted_loss

Build = Callable[[ModelConfig], Nemotron3Model]
Float64 = Callable[[], AbstractContextManager[None]]

EOD = 0
MTP_NAMES = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")


def architecture(depths: int, repeated: bool) -> ModelConfig:
    return ModelConfig(
        pattern="ME*-",
        hidden_size=24,
        vocab_size=50,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=32,
        mamba_num_heads=4,
        mamba_head_dim=6,
        mamba_state_dim=8,
        mamba_num_groups=2,
        mamba_chunk_size=8,
        num_moe_experts=6,
        moe_router_topk=2,
        moe_ffn_hidden_size=20,
        moe_shared_expert_intermediate_size=16,
        moe_latent_size=12,
        moe_aux_loss_coeff=0.0,
        init_method_std=0.2,
        mtp_pattern="*E",
        mtp_depths=depths,
        mtp_use_repeated_layer=repeated,
        mtp_loss_scaling_factor=0.3,
    )


def windows() -> Tensor:
    """(4, 33): a row without an end, rows with some, and one of ends only, which no MTP depth can predict."""
    ids = torch.randint(1, 50, (4, 33), generator=torch.Generator().manual_seed(3))
    ids[1, [5, 6, 30]] = EOD
    ids[2, [0, 2, 4, 6, 8, 20, 31, 32]] = EOD
    ids[3] = EOD
    return ids


def our_results(ours: Nemotron3Model, model: ModelConfig, isolated: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Mean loss of each depth, and gradients by our names, from two micro-batches."""
    micro = [
        build_micro_batch(part, mtp_depths=model.mtp_depths, eod_token=EOD, isolate_documents=isolated)
        for part in windows().split([3, 1])
    ]
    weights = loss_weights(micro, model, [], torch.device("cpu"))
    sums = torch.zeros(1 + model.mtp_depths)
    for batch in micro:
        losses = ours(batch.tokens, batch.position_ids, batch.labels, batch.documents if isolated else None)
        loss, _, parts = weighted_loss(losses, batch.loss_mask, weights)
        loss.backward()
        sums = sums + parts
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    return list(mean_losses(sums, weights)().depths), gradients


class StraightforwardMTP:
    """Main stack and MTP depths, one sequence at a time; MTP's layers follow the main stack's in ``blocks``."""

    def __init__(self, ours: Nemotron3Model, model: ModelConfig, nemotron_h: ModuleType) -> None:
        self.model = model
        self.modules = 1 if model.mtp_use_repeated_layer else model.mtp_depths
        self.whole = replace(model, pattern=model.pattern + self.modules * model.mtp_pattern)
        self.net = transplant(_mtp_layers_last(dict(ours.state_dict()), model), self.whole, nemotron_h).double()
        self.own = [
            {name: ours.state_dict()[f"mtp.layers.{m}.{name}"].double().requires_grad_() for name in MTP_NAMES}
            for m in range(self.modules)
        ]

    def run(self, hidden: Tensor, first: int, count: int) -> Tensor:
        """(1, s, h) through ``count`` blocks; attention is told to be causal by a mask."""
        size = hidden.shape[1]
        mask = torch.full((size, size), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        for block in self.net.model.layers[first : first + count]:
            attends = block.block_type == "full_attention"
            hidden = block(hidden, attention_mask=mask if attends else None)
        return hidden

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.model.layernorm_epsilon) * weight

    def losses(self, text: Tensor, inputs: int) -> list[Tensor]:
        """Summed cross entropy and count of targets for depths 0 to D, as (D + 1) pairs (2,).

        text (t,) is one document, of which the first ``inputs`` tokens are inputs and all may be targets.
        """
        main, per_module = len(self.model.pattern), len(self.model.mtp_pattern)
        embedded = self.net.model.embeddings(text[None, :inputs])
        hidden = self.net.model.norm_f(self.run(embedded, 0, main))
        found = []
        for depth in range(self.model.mtp_depths + 1):
            if depth:
                module = min(depth, self.modules) - 1
                own = self.own[module]
                ahead = F.pad(embedded[:, depth:], (0, 0, 0, min(depth, inputs)))  # no loss where there is no token
                joined = torch.cat(
                    [self.norm(ahead, own["enorm.weight"]), self.norm(hidden, own["hnorm.weight"])], dim=-1
                )
                hidden = self.run(joined @ own["eh_proj.weight"].T, main + module * per_module, per_module)
                hidden = self.norm(hidden, own["final_layernorm.weight"])
            targets = text[1 + depth : 1 + depth + inputs]
            logits = self.net.lm_head(hidden[0, : len(targets)])
            total = F.cross_entropy(logits, targets, reduction="sum")
            found.append(torch.stack([total, total.new_tensor(len(targets))]))
        return found

    def gradients(self) -> dict[str, Tensor]:
        """By transformers' names, and ours for what transformers does not have."""
        named = {name: p.grad for name, p in self.net.named_parameters()}
        return named | {f"{m}.{name}": t.grad for m, own in enumerate(self.own) for name, t in own.items()}


def _mtp_layers_last(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """MTP's inner layers renamed as if they followed the main stack."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".mtp_model_layer.layers." in name:
            _, _, module, _, _, index, rest = name.split(".", 6)
            place = len(model.pattern) + int(module) * len(model.mtp_pattern) + int(index)
            name = f"decoder.layers.{place}.{rest}"
        renamed[name] = tensor
    return renamed


def documents(row: Tensor, isolated: bool) -> list[tuple[Tensor, int]]:
    """Each document of a window with its number of inputs; the window's last token is a target only."""
    last = len(row) - 1
    ends = [i + 1 for i in range(len(row)) if row[i] == EOD] if isolated else []
    cuts = sorted({0, *ends, len(row)})
    return [(row[start:stop], min(stop, last) - start) for start, stop in pairwise(cuts) if start < last]


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "one_document"])
@pytest.mark.parametrize(("depths", "repeated"), [(2, True), (2, False), (1, True)])
def test_losses_and_gradients(
    depths: int, repeated: bool, isolated: bool, build: Build, nemotron_h: ModuleType, in_float64: Float64
) -> None:
    """In float64, to 1e-10: mean loss of each depth over the global batch, gradient of their weighted sum."""
    model = architecture(depths, repeated)
    ours = build(model)
    with in_float64():
        reference = StraightforwardMTP(in_double(ours), model, nemotron_h)
        means, gradients = our_results(ours, model, isolated)
        parts = [reference.losses(*text) for row in windows() for text in documents(row, isolated)]
        sums = torch.stack([torch.stack(part) for part in parts]).sum(0)  # (1 + depths, 2)
        expected = sums[:, 0] / sums[:, 1]
        (expected[0] + model.mtp_loss_scaling_factor / depths * expected[1:].sum()).backward()
    torch.testing.assert_close(torch.tensor(means, dtype=torch.float64), expected.detach(), rtol=1e-10, atol=0)
    found = their_names(_mtp_layers_last(gradients, model), reference.whole)
    found |= {f"{m}.{n}": gradients[f"mtp.layers.{m}.{n}"] for m in range(reference.modules) for n in MTP_NAMES}
    worst = errors(found, reference.gradients())
    assert max(worst.values()) < 1e-10, worst
