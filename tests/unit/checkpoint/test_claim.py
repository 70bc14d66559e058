"""One job a run directory: on this machine by its processes, elsewhere by a sign of life, never by the clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemotron3_megatron.checkpoint import claim
from nemotron3_megatron.checkpoint.claim import Claim, Owner
from nemotron3_megatron.config.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from nemotron3_megatron.checkpoint.claim import Claim
held = Claim.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_job_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is running in it"):
        Claim.take(tmp_path)


def test_a_killed_job_s_claim_is_free_at_once(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    mine = Claim.take(tmp_path)
    mine.require()
    mine.release()
    assert os.listdir(tmp_path) == []


def test_a_reused_process_number_is_another_process(tmp_path: Path) -> None:
    _leave(tmp_path, replace(_somebody(), pid=os.getpid(), started=claim._started(os.getpid()) - 1))
    Claim.take(tmp_path).release()


def test_another_machine_s_job_that_is_silent_is_gone(tmp_path: Path) -> None:
    _leave(tmp_path, replace(_somebody(), machine="elsewhere", beat=7))
    Claim.take(tmp_path, patience_s=0.2).release()


def test_another_machine_s_job_that_counts_is_alive(tmp_path: Path) -> None:
    owner = replace(_somebody(), machine="elsewhere", host="node7", pid=12)
    _leave(tmp_path, owner)
    beat = threading.Timer(0.2, _leave, [tmp_path, replace(owner, beat=1)])
    beat.start()
    with pytest.raises(UserError, match="process 12 on node7"):
        Claim.take(tmp_path, patience_s=10)
    beat.join()


def test_a_jump_of_the_clock_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for now in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        _leave(tmp_path, replace(_somebody(), machine="elsewhere"))
        os.utime(tmp_path / claim.FILE_NAME, (4e9 - now, 4e9 - now))
        Claim.take(tmp_path, patience_s=0.2).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "\x00"])
def test_an_unreadable_claim_is_nobody_s(tmp_path: Path, text: str) -> None:
    (tmp_path / claim.FILE_NAME).write_text(text)
    Claim.take(tmp_path).release()


def test_one_of_many_wins(tmp_path: Path) -> None:
    outcomes: list[Claim | None] = []

    def attempt() -> None:
        try:
            outcomes.append(Claim.take(tmp_path))
        except UserError:
            outcomes.append(None)

    _leave(tmp_path, replace(_somebody(), started=-2))  # all of them find a dead owner's claim
    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [found for found in outcomes if found is not None]
    assert len(outcomes) == 8
    assert len(winners) == 1
    winners[0].require()
    winners[0].release()


def test_who_lost_the_claim_notices(tmp_path: Path) -> None:
    mine = Claim.take(tmp_path)
    _leave(tmp_path, replace(_somebody(), token="other"))
    with pytest.raises(UserError, match="another job has taken it over"):
        mine.require()
    mine.release()
    assert json.loads((tmp_path / claim.FILE_NAME).read_text())["token"] == "other"


def test_the_owner_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    mine = Claim.take(tmp_path)
    deadline = time.monotonic() + 30
    while json.loads((tmp_path / claim.FILE_NAME).read_text())["beat"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()


def _somebody() -> Owner:
    return Owner("abc", "here", claim._machine(), os.getpid(), claim._started(os.getpid()))


def _leave(run_dir: Path, owner: Owner) -> None:
    scratch = run_dir / "scratch"
    scratch.write_text(json.dumps(asdict(owner)))
    scratch.rename(run_dir / claim.FILE_NAME)
