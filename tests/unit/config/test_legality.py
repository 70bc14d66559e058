"""What can run: each rule, the messages, and random layouts against Megatron's conditions restated."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.keys import key_lines
from nemotron3_megatron.config.legality import with_value
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.typed import show

TINY = compose(["recipe=tiny"])[0]
NO_WARMUP = ("optimizer.lr_warmup", "0 steps")
DURATIONS = [
    line.split()[0].replace("NAME", "main")
    for line in key_lines()
    if "(duration" in line and not line.startswith("cluster.") and "batch_rampup" not in line
]


def refused(world_size: int, *overrides: str) -> UserError:
    recipe, origins = compose(["recipe=tiny", *overrides])
    with pytest.raises(UserError) as caught:
        resolve(recipe, world_size, origins)
    return caught.value


@pytest.mark.parametrize(
    ("world_size", "overrides", "what", "nearest"),
    [
        (3, ["parallel.ep=1"], "stages.main", None),
        (1, [], "parallel.ep=2", "parallel.ep=1 or world_size=2"),
        (2, ["parallel.tp=4"], "parallel.tp=4", "parallel.tp=2"),
        (6, ["parallel.tp=3"], "parallel.tp=3", "parallel.tp=2"),
        (6, ["parallel.ep=3"], "parallel.ep=3", "parallel.ep=2"),
        (32, ["parallel.cp=16"], "parallel.cp=16", "parallel.cp=8"),
        (2, ["model.mamba_num_heads=9"], "model.mamba_num_heads=9", "model.mamba_num_heads=8"),
        (2, ["model.num_query_groups=3"], "model.num_query_groups=3", "model.num_query_groups=2"),
        (2, ["stages.main.global_batch_size=15"], "stages.main.global_batch_size=15", "=16"),
        (2, ["stages.main.seq_length=255", "parallel.cp=2"], "stages.main.seq_length=255", "=256"),
        (2, ["model.pattern=MEX"], "model.pattern=MEX", "model.pattern='ME'"),
        (2, ["model.pattern='MEM|E'"], "model.pattern=MEM|E", "'MEME'"),
        (2, ["model.pattern=MEM-"], "model.ffn_hidden_size=null", "model.ffn_hidden_size=512"),
        (2, ["model.pattern=MMM", "model.mtp_depths=0", "model.mtp_pattern=''"], "parallel.ep=2", "parallel.ep=1"),
        (2, ["model.moe_router_topk=9"], "model.moe_router_topk=9", "model.moe_router_topk=8"),
        (2, ["model.moe_latent_size=128"], "model.moe_latent_size=128", "127"),
        (2, ["model.mtp_depths=0"], "model.mtp_pattern=*E", "model.mtp_depths=2"),
        (2, ["model.mtp_pattern=''"], "model.mtp_", "model.mtp_pattern='*E'"),
        (2, ["parallel.vpp=2"], "parallel.vpp=2", "parallel.vpp=1"),
        (11, ["parallel.pp=11", "parallel.ep=1"], "parallel.pp=11", None),
        (2, ["parallel.pp=2", "parallel.ep=1", "parallel.vpp=2", "stages.main.global_batch_size=4"],
         "stages.main.global_batch_size=4", "=8"),
        (2, ["parallel.sequence_parallel=true"], "parallel.sequence_parallel=true", "tp=2"),
        (2, ["parallel.tp=2", "parallel.sequence_parallel=false"], "parallel.sequence_parallel=false", "true"),
        (2, ["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather=true", "overlap_grad_reduce"),
        (2, ["parallel.recompute=selective"], "parallel.recompute=selective", "recompute_modules"),
        (2, ["parallel.recompute_modules=[moe]"], "parallel.recompute_modules=[moe]", "selective"),
        (2, ["parallel.moe_token_dispatcher_type=flex", "device=cpu"], "parallel.moe_token", "alltoall"),
        (2, ["model.moe_router_fusion=true", "device=cpu"], "model.moe_router_fusion", "false"),
        (2, ["model.moe_router_fusion=true", "model.spec=torch"], "model.moe_router_fusion", "false"),
        (2, ["parallel.ep=1", "parallel.etp=2", "parallel.tp=2", "parallel.moe_token_dispatcher_type=allgather"],
         "parallel.moe_token_dispatcher_type=allgather", "parallel.etp=1"),
        (2, ["optimizer.lr_wsd_decay=null"], "optimizer.lr_wsd_decay=null", "cosine"),
        (2, ["optimizer.lr_decay_style=cosine"], "optimizer.lr_wsd_decay", "null"),
        (2, ["optimizer.lr_warmup='3M tokens'"], "optimizer.lr_warmup=3M tokens", "'800128 tokens'"),
        (2, ["optimizer.lr_decay='1 steps'"], "optimizer.lr_decay=1 steps", "'460000 tokens'"),
        (2, [f"seed={2**63}"], f"seed={2**63}", "seed=1234"),
        (2, ["stages.main.batch_rampup={start_tokens: 1024, increment_tokens: 1024, over: 9 steps}"],
         "stages.main.batch_rampup.start_tokens=1024", "batch_rampup=null"),
        (2, ["name=''"], "name=''", "name=NAME"),
        (2, ["device=cpu", "model.spec=te"], "model.spec=te", "torch"),
        (2, ["device=cpu", "parallel.cuda_graph=passes"], "parallel.cuda_graph=passes", "auto"),
        (2, ["device=cpu", "resilience.straggler=nvrx"], "resilience.straggler=nvrx", "own"),
        (2, ["resilience.straggler=nvrx", "resilience.straggler_every=null"], "resilience.straggler=nvrx", "100 steps"),
        (2, ["checkpoint.keep_best=1", "telemetry.eval_every=null"], "checkpoint.keep_best=1", "eval_every"),
        (2, ["checkpoint.keep_best=1", "~data.validation"], "checkpoint.keep_best=1", "data.validation"),
        (2, ["checkpoint.every=null", "checkpoint.keep_every='9 steps'"], "checkpoint.", "checkpoint.every="),
        (2, ["optimizer.min_lr=1.0"], "optimizer.min_lr=1.0", "optimizer.min_lr=3e-05"),
        (2, ["checkpoint.every='5 min'"], "checkpoint.every", "steps"),
        (2, ["stages.main.tokens='0 tokens'"], "stages.main.tokens", None),
        (2, ["~stages.main"], "stages", None),
        (2, ["data.eod_token=4096"], "data.eod_token=4096", "data.eod_token=4095"),
        (2, ["data.sources.train.weight=0.0"], "data.sources.train.weight", None),
        (2, ["max_steps=0"], "max_steps=0", "max_steps=1"),
        (2, ["seed=-1"], "seed=-1", "seed=0"),
    ],
)  # fmt: skip
def test_each_rule_names_value_reason_and_nearest(
    world_size: int, overrides: list[str], what: str, nearest: str | None
) -> None:
    error = refused(world_size, *overrides)
    assert error.what.startswith(what)
    assert error.why
    assert error.where
    assert nearest is None or nearest in str(error.nearest)


@pytest.mark.parametrize(
    ("key", "text"),
    [(key, text) for key in DURATIONS for text in ("5 min", "0 steps") if (key, text) != NO_WARMUP],
)
def test_durations_of_training_are_positive_steps_or_tokens(key: str, text: str) -> None:
    """All there are: one that no rule knew would be refused by nobody, or end in a trace."""
    assert refused(2, f"{key}='{text}'").what.startswith(f"{key}=")


def test_a_message_blames_the_command_line_before_a_file() -> None:
    error = refused(2, "model.num_moe_experts=7")
    assert (error.what, error.where) == ("model.num_moe_experts=7", "command line")


def test_published_layouts_are_legal() -> None:
    """Long-context layouts of the reports: TP8 CP8, TP2 CP64 and TP8 CP32 reach exactly the Mamba heads."""
    for model, tp, cp, ep, pp, batch in [
        ("nano", 8, 8, 8, 4, 48),
        ("super", 2, 64, 64, 1, 16),
        ("ultra", 8, 32, 128, 2, 24),
    ]:
        world_size = tp * cp * pp
        recipe, origins = compose(
            [
                "recipe=nano_bf16",
                f"model={model}",
                f"parallel={model}_pretrain",
                *(f"parallel.{name}={value}" for name, value in {"tp": tp, "cp": cp, "ep": ep, "pp": pp}.items()),
                "stages.phase1.seq_length=524288",
                "stages.phase2.seq_length=524288",
                f"stages.phase1.global_batch_size={batch}",
                f"stages.phase2.global_batch_size={batch}",
            ]
        )
        assert resolve(recipe, world_size, origins).layout.dp == 1


SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16])
PARALLEL = st.fixed_dictionaries(
    {
        **dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp"), st.sampled_from([1, 1, 2, 3, 4, 8])),
        "sequence_parallel": st.sampled_from([None, True, False]),
        "overlap_grad_reduce": st.booleans(),
        "recompute": st.sampled_from(["none", "full", "selective"]),
    }
)
MODEL = st.fixed_dictionaries(
    {
        "pattern": st.text("M*E-", max_size=12) | st.just("MEM*EMEM*E") | st.text(max_size=4),
        "mamba_num_heads": SIZES,
        "mamba_num_groups": SIZES,
        "num_attention_heads": SIZES,
        "num_query_groups": SIZES,
        "num_moe_experts": SIZES,
        "moe_router_topk": st.sampled_from([1, 2, 8]),
        "moe_ffn_hidden_size": st.sampled_from([96, 128]),
        "moe_latent_size": st.sampled_from([None, 64, 128]),
        "ffn_hidden_size": st.sampled_from([None, 96]),
        "mtp_depths": st.sampled_from([0, 2]),
        "mtp_pattern": st.sampled_from(["", "*E", "M-"]),
        "vocab_size": st.sampled_from([4096, 4095]),
    }
)
STAGE = st.fixed_dictionaries(
    {"seq_length": st.sampled_from([256, 255, 96, 1]), "global_batch_size": st.sampled_from([0, 6, 16, 24, 48]),
     "micro_batch_size": st.sampled_from([1, 2, 3])}
)  # fmt: skip


def assert_runnable(run: Run) -> None:
    """Conditions of Megatron-Core 0.19.2, written again from its sources."""
    layout, model = run.layout, run.model
    assert layout.world_size == layout.tp * layout.pp * layout.cp * layout.dp
    assert layout.world_size % (layout.etp * layout.ep * layout.pp) == 0
    assert model.num_attention_heads % layout.tp == 0 == model.vocab_size % layout.tp
    assert model.num_query_groups % layout.tp == 0 or layout.tp % model.num_query_groups == 0
    layers = model.pattern + model.mtp_pattern
    if "M" in layers:
        assert model.mamba_num_heads % (layout.tp * layout.cp) == 0 == model.mamba_num_groups % layout.tp
        local = model.mamba_num_groups // layout.tp
        assert layout.cp % local == 0 if local < layout.cp else local % layout.cp == 0
    if "E" in layers:
        assert model.num_moe_experts % layout.ep == 0 == model.moe_ffn_hidden_size % layout.etp
        assert model.moe_router_topk <= model.num_moe_experts
        assert layout.sequence_parallel or layout.tp == 1
    main, *depths = layout.hybrid_layer_pattern.split("/")
    segments = main.split("|")
    assert len(segments) == layout.pp * layout.vpp
    assert all(segments)
    assert "".join(segments) == model.pattern
    assert depths == [model.mtp_pattern] * model.mtp_depths
    for stage in run.stages:
        assert stage.global_batch_size == stage.micro_batch_size * layout.dp * stage.num_microbatches
        assert layout.cp == 1 or stage.seq_length % (2 * layout.cp) == 0
        assert not layout.sequence_parallel or stage.seq_length // layout.cp % layout.tp == 0
        assert layout.vpp == 1 or stage.num_microbatches % layout.pp == 0
    schedule = run.schedule
    assert schedule.warmup_tokens + schedule.wsd_decay_tokens <= schedule.decay_end_tokens


@given(PARALLEL, MODEL, STAGE, st.sampled_from([0, 1, 2, 4, 6, 8, 16, 48]))
@settings(max_examples=300, deadline=None)
def test_any_layout_resolves_to_a_runnable_run_or_is_refused(
    parallel: dict[str, object], model: dict[str, object], stage: dict[str, int], world_size: int
) -> None:
    recipe = replace(
        TINY,
        parallel=replace(TINY.parallel, **parallel),  # type: ignore[arg-type]
        model=replace(TINY.model, **model),  # type: ignore[arg-type]
        stages={"main": replace(TINY.stages["main"], **stage)},  # type: ignore[arg-type]
    )
    run = resolved(recipe, world_size)
    if isinstance(run, Run):
        assert_runnable(run)
    else:
        assert run.why


@given(st.sampled_from(["tp", "cp", "ep", "pp", "etp"]), st.integers(1, 24), st.sampled_from([1, 2, 4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_the_nearest_value_offered_is_legal(name: str, value: int, world_size: int) -> None:
    key = f"parallel.{name}"
    recipe = with_value(with_value(TINY, "parallel.ep", 1), key, value)
    error = resolved(recipe, world_size)
    assume(isinstance(error, UserError))
    for offered, number in re.findall(r"([\w.]+)=(\d+)", str(error.nearest)):
        if offered == "world_size":
            assert isinstance(resolved(recipe, int(number)), Run)
        else:
            # It silences the rule that spoke; another value may still be wrong, and then the message is another one.
            again = resolved(with_value(recipe, offered, int(number)), world_size)
            assert isinstance(again, Run) or again.why != error.why


def resolved(recipe: Recipe, world_size: int) -> Run | UserError:
    try:
        return resolve(recipe, world_size)
    except UserError as error:
        return error


def test_values_are_shown_as_they_are_written() -> None:
    assert [show(value) for value in (None, True, "", ("a", "b"), 1.5)] == ["null", "true", "''", "[a, b]", "1.5"]
