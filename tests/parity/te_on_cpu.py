"""Transformer Engine's own Python on a machine without CUDA, its compiled backend replaced by a few lines of torch.

TE decides in Python which tensors are quantised, by what, when and for which GEMM; the backend multiplies. ``install``
makes ``import transformer_engine`` work from an unpacked wheel: CUDA calls are rewritten as Megatron-Core's are
(:mod:`nemotron3_megatron.platform.rewrite`), and ``transformer_engine_torch`` is :class:`Backend`. A function that is
missing there fails when it is called.
"""

from __future__ import annotations

import importlib.abc
import itertools
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.platform import cuda_on_cpu, rewrite

TE = "transformer_engine"


def install(folder: str, capability: tuple[int, int]) -> None:
    """Make TE importable from ``folder``, on a pretended GPU of the given compute capability."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE's own way not to load its libraries
    sys.path.append(folder)
    sys.meta_path.insert(0, _Finder(_Cuda(capability)))
    sys.modules[f"{TE}_torch"] = Backend(f"{TE}_torch")


class _Cuda(ModuleType):
    """``torch.cuda`` as TE sees it: that of :mod:`cuda_on_cpu`, and a GPU that exists."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__("cuda")
        self.capability = capability

    def is_available(self) -> bool:
        return True

    def get_device_capability(self, *_: object) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, *_: object) -> Any:
        major, minor = self.capability
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=1, name="pretended")

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda_on_cpu, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, cuda: _Cuda) -> None:
        self._cuda = cuda

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != TE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._cuda)
        return spec


class _Loader(rewrite.RewritingLoader):
    def __init__(self, fullname: str, path: str, cuda: _Cuda) -> None:
        super().__init__(fullname, path)
        self._cuda = cuda

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        # TE asks whether tensors are where it works.
        source = self.get_data(path).replace(b".is_cuda", b".is_cpu")
        return compile(rewrite.rewrite(source, path), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[rewrite.NAME] = self._cuda
        SourceFileLoader.exec_module(self, module)
        if module.__name__ == f"{TE}.common":
            module.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]


class _Stub(type):
    """A class of the backend: its attributes are the numbers of an enumeration."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = next(_numbers)
        setattr(cls, name, value)
        return value


_numbers = itertools.count(1)


class _Known:
    """The part of the backend that is here."""

    DType = IntEnum(
        "DType",
        ["kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"],
    )
    FP8FwdTensors = IntEnum(
        "FP8FwdTensors",
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT "
        "GEMM3_OUTPUT",
        start=0,
    )
    FP8BwdTensors = IntEnum(
        "FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3", start=0
    )
    NVTE_Fused_Attn_Backend = IntEnum(
        "NVTE_Fused_Attn_Backend", ["NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend"]
    )

    @staticmethod
    def get_num_cublas_streams() -> int:
        return 1

    @staticmethod
    def generic_gemm(
        a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, *options: Any, **_: Any
    ) -> tuple[Tensor, None, None, None]:
        """op(b) @ op(a), summed in float32."""
        dtype, accumulate = options[1], options[9]
        product = _product(a, transa, b, transb)
        if out is None:
            return product.to(b.dtype if dtype is None else _DTYPES[dtype]), None, None, None
        out.copy_(out + product if accumulate else product)
        return out, None, None, None

    @staticmethod
    def te_general_grouped_gemm(
        a: list[Tensor], transa: bool, b: list[Tensor], transb: bool, out: list[Tensor], *options: Any
    ) -> Any:
        splits, bias, single_output, accumulate = options[1], options[2], options[4], options[9]
        outs = out[0].split(splits) if single_output else out
        for left, right, target in zip(a, b, outs, strict=True):
            product = _product(left, transa, right, transb)
            target.copy_(target + product if accumulate else product)
        return bias

    @staticmethod
    def fused_multi_row_padding(x: Tensor, out: Tensor, counts: list[int], padded: list[int]) -> None:
        out.zero_()
        for source, target in zip(x.split(counts), out.split(padded), strict=True):
            target[: source.shape[0]] = source

    @staticmethod
    def fused_multi_row_unpadding(x: Tensor, out: Tensor, padded: list[int], counts: list[int]) -> None:
        for source, target in zip(x.split(padded), out.split(counts), strict=True):
            target.copy_(source[: target.shape[0]])

    @staticmethod
    def rmsnorm_fwd(
        x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: None, dtype: Any, *_: Any
    ) -> tuple[Tensor, None, Tensor]:
        assert quantizer is None
        wide = x.float()
        rsigma = (wide.square().mean(-1) + eps).rsqrt()
        normed = (wide * rsigma[:, None] * weight.float()).to(_DTYPES[dtype])
        return (normed if out is None else out.copy_(normed)), None, rsigma

    @staticmethod
    def rmsnorm_bwd(dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        unit = x.float() * rsigma[:, None]
        scaled = dy.float() * weight.float()
        dx = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * rsigma[:, None]
        return dx.to(x.dtype), (dy.float() * unit).sum(0).to(weight.dtype)


class Backend(ModuleType):
    """``transformer_engine_torch``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # In the module's own namespace: TE also imports `*`.
        for known in dir(_Known):
            if not known.startswith("__"):
                setattr(self, known, getattr(_Known, known))
        for unused in ("layernorm_fwd", "layernorm_bwd"):
            setattr(self, unused, _missing(unused))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Stub(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(self, name, value)
        return value


_DTYPES = {
    _Known.DType.kFloat32: torch.float32,
    _Known.DType.kBFloat16: torch.bfloat16,
    _Known.DType.kFloat16: torch.float16,
}


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    left, right = b.float(), a.float()
    if transb:
        left = left.flatten(0, -2).T
        right = right.flatten(0, -2)
    return left @ (right.T if transa else right)


def _missing(name: str) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{name}")

    return fail
