"""The import hook: light, once, inert with CUDA, refused when too late. Fresh interpreters where imports matter."""

from __future__ import annotations

import subprocess
import sys

import megatron
import pytest

from nemotron3_megatron.platform import bootstrap, rewrite


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    done = fresh("import sys, nemotron3_megatron; assert not {'torch', 'megatron'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_megatron_runs_on_cpu_and_torch_is_untouched() -> None:
    done = fresh("""
import torch
before = {name: id(value) for name, value in vars(torch.cuda).items()}, id(torch.compile), id(torch.Tensor.cuda)
import nemotron3_megatron
import megatron.core.parallel_state, megatron.core.optimizer
from megatron.core.utils import GlobalMemoryBuffer
assert GlobalMemoryBuffer().get_tensor([2], torch.float32, 'a').device.type == 'cpu'
after = {name: id(value) for name, value in vars(torch.cuda).items()}, id(torch.compile), id(torch.Tensor.cuda)
assert after[1:] == before[1:]
assert {name: after[0][name] for name in before[0]} == before[0]
assert not torch.cuda.is_available() and not torch.cuda.is_initialized()
""")
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr


def test_megatron_imported_first_is_an_error_that_says_what_to_do() -> None:
    # An empty module in its place: without the hook, importing the real one takes long and says the same.
    done = fresh("""
import sys, types
sys.modules['megatron.core'] = types.ModuleType('megatron.core')
import nemotron3_megatron
""")
    assert done.returncode != 0
    assert "ImportError: megatron.core was imported before nemotron3_megatron" in done.stderr
    assert "put `import nemotron3_megatron` before" in done.stderr


def test_megatron_imported_first_is_fine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    monkeypatch.setattr(bootstrap, "_cuda_is_available", lambda: True)
    bootstrap.install()
    assert [type(finder) for finder in sys.meta_path] == [bootstrap.MegatronFinder]


def test_install_twice_places_one_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    bootstrap.install()
    bootstrap.install()
    assert sum(isinstance(finder, bootstrap.MegatronFinder) for finder in sys.meta_path) == 1


def find(finder: bootstrap.MegatronFinder, name: str) -> object:
    spec = finder.find_spec(name, megatron.__path__)
    return None if spec is None else spec.loader


def test_with_cuda_it_never_interferes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_cuda_is_available", lambda: True)
    assert find(bootstrap.MegatronFinder(), "megatron.core") is None


def test_without_cuda_it_rewrites_megatron_only_and_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(bootstrap, "_cuda_is_available", lambda: asked.append(None) or False)
    finder = bootstrap.MegatronFinder()
    assert find(finder, "json") is None
    assert find(finder, "megatron") is None  # the namespace itself has no code
    assert not asked
    assert isinstance(find(finder, "megatron.core"), rewrite.RewritingLoader)
    assert isinstance(find(finder, "megatron.training"), rewrite.RewritingLoader)
    assert len(asked) == 1


def test_a_missing_module_is_left_to_python() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"megatron\.no_such_module"):
        __import__("megatron.no_such_module")
