"""What goes wrong with disks, files and recipes: one clear error, and the last good checkpoint still there."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launch import RanksFailed, run_ranks
from ports import free_port

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.store import CheckpointStore, load_state


def faults(folder: str, small_disk: str | None) -> dict[str, Any]:
    """All the faults that a rank can meet without dying, one after the other."""
    from job import digest, job, load_newest, save, train

    root = Path(folder)
    report: dict[str, Any] = {}
    with job(ep=2) as trainer:
        good = save(trainer, root / "run", 1)
        train(trainer, 0, 1)

        with _files_of_at_most(100_000, on_rank=1):
            report["full"] = _error(lambda: save(trainer, root / "run", 2))
        report["after full"] = _listing(good.parent)
        if small_disk is not None:
            report["small disk"] = _error(lambda: save(trainer, Path(small_disk), 2))
            report["after small disk"] = _listing(Path(small_disk) / "checkpoints")
        _on_first(lambda: _make_file(root / "file" / "checkpoints"))
        report["not writable"] = _error(lambda: save(trainer, root / "file", 2))
        report["not JSON"] = _error(lambda: save(trainer, root / "run", 2, bad={1, 2}))

        last = save(trainer, root / "run", 2)
        before = digest(trainer)
        _on_first(lambda: _truncate(next(iter(last.glob("__1_*.distcp")))))
        report["load truncated"] = _error(lambda: _load(trainer, last))
        report["newest"] = str(load_newest(trainer, root / "run")["step"])
        save(trainer, root / "run", 2)  # replaces the truncated one
        report["replaced"] = str(load_newest(trainer, root / "run")["step"])
        replaced = digest(trainer)

        save(trainer, root / "flip", 3)
        _on_first(lambda: _flip_bit(next((root / "flip").rglob("__0_*.distcp"))))
        report["flipped"] = _error(lambda: _load(trainer, root / "flip" / "checkpoints" / "step_00000003"))
        report["only damaged"] = _error(lambda: load_newest(trainer, root / "flip"))
        save(trainer, root / "flip", 2)
        report["fallen back"] = str(load_newest(trainer, root / "flip")["step"])

        for step in range(4, 8):
            save(trainer, root / "many", step, keep_last=2)
        report["kept"] = _listing(root / "many" / "checkpoints")

        report |= _weights_only(trainer, root)
    with job(ep=2, hidden=64) as trainer:
        report["other model"] = _error(lambda: load_newest(trainer, root / "run"))
    with job(ep=2, stack="ME|*") as trainer:
        untouched = digest(trainer)
        report["shorter model"] = _error(lambda: load_newest(trainer, root / "run"))
        report["untouched"] = digest(trainer) == untouched
    report["restored earlier state"] = replaced != before
    return report


def test_faults(tmp_path: Path, small_disk: Path | None) -> None:
    reports = run_ranks(faults, 2, folder=str(tmp_path), small_disk=str(small_disk) if small_disk else None)
    for report in reports:
        assert "step 2 could not be saved" in report["full"]
        assert "File too large on rank 1" in report["full"]
        assert "Not a directory" in report["not writable"] or "File exists" in report["not writable"]
        assert report["after full"] == ["step_00000001"]
        if small_disk is not None:
            assert "No space left on device" in report["small disk"]
            assert report["after small disk"] == []
        assert report["not JSON"].startswith("TypeError")
        assert "is not complete: __1_0.distcp has 1,000 of" in report["load truncated"]
        assert (report["newest"], report["replaced"]) == ("1", "2")
        assert "__0_0.distcp is damaged (its checksum differs)" in report["flipped"]
        assert "none of its checkpoints is intact" in report["only damaged"]
        assert report["fallen back"] == "2"
        assert report["kept"] == ["step_00000006", "step_00000007"]
        assert report["weights"] == "same"
        assert "it holds weights only" in report["weights with optimizer"]
        assert "it is of another model" in report["other model"]
        assert "  decoder.final_norm.weight " in report["other model"]
        assert "  32          64" in report["other model"]
        assert "decoder.layers.3." in report["shorter model"]
        assert "absent" in report["shorter model"]
        assert report["untouched"]
    assert "step_00000001 is intact" in reports[0]["full"]


def killed_at_every_touch(folder: str) -> list[list[Any]]:
    """SIGKILL before the 1st, 2nd, 3rd ... thing a save does to the disk, until one gets through.

    Each try is a forked process that resumes from the newest checkpoint, trains a step and saves. Returns, per
    try, the newest step before and after it, and whether it got through.
    """
    from job import job, load_newest, save, train

    root = Path(folder)
    tries: list[list[Any]] = []
    logging.disable(logging.WARNING)
    done = False
    while not done and len(tries) < 60:
        newest = CheckpointStore(root).newest()
        step = 0 if newest is None else load_state(newest)["step"]
        os.environ["MASTER_PORT"] = str(free_port())
        child = os.fork()
        if child == 0:
            with job(stack="M", mtp_depths=0) as trainer:
                if step:
                    assert load_newest(trainer, root)["step"] == step
                train(trainer, step, step + 1)
                if step:
                    _die_before_touch(len(tries), root)
                save(trainer, root, step + 1, keep_last=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        done = os.waitstatus_to_exitcode(status) == 0 and step > 0
        if not done and step:
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        after = CheckpointStore(root).newest()
        assert after is not None
        tries.append([step, load_state(after)["step"], done])
    return tries


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    (tries,) = run_ranks(killed_at_every_touch, 1, folder=str(tmp_path))
    assert tries[0] == [0, 1, False]
    assert tries[-1][2], "no save got through"
    assert len(tries) > 10
    for before, after, _ in tries[1:]:
        assert after in (before, before + 1)
    left = os.listdir(tmp_path / "checkpoints")
    assert left == [f"step_{tries[-1][1]:08d}"]


def one_rank_dies(folder: str) -> None:
    """Rank 1 is killed when it opens its shards for writing."""
    from job import job, save, train

    with job(ep=2) as trainer:
        save(trainer, Path(folder), 1)
        train(trainer, 0, 1)
        if int(os.environ["RANK"]) == 1:
            _die_before_touch(1, Path(folder), ending=".distcp")
        save(trainer, Path(folder), 2)


def test_one_rank_killed_while_writing(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(one_rank_dies, 2, folder=str(tmp_path))
    assert failure.value.exit_codes[1] == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").glob(".step_00000002.*.partial"))) == 1
    newest = CheckpointStore(tmp_path).newest()
    assert newest == tmp_path / "checkpoints" / "step_00000001"
    manifest.verify_contents(manifest.verify(newest), newest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 300 kB where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", place], capture_output=True)
    yield place if mount.returncode == 0 else None
    if mount.returncode == 0:
        subprocess.run(["umount", place], check=True)


def _weights_only(trainer: Any, root: Path) -> dict[str, str]:
    import torch

    store = CheckpointStore(root / "weights")
    parameters = [parameter.data for chunk in trainer.model for parameter in chunk.parameters()]
    before = [parameter.clone() for parameter in parameters]
    path = store.save(1, trainer.model, None, {"step": 1}, keep_last=None)
    for parameter in parameters:
        parameter.zero_()
    store.load(path, trainer.model, None)
    same = all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    return {
        "weights": "same" if same else "others",
        "weights with optimizer": _error(lambda: store.load(path, trainer.model, trainer.optimizer)),
    }


def _load(trainer: Any, path: Path) -> dict[str, Any]:
    return CheckpointStore(path.parents[1]).load(path, trainer.model, trainer.optimizer)


def _error(action: Callable[[], Any]) -> str:
    """The message of the UserError that ``action`` raises; other exceptions with their type."""
    from nemotron3_megatron.config.errors import UserError

    try:
        action()
    except UserError as error:
        return str(error)
    except TypeError as error:
        return f"TypeError: {error}"
    return "no error"


@contextmanager
def _files_of_at_most(size: int, *, on_rank: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _make_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a directory")


def _listing(directory: Path) -> list[str]:
    """Names in a directory, once all ranks are done with it."""
    import torch

    torch.distributed.barrier()
    names = sorted(os.listdir(directory))
    torch.distributed.barrier()
    return names


def _on_first(action: Callable[[], Any]) -> None:
    import torch

    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def _truncate(path: Path) -> None:
    os.truncate(path, 1000)


def _flip_bit(path: Path) -> None:
    """Damage in the middle of a file: the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _die_before_touch(count: int, root: Path, *, ending: str = "") -> None:
    """Kill this process when it is about to change something below ``root`` for the ``count``-th time.

    Only things whose name has the given ending count.
    """
    seen = 0
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in changes and not (event == "open" and arguments[1] and set(str(arguments[1])) & set("wax+")):
            return
        target = str(arguments[0])
        # rmtree works with names relative to a directory descriptor
        inside = target.startswith(str(root)) or (event in changes and not os.path.isabs(target))
        if not inside or not target.endswith(ending):
            return
        seen += 1
        if seen >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
