"""The recipe: what a user writes, as frozen dataclasses with units in their names.

Field names follow Megatron-Core where it has one. Numbers of the official recipes live in ``recipes/``
with their sources; the defaults here are those common to the whole Nemotron 3 family.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemotron3_megatron.config.duration import EACH_STEP, EVERY_100_STEPS, NO_TOKENS, Duration
from nemotron3_megatron.precision.policy import Format, Policy

GpuName = Literal["h100", "h200", "b200", "b300", "gb200", "gb300"]
"""GPUs whose limits planning knows (``plan.hardware``)."""


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
    cuda_graph: Literal["auto", "none", "passes"] = "none"
    """passes: forward and backward of a step are one CUDA graph; auto: where that is possible, saying why not."""
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
    """Where the decay ends, counted from the start; None: at the end of the last stage."""
    lr_wsd_decay: Duration | None = None
    """Length of the WSD tail; required for WSD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum."""

    tokens: Duration
    seq_length: int
    global_batch_size: int
    """Sequences in one optimizer step."""
    micro_batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One tokenised source of a blend."""

    path: str
    """Prefix of a ``.bin``/``.idx`` pair."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    sources: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = field(default_factory=dict)
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
    keep_last: int | None = 3
    """None: keep all."""
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
    tensorboard: bool = True
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline when wandb is installed, else off."""
    wandb_project: str = "nemotron3"


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
    run_dir: str = ""
    """Empty: ``runs/<name>``."""
    seed: int = 1234
    max_steps: int | None = None
    """Stop after this many optimizer steps in all, whatever the stages say."""
    world_size: int | None = None
    """For planning; training takes it from torchrun."""
    gpu: GpuName | None = None
    """For planning's estimate of time. None: h100 for a model all in BF16, gb200 for one with quantised GEMMs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
