"""``nemotron3 checkpoint ls|show|verify|rm``: checkpoints on disk, looked at without Megatron or a process group."""

from __future__ import annotations

import json
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
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory, erase
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import nearest_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import Metadata

DAMAGED = 1
"""Exit status of ``verify`` when something is."""

_INDEX = ".metadata"
"""torch's name of the file that says where which tensor is."""


def checkpoint_main(arguments: list[str], as_json: bool) -> int:
    """Run the command; returns the exit status.

    Args:
        arguments: the action, and a run directory or one checkpoint.
        as_json: print one JSON object instead of lines or a table.

    Raises:
        UserError: another action, nothing there, or it cannot be removed (``rm``): a job is running in the directory.
    """
    actions: dict[str, Callable[[Path, bool], int]] = {"ls": _ls, "show": _show, "verify": _verify, "rm": _rm}
    name = arguments[0] if arguments else ""
    if name not in actions or len(arguments) != 2:
        close = name if name in actions else nearest_name(name, actions)
        raise UserError(
            " ".join(["checkpoint", *arguments]),
            where="command line",
            why="takes one of ls, show, verify, rm, and a run directory or a checkpoint",
            nearest=f"nemotron3 checkpoint {close or 'ls'} RUN_DIR",
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
    found, index = _read(path)
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


def _verify(place: Path, as_json: bool) -> int:
    rows = []
    for path in _checkpoints(place):
        damage = _damage(path)
        rows.append({"name": path.name, "damage": damage})
        if not as_json:
            sys.stdout.write(f"{path}: {'intact' if damage is None else f'damaged: {damage}'}\n")
    if as_json:
        sys.stdout.write(json.dumps({"checkpoints": rows}) + "\n")
    return DAMAGED if any(row["damage"] for row in rows) else 0


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: every byte is read, and tensors are compared with what was noted of
    them while they were live."""
    from nemotron3_megatron.checkpoint.writing import read_tensor, require_same

    try:
        found = manifest.verify(path)
        manifest.verify_contents(found, path)
        places = {(key.fqn, tuple(key.offset or ())): place for key, place in _index(path).storage_data.items()}
        for sample in found.samples:
            require_same(sample, read_tensor(path, places[sample.key, sample.offset]))
    except (ValueError, OSError) as damage:
        return str(damage)
    return None


def _rm(place: Path, as_json: bool) -> int:
    """A checkpoint; or of a run directory what is damaged or left over."""
    one = _in_run(place)
    run_dir = place if one is None else one.parents[1]
    directory = CheckpointDirectory(run_dir)
    if not directory.root.is_dir():
        raise _nothing(place)
    removed = []
    try:
        with _claimed(run_dir):
            for path, remove in [(one, directory.remove)] if one is not None else _doomed(directory):
                remove(path)
                removed.append(str(path))
                if not as_json:
                    sys.stdout.write(f"removed {path}\n")
    except OSError as error:
        why = f"cannot be removed: {error.strerror or error}"
        raise UserError(error.filename or str(place), where="command line", why=why) from error
    if as_json:
        sys.stdout.write(json.dumps({"removed": removed}) + "\n")
    return 0


def _doomed(directory: CheckpointDirectory) -> list[tuple[Path, Callable[[Path], None]]]:
    """What is damaged or left over, and what removes it."""
    intact = set(directory.complete())
    damaged = [*directory.damaged(), *(path for path in directory.present() if path not in intact)]
    return [*((path, erase) for path in directory.leftovers()), *((path, directory.remove) for path in damaged)]


@contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    claim = Claim.take(run_dir)
    try:
        yield
    finally:
        claim.release()


def _checkpoints(place: Path) -> list[Path]:
    """The checkpoint at ``place`` (of a run, imported or merged), or those of the run there, newest first."""
    alone = _in_run(place) is not None or (place / manifest.FILE_NAME).is_file()
    found = [place] if alone else CheckpointDirectory(place).present()
    if not found:
        raise _nothing(place)
    return found


def _in_run(place: Path) -> Path | None:
    """The checkpoint of a run that ``place`` names: a symbolic link is one itself, wherever it leads."""
    named = place.parent.resolve() / place.name if place.name else place.resolve()
    if len(named.parents) < 2:
        return None
    directory = CheckpointDirectory(named.parents[1])
    return named if named in [*directory.present(), *directory.damaged(), *directory.abandoned()] else None


def _nothing(place: Path) -> UserError:
    return UserError(
        str(place),
        where="command line",
        why="is no checkpoint, and no run directory with checkpoints in it",
        nearest="RUN_DIR or RUN_DIR/checkpoints/step_XXXXXXXX",
    )


def _row(path: Path) -> dict[str, Any]:
    try:
        found = manifest.verify(path)
    except ValueError as damage:
        nothing = dict.fromkeys(("step", "tokens", "validation_loss", "layout"))
        return {"name": path.name, "bytes": _bytes_in(path), "damage": str(damage), **nothing}
    return {
        "name": path.name,
        "bytes": sum(file.bytes for file in found.files.values()),
        "damage": None,
        "step": found.step,
        "tokens": found.state.get("tokens"),
        "validation_loss": found.state.get("validation_loss"),
        "layout": found.layout,
    }


def _bytes_in(path: Path) -> int:
    """Of whatever is there."""
    try:
        return sum(file.lstat().st_size for file in path.iterdir())
    except OSError:
        return 0


def _read(path: Path) -> tuple[manifest.Manifest, Metadata]:
    try:
        found = manifest.verify(path)
        manifest.verify_file(found, path, _INDEX)
        return found, _index(path)
    except (ValueError, OSError) as damage:
        raise UserError(str(path), why=f"is damaged: {damage}", nearest=f"nemotron3 checkpoint ls {path}") from None


def _index(path: Path) -> Metadata:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(path).read_metadata()


def _layout(sizes: dict[str, int] | None) -> str:
    if not sizes:  # damaged, imported or merged
        return ""
    named = [f"{name.upper()}{size}" for name, size in sizes.items() if name != "world_size" and size > 1]
    return " ".join([f"{sizes.get('world_size', '?')} ranks", *named])


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)
