"""``nemotron3 checkpoint ls|show|verify|rm``: checkpoints on disk, looked at without Megatron or a process group."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.claim import Claim
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import nearest_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import Metadata

DAMAGED = 1
"""Exit status of ``verify`` when something is."""


def checkpoint_main(arguments: list[str], as_json: bool) -> int:
    """Run the command; returns the exit status.

    Args:
        arguments: the action, and a run directory or one checkpoint.
        as_json: print one JSON object instead of a table (``ls`` and ``show``).

    Raises:
        UserError: another action, nothing there, or a job is running in the directory (``rm``).
    """
    actions: dict[str, Callable[[Path, bool], int]] = {"ls": _ls, "show": _show, "verify": _verify, "rm": _rm}
    name = arguments[0] if arguments else ""
    if name not in actions or len(arguments) != 2:
        close = nearest_name(name, actions) if name not in actions else None
        raise UserError(
            " ".join(["checkpoint", *arguments]),
            where="command line",
            why="takes one of ls, show, verify, rm, and a run directory or a checkpoint",
            nearest=f"nemotron3 checkpoint {close or name or 'ls'} RUN_DIR",
        )
    return actions[name](Path(arguments[1]), as_json)


def _ls(place: Path, as_json: bool) -> int:
    rows = [_row(path) for path in _checkpoints(place)]
    if as_json:
        sys.stdout.write(json.dumps({"checkpoints": rows}) + "\n")
        return 0
    table = Table("checkpoint", "tokens", "validation loss", "size", "saved under", "", box=None)
    for row in rows:
        loss = row["validation_loss"]
        table.add_row(
            row["name"],
            "" if row["tokens"] is None else f"{row['tokens']:,}",
            "" if loss is None else f"{loss:.4f}",
            _size(row["bytes"]),
            _layout(row["layout"]),
            row["damage"] and f"damaged: {row['damage']}",
        )
    _print(table)
    return 0


def _show(place: Path, as_json: bool) -> int:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = _checkpoints(place)[0]
    found = _read(path)
    index = _index(path)
    tensors: list[dict[str, Any]] = [
        {"key": key, "shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch.")}
        for key, entry in sorted(index.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    ]
    if as_json:
        document = {key: value for key, value in asdict(found).items() if key != "samples"}
        sys.stdout.write(json.dumps({"path": str(path), **document, "tensors": tensors}) + "\n")
        return 0
    weights = [tensor for tensor in tensors if not tensor["key"].startswith("optimizer.")]
    table = Table("", "", box=None, show_header=False)
    table.add_row("checkpoint", str(path))
    table.add_row("step", f"{found.step:,}")
    updates = "none saved" if found.optimizer_step is None else f"{found.optimizer_step:,} updates"
    table.add_row("optimizer", updates)
    table.add_row("saved under", _layout(found.layout))
    table.add_row("files", f"{len(found.files)}, {_size(sum(file.bytes for file in found.files.values()))}")
    table.add_row("weights", f"{len(weights)} tensors, {sum(prod(t['shape']) for t in weights):,} elements")
    for key in ("tokens", "validation_loss", "precision"):
        if key in found.state:
            table.add_row(key.replace("_", " "), str(found.state[key]))
    _print(table)
    return 0


def _verify(place: Path, _as_json: bool) -> int:
    damaged = 0
    for path in _checkpoints(place):
        try:
            _verify_one(path)
        except ValueError as damage:
            damaged += 1
            sys.stdout.write(f"{path}: damaged: {damage}\n")
        else:
            sys.stdout.write(f"{path}: intact\n")
    return DAMAGED if damaged else 0


def _verify_one(path: Path) -> None:
    """Read every byte, and compare tensors with what was noted of them while they were live."""
    from nemotron3_megatron.checkpoint.writing import read_tensor, require_same

    found = manifest.verify(path)
    manifest.verify_contents(found, path)
    places = {(key.fqn, tuple(key.offset or ())): place for key, place in _index(path).storage_data.items()}
    for sample in found.samples:
        require_same(sample, read_tensor(path, places[sample.key, sample.offset]))


def _rm(place: Path, _as_json: bool) -> int:
    """A checkpoint; or of a run directory what is damaged or left over."""
    one = _is_checkpoint(place)
    run_dir = place.resolve().parents[1] if one else place
    directory = CheckpointDirectory(run_dir)
    if not directory.root.is_dir():
        raise _nothing(place)
    with _claimed(run_dir):
        if one:
            doomed = [directory.root / place.resolve().name]
        else:
            intact = set(directory.complete())
            doomed = [path for path in directory.present() if path not in intact]
            for left in directory.leftovers():
                shutil.rmtree(left)
                sys.stdout.write(f"removed {left}\n")
        for path in doomed:
            directory.remove(path)
            sys.stdout.write(f"removed {path}\n")
    return 0


@contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    claim = Claim.take(run_dir)
    try:
        yield
    finally:
        claim.release()


def _checkpoints(place: Path) -> list[Path]:
    """The checkpoint at ``place``, or those of the run there, newest first."""
    found = [place] if _is_checkpoint(place) else CheckpointDirectory(place).present()
    if not found:
        raise _nothing(place)
    return found


def _nothing(place: Path) -> UserError:
    return UserError(
        str(place),
        where="command line",
        why="is no checkpoint, and no run directory with checkpoints in it",
        nearest="RUN_DIR or RUN_DIR/checkpoints/step_XXXXXXXX",
    )


def _is_checkpoint(place: Path) -> bool:
    resolved = place.resolve()
    return resolved in CheckpointDirectory(resolved.parents[1]).present() if len(resolved.parents) > 1 else False


def _row(path: Path) -> dict[str, Any]:
    try:
        found = manifest.verify(path)
    except ValueError as damage:
        size = sum(file.stat().st_size for file in path.iterdir())
        nothing = dict.fromkeys(("step", "tokens", "validation_loss", "layout"))
        return {"name": path.name, "bytes": size, "damage": str(damage), **nothing}
    return {
        "name": path.name,
        "bytes": sum(file.bytes for file in found.files.values()),
        "damage": None,
        "step": found.step,
        "tokens": found.state.get("tokens"),
        "validation_loss": found.state.get("validation_loss"),
        "layout": found.layout,
    }


def _read(path: Path) -> manifest.Manifest:
    try:
        return manifest.verify(path)
    except ValueError as damage:
        raise UserError(str(path), why=f"is damaged: {damage}", nearest=f"nemotron3 checkpoint ls {path}") from None


def _index(path: Path) -> Metadata:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(path).read_metadata()


def _layout(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return ""
    named = [f"{name.upper()}{size}" for name, size in sizes.items() if name != "world_size" and size > 1]
    return " ".join([f"{sizes.get('world_size', '?')} ranks", *named])


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)
