"""Tokens a second of generation over caches, over the same model that computes the whole context for every token.

    python benchmarks/decode.py [--contexts 128,512,2048] [--tokens 32] [--draft 2] [key=value ...]

One process, one sequence, fresh weights of ``recipe=tiny`` (or another that fits: ``recipe=NAME model.pattern=...``),
on the GPU if there is one. The ways are measured in turn, twice over; the figure is the better turn. On a CPU the
process's own seconds count, which other programs do not lengthen: give it one thread. Fresh weights accept next to no
draft, so the last column is what a round with drafts costs; it yields as many tokens as a model's acceptance length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.table import Table

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.evaluate.generation import Rules, generate
from nemotron3_megatron.evaluate.sampling import Sampling
from nemotron3_megatron.evaluate.trained import on_one_rank
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select

TURNS = 2


def main() -> None:
    """Time all contexts and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="128,512,2048", help="prompt lengths")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens a turn")
    parser.add_argument("--draft", type=int, default=2, help="drafts a round in the third measurement")
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    recipe, origins = compose(["recipe=tiny", "model.spec=torch", *options.overrides])
    run = on_one_rank(resolve(recipe, recipe.world_size or 1, origins))
    platform = select("auto")
    platform.start(local_rank=0)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(platform.collective_backend, store=store, rank=0, world_size=1)
    try:
        (model,) = build_model(run, platform, start_groups(run, platform))
        _show(run, model.eval(), [int(length) for length in options.contexts.split(",")], options.tokens, options.draft)
    finally:
        stop_groups()


def _show(run: Run, model: Nemotron3Model, contexts: list[int], tokens: int, draft: int) -> None:
    device = model.output_layer.weight.device
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{place}: {run.name}, {run.model.pattern}, {run.precision.dtype}, one sequence")
    for column in ("context", "whole context tok/s", "caches tok/s", "ratio", f"a round with {draft} drafts costs"):
        table.add_column(column, justify="right")
    for length in contexts:
        prompt = torch.randint(run.model.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()

        def whole(prompt: list[int] = prompt) -> float:
            return _recompute(model, prompt, max(2, min(tokens, 8)))

        def cached(prompt: list[int] = prompt) -> float:
            return _cached(model, prompt, run.model.vocab_size, tokens, 0)

        def drafted(prompt: list[int] = prompt) -> float:
            return _cached(model, prompt, run.model.vocab_size, tokens, draft)

        ways: tuple[Callable[[], float], ...] = (whole, cached, drafted) if draft else (whole, cached)
        turns = [[way() for way in ways] for _ in range(TURNS)]
        seconds = [min(times) for times in zip(*turns, strict=True)]
        cost = f"{seconds[2] / seconds[1]:.2f} x" if draft else "-"
        table.add_row(
            f"{length:,}", f"{1 / seconds[0]:.2f}", f"{1 / seconds[1]:.2f}", f"{seconds[0] / seconds[1]:.1f} x", cost
        )
    Console(width=120).print(table)


@torch.no_grad()
def _recompute(model: Nemotron3Model, prompt: list[int], tokens: int) -> float:
    """Median seconds of a token."""
    context, times = list(prompt), []
    for _ in range(tokens):
        started = _now(model)
        ids = torch.tensor([context], device=model.output_layer.weight.device)
        context.append(int(model(ids, None)[0, -1].argmax()))
        times.append(_now(model) - started)
    return median(times[1:])


def _cached(model: Nemotron3Model, prompt: list[int], vocabulary: int, tokens: int, draft: int) -> float:
    """Median seconds of a round after the prompt is in the cache; choosing a token waits for the device."""
    greedy = Sampling(temperature=0)
    rules = Rules(sampling=greedy, vocabulary=vocabulary, eod=None, max_new_tokens=tokens, draft=draft)
    times = []
    for each in generate(model, [prompt], rules, [0]):
        if each.drafted == draft:
            times.append(_now(model))
    return median(after - before for before, after in pairwise(times))


def _now(model: Nemotron3Model) -> float:
    return perf_counter() if model.output_layer.weight.is_cuda else process_time()


if __name__ == "__main__":
    main()
