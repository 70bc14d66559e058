"""The GEMM-bearing modules of a built model by the names that a precision plan uses."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nemotron3_megatron.precision.modules import LEAVES

_LEAVES = tuple(leaf for leaves in LEAVES.values() for _, leaf in leaves)


def named_linears(chunk: nn.Module) -> dict[str, nn.Module]:
    """The linears of one model chunk by canonical name, in the order of the forward pass.

    Names are those of :func:`nemotron3_megatron.precision.modules.linear_modules`. Decoder layers are numbered over
    the whole model, by ``layer_number``, which Megatron-Core counts from 1; in ``named_modules()`` they are numbered
    from the first layer of the chunk. MTP lives in one chunk, so its own numbers are global.

    Args:
        chunk: a bare :class:`~nemotron3_megatron.model.hybrid.Nemotron3Model`, in either module spec.

    Raises:
        RuntimeError: a layer has none of the linears that any kind of layer has.
    """
    linears: dict[str, nn.Module] = {}
    for layer in chunk.get_submodule("decoder.layers").children():
        number: int = layer.layer_number  # type: ignore[assignment]
        linears |= _in_layer(layer, f"decoder.layers.{number - 1}")
    for depth, block in enumerate(_mtp_blocks(chunk)):
        stem = f"mtp.layers.{depth}"
        linears[f"{stem}.eh_proj"] = block.get_submodule("eh_proj")
        for index, layer in enumerate(block.get_submodule("mtp_model_layer.layers").children()):
            linears |= _in_layer(layer, f"{stem}.mtp_model_layer.layers.{index}")
    return linears


def _mtp_blocks(chunk: nn.Module) -> Iterator[nn.Module]:
    """The depths' blocks; one if all depths share theirs, none outside the last pipeline stage."""
    if hasattr(chunk, "mtp"):
        yield from chunk.get_submodule("mtp.layers").children()


def _in_layer(layer: nn.Module, stem: str) -> dict[str, nn.Module]:
    modules = dict(layer.named_modules())
    found = {f"{stem}.{leaf}": modules[leaf] for leaf in _LEAVES if leaf in modules}
    if not found:
        raise RuntimeError(f"{stem} ({type(layer).__name__}) has none of the linears {', '.join(_LEAVES)}")
    return found
