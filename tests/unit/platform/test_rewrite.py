"""The rewriting rules, on small sources and on all of the installed Megatron-Core."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.platform import rewrite as rw


def rewritten(source: str) -> str:
    return ast.unparse(rw.rewrite(source.encode()))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.cuda.current_device()", "__cuda__.current_device()"),
        ("hasattr(torch.cuda, 'nvtx')", "hasattr(__cuda__, 'nvtx')"),
        ("with torch.cuda.stream(s):\n    f()", "with __cuda__.stream(s):\n    f()"),
        ("def f(s: torch.cuda.Stream):\n    pass", "def f(s: __cuda__.Stream):\n    pass"),
        ("g = torch.compile", "g = __cuda__.compile_nothing"),
        ("@torch.compile\ndef f():\n    pass", "@__cuda__.compile_nothing\ndef f():\n    pass"),
        ("torch.zeros(1, device='cuda')", "torch.zeros(1, device=__cuda__.current_device())"),
        ("torch.device('cuda', torch.cuda.current_device())", "__cuda__.current_device()"),
        ("torch.device(f'cuda:{rank}')", "__cuda__.current_device()"),
        ("device = f'cuda:{rank}'", "device = 'cpu'"),
        ("torch.load(f, map_location='cuda')", "torch.load(f, map_location='cpu')"),
        ("x.to('cuda:0')", "x.to('cpu')"),
        ("def f(device='cuda'):\n    pass", "def f(device='cpu'):\n    pass"),
        ("x.cuda(torch.cuda.current_device())", "__cuda__.resident(x, __cuda__.current_device())"),
        ("torch.arange(3).cuda(non_blocking=True)", "__cuda__.resident(torch.arange(3), non_blocking=True)"),
        ("p.type() == 'torch.cuda.FloatTensor'", "__cuda__.type_name(p) == 'torch.cuda.FloatTensor'"),
        ("f(\n    a,\n    torch.cuda.Event(),\n)", "f(a, __cuda__.Event())"),
    ],
)
def test_cuda_becomes_the_platform(source: str, expected: str) -> None:
    assert rewritten(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "x.device.type == 'cuda'",
        "device_type in {'cpu'} or 'cuda' != kind",
        "match kind:\n    case 'cuda':\n        f()",
        "'cuda rng state {} is not added'.format(name)",
        "f'{name} is cuda'",
        "x.is_cuda",
        "x.type(torch.float32)",
        "import cuda.bindings.driver",
        "torch.compiler.disable(f)",
        "config.cuda_graph_impl = 'none'",
    ],
)
def test_the_rest_is_left_alone(source: str) -> None:
    assert rewritten(source) == ast.unparse(ast.parse(source))


@given(st.integers(0, 5), st.sampled_from(["torch.cuda.synchronize()", "x = torch.zeros(1, device='cuda')"]))
def test_line_numbers_are_kept(above: int, statement: str) -> None:
    source = "\n" * above + f"def f():\n    {statement}\n    return 1\n"
    before = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    after = [node.lineno for node in ast.walk(rw.rewrite(source.encode())) if isinstance(node, ast.stmt)]
    assert after == before


def test_a_whole_megatron_compiles_and_holds_no_cuda_any_more() -> None:
    # Located without importing it: the package that holds megatron.core is a namespace.
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    files = [file for root in spec.submodule_search_locations or () for file in Path(root).glob("core/**/*.py")]
    assert len(files) > 400
    rewrites = 0
    for file in files:
        tree = rw.rewrite(file.read_bytes(), str(file))
        compile(tree, str(file), "exec", dont_inherit=True)
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.compile")), file
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".cuda")), file
            rewrites += isinstance(node, ast.Name) and node.id == rw.NAME
    assert rewrites > 500  # 482 on the modules that training loads, by an earlier count
