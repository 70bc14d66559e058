"""The doctor's checks, in the order of its table."""

from __future__ import annotations

from nemotron3_megatron.platform.checks import collectives, quantising, speed
from nemotron3_megatron.platform.checks.attention import ATTENTION, DOCUMENT_ATTENTION
from nemotron3_megatron.platform.checks.experts import GROUPED_PRODUCT, WEIGHTED_SQUARED_RELU
from nemotron3_megatron.platform.checks.linears import COLUMN_LINEAR, NORM_LINEAR, ROW_LINEAR
from nemotron3_megatron.platform.checks.mamba import CONVOLUTION, GROUP_NORM, MIXER
from nemotron3_megatron.platform.checks.outcome import Check
from nemotron3_megatron.platform.checks.router import ROUTER
from nemotron3_megatron.platform.checks.vocabulary import VOCABULARY_LOSS

CHECKS: tuple[Check, ...] = (
    Check("norm + linear", NORM_LINEAR),
    Check("column linear", COLUMN_LINEAR),
    Check("row linear", ROW_LINEAR),
    Check("attention", ATTENTION),
    Check("attention, documents", DOCUMENT_ATTENTION),
    Check("router", ROUTER),
    Check("grouped experts", GROUPED_PRODUCT),
    Check("squared ReLU", WEIGHTED_SQUARED_RELU),
    Check("Mamba-2 convolution", CONVOLUTION),
    Check("Mamba-2 mixer", MIXER),
    Check("Mamba-2 norm", GROUP_NORM),
    Check("vocabulary loss", VOCABULARY_LOSS),
    Check("NVFP4 emulation", quantising.quantise_nvfp4),
    Check("MXFP8 emulation", quantising.quantise_mxfp8),
    Check("memory bandwidth", speed.memory),
    Check("BF16 product", speed.bf16_product),
    Check("FP8 product", speed.fp8_product),
    Check("collectives", collectives.exchange),
)
