"""The recipe: what a user writes, as frozen dataclasses with units in their names.

Field names follow Megatron-Core where it has one. Numbers of the official recipes live in ``recipes/``
with their sources; the defaults here are those common to the whole Nemotron 3 family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemotron3_megatron.config.cluster import ClusterConfig
from nemotron3_megatron.config.duration import EACH_STEP, EVERY_10_STEPS, EVERY_100_STEPS, NO_TOKENS, Duration
from nemotron3_megatron.precision.policy import Format, Policy

GpuName = Literal["h100", "h200", "b200", "b300", "gb200", "gb300"]
"""GPUs whose limits planning knows (``accelerators``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture (facts of the Nemotron 3 white paper section 2.1 and the Super/Ultra reports)."""

    pattern: str
    """Main stack, one symbol a layer: M Mamba-2, * attention, E mixture of experts, - MLP."""
    hidden_size: int
    vocab_size: int
    num_attention_heads: int = 32
    num_query_groups: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int | None = None
    """Width of '-' layers; required when the pattern has one."""

    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8
    mamba_chunk_size: int = 128

    num_moe_experts: int = 128
    moe_router_topk: int = 6
    moe_ffn_hidden_size: int = 1856
    moe_shared_expert_intermediate_size: int | None = None
    moe_latent_size: int | None = None
    """Routed experts work in this width (LatentMoE, white paper section 2.2); None: in hidden_size."""
    moe_router_topk_scaling_factor: float = 2.5
    moe_router_bias_update_rate: float = 1e-3
    moe_aux_loss_coeff: float = 1e-4

    mtp_pattern: str = ""
    """Layers of one multi-token-prediction depth, such as '*E'; empty: no MTP."""
    mtp_depths: int = 0
    mtp_use_repeated_layer: bool = True
    """One block shared by all depths (Super and Ultra reports); False: one block a depth."""
    mtp_loss_scaling_factor: float = 0.1

    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    spec: Literal["auto", "torch", "te"] = "auto"
    """Module implementation: Transformer Engine + mamba-ssm, or pure torch; auto: what the platform has."""
    moe_router_fusion: bool = False
    """Choose experts by Transformer Engine's kernels (te only). Off by default: not timed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig(Policy):
    """Numerics of training: a policy and what carries it out; ``name`` is its file name in ``recipes/precision``."""

    default: Format = "bf16"
    name: str
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of parameters and activations. Master weights, gradients and moments are FP32 always."""
    backend: Literal["auto", "native", "emulated"] = "auto"
    """native: Transformer Engine's kernels (Blackwell); emulated: quantise and dequantise around GEMMs in ``dtype``;
    auto: native where the GPU has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How one model is spread over ranks; data parallel size is what remains of the world."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks a pipeline rank holds (interleaved schedule when > 1)."""
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool | None = None
    """None: on when tp > 1."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    cuda_graph: Literal["auto", "none", "passes"] = "auto"
    """passes: forward and backward of a step are one CUDA graph; auto: on one GPU where possible, saying why not."""
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the token-based learning-rate schedule."""

    lr: float
    min_lr: float
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    lr_warmup: Duration = NO_TOKENS
    lr_decay_style: Literal["WSD", "cosine", "linear", "constant"] = "WSD"
    lr_wsd_decay_style: Literal["minus_sqrt", "linear", "cosine"] = "minus_sqrt"
    lr_decay: Duration | None = None
    """Where the decay ends, counted from the start; None: at the end of the last stage without an ``lr`` of its own."""
    lr_wsd_decay: Duration | None = None
    """Length of the WSD tail; required for WSD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthConfig:
    """A further sequence length of a stage: whole steps are of this length, spread evenly among the others."""

    seq_length: int
    share: float = 0.5
    """Of the stage's steps; one further length of 0.5 alternates with the stage's own, which has what remains."""
    batch_tokens: int | None = None
    """Tokens in one such step; None: as many as in the stage's other steps."""
    micro_batch_size: int = 1
    blend: str | None = None
    """As the stage's ``blend``; None: the stage's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RampupConfig:
    """A batch that grows from ``start_tokens`` by ``increment_tokens`` at a time to the stage's own."""

    start_tokens: int
    increment_tokens: int
    over: Duration
    """How long until the stage's own batch is reached; each size gets an equal part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. Its batch is given in sequences or in tokens."""

    tokens: Duration
    seq_length: int
    global_batch_size: int | None = None
    """Sequences in one optimizer step."""
    batch_tokens: int | None = None
    """Tokens in one optimizer step."""
    micro_batch_size: int = 1
    blend: str | None = None
    """A name in ``data.blends``; None: all of ``data.sources`` by their own weights."""
    other_lengths: dict[str, LengthConfig] = field(default_factory=dict)
    """Named; never mixed with the stage's own within a step."""
    batch_rampup: RampupConfig | None = None
    """With ``other_lengths``, those without ``batch_tokens`` grow too."""
    lr: float | None = None
    """Constant learning rate of this stage; None: the schedule of ``optimizer``, which spans all such stages."""
    parallel: ParallelConfig | None = None
    """A layout of its own (a whole one: what is left out has its default); None: the recipe's."""
    precision: PrecisionConfig | None = None
    """A policy of its own; None: the recipe's."""
    trainable: tuple[str, ...] = ()
    """Regular expressions, searched in parameters' global names; the parameters that none is found in are left as they
    are, and so are the routers' expert biases. Empty: all are trained."""
    world_size: int | None = None
    """Ranks for a stage that differs in layout from the one being trained; None: the recipe's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One tokenised source of a blend."""

    path: str
    """Prefix of a ``.bin``/``.idx`` pair."""
    weight: float = 1.0
    """Relative to the other sources; for stages without a ``blend``."""
    max_epochs: float | None = None
    """A run that would read it more often, over all stages, is refused; null: any number."""
    tag: str = ""
    """What it is, such as ``code``: ``nemotron3 data inspect`` sums over tags."""
    isolate_documents: bool | None = None
    """false: documents that are neighbours in a sequence see each other (such as the files of one repository);
    null: as ``data.isolate_documents``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    sources: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    blends: dict[str, dict[str, float]] = field(default_factory=dict)
    """Weights of sources by the name of a blend, which stages choose; sources that a blend leaves out are not read.
    A blend may name another blend in place of a source and takes its shares."""
    tokenizer: str | None = None
    """Directory or file of the tokenizer that made the data (see data_prep); needed for generation."""
    eod_token: int = 0
    """Token id that ends every document."""
    isolate_documents: bool = True
    """Documents packed in one sequence do not see each other, and no loss crosses a boundary."""
    num_prefetch: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and what a start resumes from."""

    every: Duration | None = None
    async_save: bool = False
    """Write from a worker process while training goes on (docs/checkpoints.md says when it pays)."""
    keep_last: int | None = 3
    """None: keep all."""
    keep_every: Duration | None = None
    """Keep for ever the first checkpoint at or after each multiple of this, for merging."""
    keep_best: int = 0
    """Keep so many with the lowest validation loss, of those at whose step it was measured."""
    save_at_end: bool = True
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint of run_dir."""
    load: str | None = None
    """Start from this checkpoint when run_dir has none."""
    allow_data_change: bool = False
    """Accept a blend that differs from the checkpoint's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What is shown and recorded."""

    log_every: Duration = EACH_STEP
    eval_every: Duration | None = None
    eval_batches: int = 8
    precision_every: Duration | None = EVERY_100_STEPS
    """How often to observe what quantisation loses in each operand (also in the first step); null: never. Has no effect
    where nothing is quantised."""
    health_every: Duration | None = EVERY_10_STEPS
    """How often to measure expert load, activations and gradients by layer (also in the first step); null: never."""
    samples: bool = False
    """Write ``samples.jsonl``: of every step the sequence length and which windows of which sources it read."""
    tensorboard: bool = True
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline when wandb is installed, else off."""
    wandb_project: str = "nemotron3"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResilienceConfig:
    """What a run does about hangs, bad numbers and slow ranks."""

    watchdog: bool = True
    """A thread on every rank ends the run when a rank has failed or a phase takes longer than its limit."""
    start_timeout_s: float = 3600.0
    """From the start of the process to its first step: groups, model, checkpoint."""
    first_step_timeout_s: float = 1800.0
    """Of the first step of a start, which compiles and allocates."""
    step_timeout_s: float = 900.0
    save_timeout_s: float = 1800.0
    evaluation_timeout_s: float = 1800.0
    rerun_suspect_steps: bool = True
    """Do the passes of a suspect step once more: a fault that does not come back was the hardware's."""
    transient_limit: int = 3
    """Steps of a start that may come out right only in their second pass; the next one ends the run."""
    non_finite: Literal["skip", "rollback", "fail"] = "skip"
    """What follows a step whose gradients are not finite; it never moves weights."""
    non_finite_limit: int = 10
    """Such steps in a row that skip tolerates."""
    spike: Literal["ignore", "skip", "rollback", "fail"] = "ignore"
    """What follows a step whose loss spikes; except for ignore, it does not move weights."""
    spike_nats: float = 2.0
    """A loss this far above the median of the window is a spike."""
    spike_window_steps: int = 50
    """Steps whose median is the norm; none is a spike before half of them are known."""
    spike_limit: int = 5
    """Spikes in a row that skip tolerates."""
    rollback_checkpoints: int = 1
    """How many checkpoints a rollback goes back: 1 is the newest. The data goes on behind what was read."""
    rollback_limit: int = 3
    """Rollbacks of a start; one more ends the run."""
    straggler_every: Duration | None = EVERY_100_STEPS
    """How often step times of all ranks are compared; null: never."""
    straggler_factor: float = 1.5
    """A rank that is slower than the median of all by this factor is reported."""
    straggler: Literal["auto", "own", "nvrx"] = "own"
    """own: times of steps and of a fixed piece of work. nvrx: also times of the step's CUDA kernels, taken by
    nvidia-resiliency-ext, which must be there. auto: nvrx on CUDA where it can be loaded, else own. own is the default
    because nvrx has not run on a GPU yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugConfig:
    """Faults for tests of resilience; see ``config.fault``."""

    fault: str = ""
    """Such as ``kill:rank=1,step=20``; several are separated by ``;``."""
    allow_faults: bool = False
    """Without it a recipe with a fault is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe, as composed from ``recipes/`` and the command line."""

    name: str
    model: ModelConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    stages: dict[str, StageConfig]
    data: DataConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where ``nemotron3 submit`` sends the run; of effect there only."""
    run_dir: str = ""
    """Empty: ``runs/<name>``."""
    seed: int = 1234
    max_steps: int | None = None
    """Stop after this many optimizer steps in all, whatever the stages say."""
    world_size: int | None = None
    """For planning; training takes it from torchrun."""
    stage: str | None = None
    """For planning: show this stage's layout and precision; training takes the stage from the checkpoint."""
    gpu: GpuName | None = None
    """For planning's estimate of time. None: h100 for a model all in BF16, gb200 for one with quantised GEMMs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
