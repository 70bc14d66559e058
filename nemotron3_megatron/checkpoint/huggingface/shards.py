"""Safetensors files of bounded size with an index, written one after the other, and read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.mapping import Shape
from nemotron3_megatron.config.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor before it is there."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that are made together and lie in one file."""

    specs: tuple[Spec, ...]
    make: Callable[[], Sequence[Tensor]]
    """In the order of ``specs``."""

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs)


def write_shards(items: Iterable[Item], directory: Path, max_bytes: int) -> None:
    """Write ``model-XXXXX-of-XXXXX.safetensors`` and the index. Memory holds one file's tensors.

    Args:
        items: in the order in which they are to be read again.
        directory: existing.
        max_bytes: of a file; a larger item has a file of its own.
    """
    files = list(_files(items, max_bytes))
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(file, directory / name)
        weight_map |= {spec.name: name for item in file for spec in item.specs}
    index = {"metadata": {"total_size": sum(item.bytes for file in files for item in file)}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(items: Iterable[Item], max_bytes: int) -> Iterator[list[Item]]:
    file: list[Item] = []
    size = 0
    for item in items:
        if file and size + item.bytes > max_bytes:
            yield file
            file, size = [], 0
        file.append(item)
        size += item.bytes
    yield file


def _write(file: list[Item], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for item in file:
        for spec, tensor in zip(item.specs, item.make(), strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                raise RuntimeError(f"{spec} was made as {tensor.dtype} {tuple(tensor.shape)}")
            tensors[spec.name] = tensor.contiguous()
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(str(error)) from error
    # safetensors lets nobody but the owner read its files; the directory has what the user's umask allows.
    path.chmod(path.parent.stat().st_mode & 0o666)


class ShardReader:
    """The tensors of a directory of safetensors files."""

    def __init__(self, directory: Path) -> None:
        """Read names, shapes and types.

        Raises:
            UserError: no safetensors there, or a file is missing or damaged.
        """
        self._directory = directory
        self.specs: dict[str, Spec] = {}
        self._file_of: dict[str, Path] = {}
        self._last: tuple[Path, safe_open] | None = None
        for path in self._paths():
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    self.specs[name] = Spec(name, tuple(part.get_shape()), _dtype(path, name, part.get_dtype()))
                    self._file_of[name] = path

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or rows of it; not a view of the file, which would stay mapped as long as the tensor lives."""
        path = self._file_of[name]
        if self._last is None or self._last[0] != path:
            self._last = None  # unmapped before the next one is mapped
            self._last = (path, _opened(path))
        file: Any = self._last[1]
        part: Tensor = file.get_slice(name)[rows] if self.specs[name].shape else file.get_tensor(name)
        return part.clone()

    def _paths(self) -> list[Path]:
        index = self._directory / INDEX
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return sorted({self._directory / name for name in names})
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(str(index), why=f"is not the index of safetensors files ({error!r})") from None
        if (self._directory / SINGLE).is_file():
            return [self._directory / SINGLE]
        raise UserError(f"hf={self._directory}", why=f"holds neither {INDEX} nor {SINGLE}")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


def _dtype(path: Path, name: str, found: str) -> torch.dtype:
    if found not in _DTYPES:
        raise UserError(str(path), why=f"{name} has type {found}, weights have one of {', '.join(_DTYPES)}")
    return _DTYPES[found]


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as damage:
        raise UserError(str(path), why=f"is not a readable safetensors file: {damage}") from None
