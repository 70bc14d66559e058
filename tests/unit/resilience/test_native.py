"""Native stacks of real processes, by the real tools; and what is said where there are none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron3_megatron.resilience.native import TOOLS, Tool, kernel_view, native_stacks, usable_tool

SLEEPS = "import ctypes; print('here', flush=True); ctypes.PyDLL(None).sleep(60)"
# posix_spawn suspends its caller, uninterruptibly, until the child has opened what it was told to: a pipe of nobody.
UNINTERRUPTIBLE = """
import os, sys
os.mkfifo(sys.argv[1])
print('here', flush=True)
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])
"""


@contextmanager
def process(program: str, *arguments: str) -> Iterator[int]:
    """The number of a Python process that runs it and stands still; all of its session is ended at the end."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as started:
        try:
            assert started.stdout is not None
            started.stdout.readline()
            time.sleep(0.3)
            yield started.pid
        finally:
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_native_frames_are_named(tool: Tool) -> None:
    if shutil.which(tool.name) is None and not (Path(sys.executable).parent / tool.name).exists():
        pytest.skip(f"{tool.name} is not installed")
    with process(SLEEPS) as pid:
        text = native_stacks(pid, 60.0, [tool])
        if "no native stacks" in text and "ermi" in text:
            pytest.skip(f"this machine permits no tracing: {text}")
    assert text.startswith(f"native stacks ({tool.name})")
    assert "nanosleep" in text, "the C function in which it waits"
    assert "_ctypes" in text, "and the one which called it"


def script(folder: Path, name: str, body: str) -> Tool:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Tool(name, ("PID",), "#0")


def test_tools_are_tried_in_turn_within_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    missing = Tool("no-such-tool", (), "#0")
    refused = script(tmp_path, "refused", "echo 'ptrace: Operation not permitted.' >&2; exit 0")
    stuck = script(tmp_path, "stuck", "sleep 60")
    good = script(tmp_path, "good", 'echo "#0 main of $1"')
    assert native_stacks(7, 4.0, [missing, refused, good]) == "native stacks (good):\n#0 main of 7\n"
    began = time.monotonic()
    with process(SLEEPS) as pid:
        text = native_stacks(pid, 2.0, [refused, stuck])
    assert time.monotonic() - began < 30, "not the minute that it sleeps"
    assert text.startswith("no native stacks: refused: ptrace: Operation not permitted.; stuck: no answer within 1 s")
    assert "none of no-such-tool is installed (pip install py-spy)" in native_stacks(7, 1.0, [missing])


def test_uninterruptible_sleep_is_seen_and_delays_nobody(tmp_path: Path) -> None:
    """Nothing can stop such a thread; every installed tool is tried and given up."""
    began = time.monotonic()
    with process(UNINTERRUPTIBLE, str(tmp_path / "fifo")) as pid:
        state = kernel_view(pid)
        text = native_stacks(pid, 2.0)
    assert time.monotonic() - began < 60
    assert f"thread {pid} python" in state
    assert ": state D, in " in state
    assert text.startswith(("no native stacks: ", "native stacks ("))


def test_a_process_that_has_gone_has_no_threads() -> None:
    with process(SLEEPS) as pid:
        assert "state S" in kernel_view(pid)
    assert kernel_view(pid) == ""


def test_what_a_hang_would_be_dumped_with_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    found = usable_tool()
    assert found in [tool.name for tool in TOOLS] or found.startswith("no native stacks: ")
    monkeypatch.setenv("PATH", "/nowhere")
    beside = {path.name for path in Path(sys.executable).parent.iterdir()}
    if not beside & {tool.name for tool in TOOLS}:
        assert usable_tool().startswith("no native stacks: none of py-spy, gdb, eu-stack, pstack is installed")
