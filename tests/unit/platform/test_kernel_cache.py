"""Kernels are kept where the user says, and compiling them is announced."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron3_megatron.platform.kernel_cache import CACHE_VARIABLE, CompilationLog, use_kernel_cache

VARIABLES = ("TRITON_CACHE_DIR", "TRITON_CACHE_AUTOTUNING", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, CACHE_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what the test sets goes again afterwards
        monkeypatch.delenv(name)


def test_triton_and_torch_read_the_directory(tmp_path: Path) -> None:
    """The libraries' own answers, in a process that sets them as train.py does."""
    code = (
        "from nemotron3_megatron.platform.kernel_cache import use_kernel_cache; use_kernel_cache()\n"
        "from triton import knobs; from torch._inductor.runtime.cache_dir_utils import cache_dir\n"
        "print(knobs.cache.dir, knobs.autotuning.cache, cache_dir())"
    )
    environment = {CACHE_VARIABLE: str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{tmp_path}/triton", "True", f"{tmp_path}/inductor"]


def test_the_libraries_own_variables_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import os

    assert use_kernel_cache() == tmp_path / "nemotron3_megatron"
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "nemotron3_megatron" / "inductor")


@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_a_home_that_cannot_be_written_stops_nobody(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = use_kernel_cache()
    assert folder.parent == tmp_path
    assert os.access(folder, os.W_OK)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")


def test_each_compiled_kernel_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    listener = CompilationLog()
    logger = logging.getLogger("nemotron3_megatron.platform.kernel_cache")
    logger.addHandler(caplog.handler)  # start_logging in another test may have cut ours off from the root
    logger.propagate, passed_on = False, logger.propagate
    with caplog.at_level(logging.INFO, logger=logger.name):
        listener(src=SimpleNamespace(name="cached"), cache_hit=True, times=None)
        for name in ("scan", "scan", "norm"):
            listener(src=SimpleNamespace(name=name), cache_hit=False, times=None)
    logger.removeHandler(caplog.handler)
    logger.propagate = passed_on
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "compiling GPU kernels" in lines[0]
    assert "scan" in lines[1]
    assert "norm" in lines[2]
