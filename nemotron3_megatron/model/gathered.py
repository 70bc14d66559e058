"""Experts that are sent every token of their group, not each token's copies (``moe_token_dispatcher_type=allgather``).

An all-to-all sends a token to each of its top-k experts, and sizes what it sends by counts that ranks have to exchange
first. Among few ranks it is less to send each token once to every rank (ranks - 1 rows a token against
top-k (ranks - 1) / ranks), and nothing has to be known before: tokens are under way while the router and the shared
experts' first linear compute. Each rank sorts out the rows of its own experts and their outputs are summed on the way
back, beside the shared experts' second linear; the gradients travel beside the same linears' backward passes.

The CPU does not know how many rows a layer's experts get until the GPU has computed it. Kernels that read their counts
on the GPU leave rows alone that are too many: so there is room for as many as before and some more
(``row_forecast.py``), the whole layer is launched, and only then does the CPU wait for the number, with the experts
queued on the GPU. Were there more rows than room, none was taken, and the experts are launched again. In a CUDA graph
nobody can wait: whether there was room is noted on the GPU and asked after the step (``rooms.py``).

Shapes: T tokens of a rank, R ranks, E experts of a rank, H width of the rows that experts take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron3_megatron.config.experts import most_rows_per_token
from nemotron3_megatron.model.moe import TorchMoELayer
from nemotron3_megatron.model.row_forecast import RowForecast
from nemotron3_megatron.platform.transfer import is_capturing, read_later

NOT_ROUTED = -1.0
"""Gate of a token that did not choose an expert; a chosen expert's may be zero."""


class GatherDispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """Moves a layer's tokens to all ranks of its expert group, and sums what their experts make of them."""

    def __init__(self, local_expert_indices: list[int], *, config: Any, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.local_expert_indices = local_expert_indices
        topk, experts = config.moe_router_topk, len(local_expert_indices)
        self.forecast = RowForecast(topk, most_rows_per_token(self.ep_size, experts, topk))
        self.crowd: Tensor | None = None
        """(2,) int64 of captured passes since it was zeroed: whether one had too little room, and the most rows."""

    def send(self, tokens: Tensor) -> None:
        """Start gathering tokens (S, B, H)."""
        self.hidden_shape = tokens.shape
        self._gathering = Exchange(_gather, _reduce_scatter, self.ep_group)
        self._gathered = self._gathering.start(tokens.reshape(-1, tokens.shape[-1]))

    def send_routes(self, probs: Tensor, routing_map: Tensor) -> None:
        """Exchange gates (T, R * E) and choices (T, R * E) bool: each rank receives those of its own experts."""
        gates = probs.masked_fill(~routing_map, NOT_ROUTED).unflatten(1, (self.ep_size, -1))
        received = tensor_parallel.all_to_all(self.ep_group, gates.transpose(0, 1).contiguous())
        self._gates = received.flatten(0, 1)
        self.routes = self._gates.detach() >= 0
        self._counts, self._rows = self.count_rows(self.routes)
        self._all = self.routes, self._counts
        self._room: int | None = None

    def make_room(self) -> None:
        """Go on before the number of rows is known on the CPU; :meth:`had_room` is to be asked."""
        self._room = self.forecast.room(self._tokens(), captured=is_capturing())
        total = self._counts.sum()
        fits = total <= self._room
        self.routes, self._counts = self.routes & fits, self._counts * fits  # kernels do not look for a buffer's end
        if self.crowd is None:
            self.crowd = total.new_zeros(2)
        if is_capturing():
            self.crowd.copy_(torch.maximum(self.crowd, torch.stack([(~fits).to(total.dtype), total])))

    def had_room(self) -> bool:
        """Whether all rows were taken. If not none was, but there is room now. The CPU waits for the number of rows.

        In a capture nobody knows: ``crowd`` tells.
        """
        if self._room is None or is_capturing():
            return True
        rows = self._rows()
        self.learn(rows)
        if rows <= self._room:
            return True
        (self.routes, self._counts), self._room = self._all, None
        return False

    def learn(self, rows: int) -> None:
        """Expect so many rows from now on."""
        self.forecast.learn(rows, self._tokens())

    def _tokens(self) -> int:
        return len(self.routes) // int(self.ep_size)

    def receive(self) -> tuple[Tensor, Tensor]:
        """Gathered tokens (R * T, H) and their gates (R * T, E), which are not kept here."""
        gathered, gates = self._gathering.finish(self._gathered), self._gates
        del self._gathered, self._gates
        return gathered, gates

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of this rank's experts in the order of experts, their counts (E,) and their gates.

        After :meth:`make_room` more rows than that, the last ones undefined; without it the CPU waits for their number.
        """
        self._gathered_shape = hidden_states.shape
        rows, gates, self._order, _, _ = permute(
            hidden_states,
            self.routes,
            probs=probs,
            num_out_tokens=self._rows() if self._room is None else self._room,
            fused=self.config.moe_permute_fusion,
        )
        return rows, self._counts, gates

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Experts' outputs summed by token: (R * T, H)."""
        summed: Tensor = unpermute(
            hidden_states,
            self._order,
            restore_shape=self._gathered_shape,
            routing_map=self.routes,
            fused=self.config.moe_permute_fusion,
        )
        return summed

    def send_back(self, summed: Tensor) -> Callable[[], Tensor]:
        """Start summing (R * T, H) over ranks; the function returned gives this rank's (T, H)."""
        scattering = Exchange(_reduce_scatter, _gather, self.ep_group)
        started = scattering.start(summed)
        return lambda: scattering.finish(started)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """(T, H) -> (S, B, H)."""
        return hidden_states.view(self.hidden_shape)

    def count_rows(self, routes: Tensor) -> tuple[Tensor, Callable[[], int]]:
        """Each expert's rows (E,), and a function for their sum, which waits for its copy to the CPU and no more."""
        counts = routes.sum(0)
        if is_capturing():
            return counts, _unknown
        total = read_later(counts.sum())
        return counts, lambda: int(total())


class GatheringExperts:
    """Mixed into Megatron-Core's MoE layer: its parts in an order that leaves tokens under way while others compute."""

    def __init__(self: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)  # type: ignore[call-arg]
        self.token_dispatcher = GatherDispatcher(
            self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )

    def forward(
        self: Any, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Hidden states (S, B, hidden) -> the layer's output (S, B, hidden); padding_mask (B, S)."""
        padding = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self.pass_experts, False, hidden_states, padding), None
        return self.pass_experts(hidden_states, padding), None

    def pass_experts(self: Any, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The layer, without recomputation."""
        dispatcher = self.token_dispatcher
        latent = self.config.moe_latent_size is not None
        dispatcher.send(self.fc1_latent_proj(hidden_states)[0] if latent else hidden_states)
        dispatcher.send_routes(*self.route(hidden_states, padding_mask))
        if self.leaves_spare_rows_alone():
            dispatcher.make_room()
        shared = self.begin_shared(hidden_states)
        received = dispatcher.receive()
        output, _ = self.routed_experts_compute(*received)
        if not dispatcher.had_room():
            output, _ = self.routed_experts_compute(*received)
        del received
        summed = dispatcher.send_back(output)
        shared_output = shared()
        combined: Tensor = self.postprocess(summed(), shared_output)
        return combined

    def leaves_spare_rows_alone(self: Any) -> bool:
        """Whether sorting and experts read on the GPU how many rows there are."""
        linears = (getattr(self.experts, name, None) for name in ("linear_fc1", "linear_fc2"))
        return self.config.moe_permute_fusion and all(getattr(each, "spare_rows", False) for each in linears)

    def begin_shared(self: Any, hidden_states: Tensor) -> Callable[[], Tensor | None]:
        """The shared experts' first linear; the function returned does the rest (all, where they are recomputed)."""
        if not self.use_shared_expert or self.shared_experts_recompute:
            return lambda: self.shared_experts_compute(hidden_states)
        shared = self.shared_experts
        hidden, _ = shared.linear_fc1(hidden_states)
        return lambda: shared.linear_fc2(shared.activation_func(hidden))[0]


class GatheringMoELayer(GatheringExperts, MoELayer):  # type: ignore[misc]
    """On Transformer Engine."""


class GatheringTorchMoELayer(GatheringExperts, TorchMoELayer):
    """On torch layers."""


Collective = Callable[[Tensor, ProcessGroup], tuple[Tensor, Any]]
"""Starts: (input, group) -> (the output, filled when the work is done; the work)."""


class Exchange:
    """One collective: what is computed between ``start`` and ``finish`` runs beside it.

    Going back, ``finish`` starts the opposite collective on the gradient, and ``start`` waits for it: it runs beside
    the backward pass of what was computed between them. An instance serves one forward pass.
    """

    def __init__(self, there: Collective, back: Collective, group: ProcessGroup) -> None:
        self._there, self._back, self._group = there, back, group
        self._pending: tuple[Tensor, Tensor, Any] | None = None

    def start(self, x: Tensor) -> Tensor:
        """The output, not to be read before :meth:`finish` has returned it."""
        begun: Tensor = _Start.apply(x, self)  # type: ignore[no-untyped-call]
        return begun

    def finish(self, y: Tensor) -> Tensor:
        """The output that :meth:`start` gave, complete."""
        complete: Tensor = _Finish.apply(y, self)  # type: ignore[no-untyped-call]
        return complete

    def begin(self, x: Tensor, *, backward: bool = False) -> Tensor:
        """Start the collective, or its opposite; the input is kept until it is done."""
        x = x.contiguous()
        output, work = (self._back if backward else self._there)(x, self._group)
        self._pending = (output, x, work)
        return output

    def end(self) -> Tensor:
        """Wait for what was begun (on a GPU the stream waits, the CPU goes on); its output."""
        assert self._pending is not None
        output, _, work = self._pending
        self._pending = None
        work.wait()
        return output


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.end()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.begin(gradients[0], backward=True)
        return gradients[0], None  # of the form that _Start expects; what it returns was begun here


def _unknown() -> int:
    raise RuntimeError("the CPU cannot wait for the GPU inside a CUDA graph")


def _gather(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any]:
    output = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return output, torch.distributed.all_gather_into_tensor(output, x, group=group, async_op=True)


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any]:
    output = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return output, torch.distributed.reduce_scatter_tensor(output, x, group=group, async_op=True)
