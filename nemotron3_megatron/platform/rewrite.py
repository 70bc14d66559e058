"""Rewrite Megatron-Core's CUDA calls while it is imported on a machine without CUDA.

The rules work on the syntax tree; torch itself and the files of Megatron-Core stay untouched.

=============================================  ==================================
in the source                                  becomes (``__cuda__`` is :mod:`.cuda_on_cpu`)
=============================================  ==================================
``torch.cuda``                                 ``__cuda__``
``torch.compile``                              ``__cuda__.compile_nothing``
``torch.device("cuda", ...)``, device="cuda"   ``__cuda__.current_device()``
``x.cuda(...)``                                ``__cuda__.resident(x, ...)``
``x.type()``                                   ``__cuda__.type_name(x)``
another string "cuda", not in a comparison     ``"cpu"``
=============================================  ==================================

What no rule can express is amended after the module ran (:mod:`.amendments`).
"""

from __future__ import annotations

import ast
import bisect
import importlib.machinery
import logging
import re
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

NAME = "__cuda__"
"""Global name, in every rewritten module, of :mod:`.cuda_on_cpu`."""

_WORTH_PARSING = re.compile(rb"cuda|torch\.compile|\.type\(\)")
_CUDA_DEVICE = re.compile(r"cuda(:\d+)?")


def find_rewritten(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
    """Spec of ``fullname`` as the ordinary path finder gives it, with a loader that rewrites Python sources."""
    spec = PathFinder.find_spec(fullname, path, target)
    if spec is not None and type(spec.loader) is SourceFileLoader:
        spec.loader = RewritingLoader(spec.loader.name, spec.loader.path)
    return spec


class RewritingLoader(importlib.machinery.SourceFileLoader):
    """Loads one module of Megatron with its CUDA calls rewritten."""

    def get_code(self, fullname: str) -> CodeType | None:
        """Compiled code of the rewritten source; never from or to the bytecode cache, which holds the original."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # Megatron's, told anew at each uncached compilation
            if not _WORTH_PARSING.search(source):
                return super().get_code(fullname)
            return compile(rewrite(source, path), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then apply what :mod:`.amendments` lists for it."""
        from nemotron3_megatron.platform import amendments, cuda_on_cpu

        vars(module)[NAME] = cuda_on_cpu
        super().exec_module(module)
        amendments.apply(module)


def rewrite(source: bytes, path: str = "<source>") -> ast.Module:
    """Syntax tree of ``source`` with the rules of this module applied; line numbers are kept."""
    tree = ast.parse(source, path)
    lines = [number for number, line in enumerate(source.splitlines(), 1) if _WORTH_PARSING.search(line)]
    _Rewriter(lines).visit(tree)
    return ast.fix_missing_locations(tree)


def silence_hints_about_cuda() -> None:
    """Hide what Megatron and torch say, in every process, about CUDA packages; `nemotron3 doctor` lists them."""
    warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, lines: list[int]) -> None:
        self._lines = lines
        """Sorted numbers of the lines that a rule may apply to; whatever has none of them is skipped."""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.stmt | ast.expr) and not self._concerns(node):
            return node
        result: ast.AST = super().visit(node)
        return result

    def _concerns(self, node: ast.stmt | ast.expr) -> bool:
        first = node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
        at = bisect.bisect_left(self._lines, first)
        return at < len(self._lines) and self._lines[at] <= (node.end_lineno or first)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if _is_torch(node, "cuda"):
            return _at(node, ast.Name(NAME, ast.Load()))
        if _is_torch(node, "compile"):
            return _at(node, _ours("compile_nothing"))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = node.func
        if not isinstance(called, ast.Attribute):
            return self.generic_visit(node)
        if _is_torch(called, "device") and node.args and _is_cuda_device(node.args[0]):
            return _at(node, _ours_called("current_device"))
        self.generic_visit(node)
        if called.attr == "cuda":
            return _at(node, _ours_called("resident", called.value, *node.args, keywords=node.keywords))
        if called.attr == "type" and not node.args and not node.keywords:
            return _at(node, _ours_called("type_name", called.value))
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg == "device" and _is_cuda_device(node.value):
            node.value = _at(node.value, _ours_called("current_device"))
            return node
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return _at(node, ast.Constant("cpu")) if _is_cuda_device(node) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        if _is_cuda_device(node):
            return _at(node, ast.Constant("cpu"))
        node.values = [part if isinstance(part, ast.Constant) else self._visit_expr(part) for part in node.values]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        # `device.type == "cuda"` is rightly False here: a string that is compared stays what it is.
        sides = (node.left, *node.comparators)
        node.left, *node.comparators = (s if isinstance(s, ast.Constant) else self._visit_expr(s) for s in sides)
        return node

    def visit_MatchValue(self, node: ast.MatchValue) -> ast.AST:
        return node

    def _visit_expr(self, node: ast.expr) -> ast.expr:
        result = self.visit(node)
        assert isinstance(result, ast.expr)
        return result


def _is_torch(node: ast.Attribute, name: str) -> bool:
    return node.attr == name and isinstance(node.value, ast.Name) and node.value.id == "torch"


def _is_cuda_device(node: ast.expr) -> bool:
    """A string that names a CUDA device: "cuda", "cuda:0" or f"cuda:{...}"."""
    if isinstance(node, ast.JoinedStr):
        first = node.values[0] if node.values else None
        return isinstance(first, ast.Constant) and first.value == "cuda:"
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_CUDA_DEVICE.fullmatch(node.value))


def _ours(name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name(NAME, ast.Load()), name, ast.Load())


def _ours_called(name: str, *args: ast.expr, keywords: Sequence[ast.keyword] = ()) -> ast.Call:
    return ast.Call(_ours(name), list(args), list(keywords))


def _at[Node: ast.expr](original: ast.AST, replacement: Node) -> Node:
    return ast.copy_location(replacement, original)
