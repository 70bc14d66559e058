"""The verbs of ``nemotron3``. Each imports what it needs when it runs: ``nemotron3 plan`` answers without torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from nemotron3_megatron.config.errors import UserError

PIPE_WIDTH = 140
"""Columns of tables that go to a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A command of ``nemotron3``."""

    run: Callable[[list[str], bool], int]
    """Takes the overrides and whether JSON is wanted; returns the exit status."""
    summary: str
    usage: str
    has_json: bool = False
    page: Callable[[list[str], str], None] | None = None
    """Takes the overrides and the file of ``--html``."""
    search: Callable[[list[str], bool], int] | None = None
    """With ``--search``, in place of ``run``."""
    simulate: Callable[[list[str], str | None, bool], int] | None = None
    """With ``--simulate``, in place of ``run``; takes ``--ranks``, too."""
    dry_run: Callable[[list[str]], int] | None = None
    """With ``--dry-run``, in place of ``run``."""
    gpu: Callable[[list[str], bool], int] | None = None
    """With ``--gpu``, in place of ``run``."""


def _width() -> int | None:
    return None if sys.stdout.isatty() else PIPE_WIDTH


def _plan(overrides: list[str], as_json: bool) -> int:
    from nemotron3_megatron.plan.commands import plan_main

    return plan_main(overrides, as_json, _width())


def _search(overrides: list[str], as_json: bool) -> int:
    from nemotron3_megatron.plan.commands import search_main

    return search_main(overrides, as_json, _width())


def _simulate(overrides: list[str], ranks: str | None, as_json: bool) -> int:
    from nemotron3_megatron.plan.commands import simulate_main

    return simulate_main(overrides, ranks, as_json, _width())


def _plan_page(overrides: list[str], file: str) -> None:
    from nemotron3_megatron.plan.commands import write_plan_page

    write_plan_page(overrides, file)


def _doctor(overrides: list[str], as_json: bool) -> int:
    from nemotron3_megatron.platform.doctor import run_doctor

    _take_no_values(overrides)
    status: int = run_doctor(as_json)
    return status


def _gpu_doctor(overrides: list[str], as_json: bool) -> int:
    from nemotron3_megatron.platform.checks.gpu_doctor import run_gpu_doctor

    _take_no_values(overrides)
    status: int = run_gpu_doctor(as_json, _width())
    return status


def _take_no_values(overrides: list[str]) -> None:
    if overrides:
        raise UserError(overrides[0], where="command line", why="doctor takes no values", nearest="nemotron3 doctor")


def _report(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.telemetry.report import report_main

    status: int = report_main(overrides)
    return status


def _generate(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.evaluate.generate import generate_main

    status: int = generate_main(overrides)
    return status


def _checkpoint(arguments: list[str], as_json: bool) -> int:
    from nemotron3_megatron.checkpoint.commands import checkpoint_main

    return checkpoint_main(arguments, as_json)


def _merge(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.checkpoint.merge_command import merge_main

    return merge_main(overrides)


def _submit(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.launch.submit import submit_main

    return submit_main(overrides)


def _dry_submit(overrides: list[str]) -> int:
    from nemotron3_megatron.launch.submit import dry_run

    return dry_run(overrides)


def _status(arguments: list[str], as_json: bool) -> int:
    from nemotron3_megatron.launch.status import status_main

    return status_main(arguments, as_json)


def _stop(arguments: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.launch.status import stop_main

    return stop_main(arguments)


def _launch(arguments: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.launch.chain import launch_main

    return launch_main(arguments)


def _data(overrides: list[str], as_json: bool) -> int:
    if not overrides or overrides[0] != "inspect":
        given = overrides[0] if overrides else "data"
        raise UserError(
            given, where="command line", why="data has one command", nearest="nemotron3 data inspect recipe=NAME"
        )
    from nemotron3_megatron.data.inspect import inspect_main

    return inspect_main(overrides[1:], as_json)


def _nll(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.evaluate.position_nll import nll_main

    return nll_main(overrides)


def _export(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.checkpoint.huggingface.command import export_main

    return export_main(overrides)


def _quantise(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.checkpoint.quantised.quantise import quantise_main

    return quantise_main(overrides)


def _import(overrides: list[str], _as_json: bool) -> int:
    from nemotron3_megatron.checkpoint.huggingface.command import import_main

    return import_main(overrides)


VERBS = {
    "plan": Verb(
        _plan,
        "print the resolved run: origin of each value, layers, precision, parameters, layout, schedule; starts nothing",
        "nemotron3 plan recipe=NAME [world_size=N] [gpu=h200] [key=value ...] [--json] [--html FILE]\n"
        "nemotron3 plan recipe=NAME gpus=N [gpu=h200] [key=value ...] --search [--json]\n"
        "nemotron3 plan recipe=NAME [world_size=N] [key=value ...] --simulate [--ranks 0,1,3071] [--json]\n"
        "Draws which layer computes in which format and what fills a GPU: run_dir/precision_map.png, memory.png.\n"
        "world_size defaults to the recipe's. The keys are those of train.py (see train.py --help).",
        has_json=True,
        page=_plan_page,
        search=_search,
        simulate=_simulate,
    ),
    "doctor": Verb(
        _doctor,
        "report versions, devices, and which optional packages are missing and what that costs",
        "nemotron3 doctor [--json]\n"
        "nemotron3 doctor --gpu [--json]        kernels against float64, speeds against data sheets; 1: a check failed",
        has_json=True,
        gpu=_gpu_doctor,
    ),
    "report": Verb(
        _report,
        "draw the loss curves of a run from its metrics.jsonl: PNG and terminal",
        "nemotron3 report run_dir=PATH [against=PATH,...]    against: other runs to compare it with",
    ),
    "generate": Verb(
        _generate,
        "continue a prompt with a trained checkpoint",
        "nemotron3 generate checkpoint=DIR prompt=TEXT [max_new_tokens=64] [temperature=0.8] [top_k=0] [top_p=0.95]\n"
        "                   [min_p=0] [seed=0] [samples=1] [stop_at_eod=true] [draft=0] [think_budget=N]\n"
        "                   [end_think='</think>'] [tokenizer=PATH] [recipe=NAME]\n"
        "temperature=0: the likeliest token. draft: tokens that multi-token prediction drafts in each pass.\n"
        "think_budget: append end_think after N tokens. tokenizer: the run's. recipe: of a Hugging Face model.",
    ),
    "data": Verb(
        _data,
        "show what a recipe's data really is: tokens, epochs and shares by stage, samples, document lengths",
        "nemotron3 data inspect recipe=NAME [key=value ...] [--json]\n"
        "Draws document_lengths.png into the run directory. The keys are those of train.py.",
        has_json=True,
    ),
    "nll": Verb(
        _nll,
        "measure how well a checkpoint predicts tokens by their position in long documents",
        "nemotron3 nll checkpoint=DIR data=PREFIX seq_length=N [windows=64] [contexts=[256,4096]] [out=DIR]\n"
        "Writes position_nll.json and position_nll.png into the run directory, or into out.",
    ),
    "checkpoint": Verb(
        _checkpoint,
        "list, show, verify or remove checkpoints",
        "nemotron3 checkpoint ls|show RUN_DIR|CHECKPOINT [--json]     show: of a run, the newest\n"
        "nemotron3 checkpoint verify RUN_DIR|CHECKPOINT               reads every byte; exit status 1: damaged\n"
        "nemotron3 checkpoint rm CHECKPOINT                           removes it\n"
        "nemotron3 checkpoint rm RUN_DIR                              removes what is damaged or left over",
        has_json=True,
    ),
    "export": Verb(
        _export,
        "write a checkpoint as a Hugging Face model: nemotron_h, safetensors, tokenizer",
        "nemotron3 export checkpoint=DIR out=DIR [format=trained|quantised] [tokenizer=PATH|none] [shard_gb=4]\n"
        "format=quantised: codes and scales of the run's own precision plan, as its forward pass reads the weights.\n"
        "Needs memory for one file (shard_gb), whatever the model's size.",
    ),
    "quantise": Verb(
        _quantise,
        "quantise a trained model under the published settings (ModelOpt) and write it as a Hugging Face model",
        "nemotron3 quantise checkpoint=DIR out=DIR [settings=nvfp4|fp8] [search=mse|max] [sequences=N] [seq_length=N]\n"
        "                   [distil_steps=0] [distil_batch=16] [distil_lr=1e-5] [tokenizer=PATH|none] [shard_gb=4]\n"
        "Calibrates on the data that the run would have gone on with; distil_steps: then trains the quantised model\n"
        "towards the trained one. One process; what a run's own precision plan says: export format=quantised.",
    ),
    "import": Verb(
        _import,
        "write a Hugging Face nemotron_h model as a checkpoint to train from (checkpoint.load=DIR)",
        "nemotron3 import hf=DIR recipe=NAME out=DIR [key=value ...]        further keys: of the recipe",
    ),
    "merge": Verb(
        _merge,
        "average a window of a run's checkpoints: what a decay of the learning rate would have given",
        "nemotron3 merge run_dir=RUN out=DIR [window='500B tokens'] [decay=minus_sqrt|linear|mean]\n"
        "                [order=sequential|reversed|random] [seed=0]        docs/merging.md derives the weights",
    ),
    "submit": Verb(
        _submit,
        "write a run directory that needs nothing else, and submit it to Slurm",
        "nemotron3 submit recipe=NAME cluster=NAME run_dir=PATH [world_size=N] [key=value ...] [--dry-run]\n"
        "Clusters are recipes/cluster/NAME.yaml. Continue an ended run with: sbatch RUN/job.sbatch",
        dry_run=_dry_submit,
    ),
    "status": Verb(
        _status,
        "tell a submitted run's progress, time left, segments, goodput and last error",
        "nemotron3 status RUN [--json]",
        has_json=True,
    ),
    "stop": Verb(_stop, "have a submitted run save and end its chain", "nemotron3 stop RUN"),
    "launch": Verb(
        _launch,
        "what a segment's batch script asks at its end; not for people",
        "nemotron3 launch next RUN code=N",
    ),
}
