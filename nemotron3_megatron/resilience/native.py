"""Stacks of another process' native threads: by a tool that traces it where one may, and what the kernel knows.

No step of it waits without a limit: a thread in uninterruptible sleep cannot be traced, only looked at in /proc.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that prints the stacks of a process."""

    name: str
    arguments: tuple[str, ...]
    """``PID`` stands for the process."""
    sign: str
    """Of a success in its output; not all tell by their status."""


TOOLS = (
    Tool("py-spy", ("dump", "--native", "--pid", "PID"), "Thread "),
    Tool("gdb", ("-nx", "-batch", "-iex", "set auto-load no", "-ex", "thread apply all backtrace", "-p", "PID"), "#0"),
    Tool("eu-stack", ("-p", "PID"), "#0"),
    Tool("pstack", ("PID",), "#0"),
)
"""In the order of preference: py-spy shows Python's and native frames in one stack, and takes a tenth of gdb's time."""


def native_stacks(pid: int, seconds: float, tools: Sequence[Tool] = TOOLS) -> str:
    """The native stacks of a process, or why there are none; a process that traces itself must ask a child for it.

    Args:
        pid: of the process; it stands still meanwhile.
        seconds: limit of all tools together; one takes at most half of it.
        tools: in the order in which they are tried.
    """
    deadline = time.monotonic() + seconds
    reasons = []
    for tool in tools:
        program = _find(tool.name)
        if program is None:
            continue
        left = min(deadline - time.monotonic(), seconds / 2)
        if left <= 0:
            break
        text, reason = _run(program, tool, pid, left)
        if text:
            return f"native stacks ({tool.name}):\n{text}"
        reasons.append(f"{tool.name}: {reason}")
    if not reasons:
        reasons = [f"none of {', '.join(tool.name for tool in tools)} is installed (pip install py-spy)"]
    return "no native stacks: " + "; ".join([*reasons, *_hindrance()]) + "\n"


def usable_tool() -> str:
    """The tool that a hang would be dumped with on this machine, or why there is none; tries it on a child."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        text = native_stacks(child.pid, 20.0)
        child.kill()
    first = text.partition("\n")[0]
    return first.removeprefix("native stacks (").removesuffix("):")


def kernel_view(pid: int) -> str:
    """Name, state, kernel function and system call of every thread of a process (Linux); needs no tracing."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda task: int(task.name)):
        try:
            state = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
            name, at = (task / "comm").read_text().strip(), (task / "wchan").read_text().strip()
        except OSError:  # it has ended meanwhile
            continue
        call = "unknown"
        with suppress(OSError):  # only those who may trace it see the call
            call = (task / "syscall").read_text().split()[0]
        lines.append(f"thread {task.name} {name}: state {state}, in {at or 'unknown'}, system call {call}\n")
    return "".join(lines)


def _find(name: str) -> str | None:
    """On PATH, or beside the interpreter: an environment need not be activated."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def _run(program: str, tool: Tool, pid: int, seconds: float) -> tuple[str, str]:
    """Output and nothing, or nothing and the reason."""
    arguments = [str(pid) if text == "PID" else text for text in tool.arguments]
    # gdb would ask servers for symbols.
    environment = {**os.environ, "DEBUGINFOD_URLS": ""}
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=environment,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)  # what a tracer that was killed may have left standing
        return "", f"no answer within {seconds:.0f} s"
    except OSError as error:
        return "", str(error)
    text = done.stdout.decode(errors="replace")
    if tool.sign in text:
        return text, ""
    words = [line.strip() for line in (done.stdout + done.stderr).decode(errors="replace").splitlines()]
    return "", next((line for line in reversed(words) if line), f"exit code {done.returncode}")[:_LONGEST_REASON]


def _hindrance() -> list[str]:
    """A setting of this machine that forbids tracing."""
    with suppress(OSError, ValueError):
        if (scope := int(_YAMA.read_text())) >= 2:
            return [f"{_YAMA} is {scope}: only root may trace" if scope == 2 else f"{_YAMA} is {scope}: nobody may"]
    return []
