"""The files of a repository in an order in which what is imported comes before what imports it."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

_PYTHON_FROM = re.compile(r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+\(?([\w, \t]*)", re.MULTILINE)
_PYTHON_IMPORT = re.compile(r"^[ \t]*import[ \t]+([\w., \t]+)", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"\n]+)[>\"]", re.MULTILINE)
_SCRIPT = re.compile(r"(?:from|import|require\()[ \t]*['\"](\.[^'\"\n]+)['\"]")
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)", re.MULTILINE)
_RUST = re.compile(r"^[ \t]*(?:pub[ \t]+)?mod[ \t]+(\w+)[ \t]*;", re.MULTILINE)

_C = (".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".S")
_SCRIPTS = (".js", ".jsx", ".ts", ".tsx", ".mjs")


def dependency_order(files: Mapping[str, str]) -> list[str]:
    """Paths of ``files`` (path to text) in order of their paths, each after those it imports; cycles go by path.

    Python, C and C++, JavaScript and TypeScript, Java and Kotlin, Rust; other files have no imports.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files):
        by_name[posixpath.basename(path)].append(path)
    imports = {path: sorted(set(_resolved(path, text, by_name)) - {path}) for path, text in files.items()}
    order: list[str] = []
    seen: set[str] = set()
    for root in sorted(files):
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(imports[root]))]
        while stack:
            path, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                order.append(path)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(imports[following])))
    return order


def _resolved(path: str, text: str, by_name: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The files of the repository that a file imports."""
    for wanted in _wanted(path, text):
        present = [other for other in by_name.get(posixpath.basename(wanted), ()) if f"/{other}".endswith(f"/{wanted}")]
        if present:  # the one that shares most of its path with the importing file
            yield max(present, key=lambda other: (len(posixpath.commonprefix([path, other])), -len(other)))


def _wanted(path: str, text: str) -> Iterator[str]:
    """Ends of paths that the imports of a file may mean."""
    folder, suffix = posixpath.dirname(path), posixpath.splitext(path)[1]
    if suffix in (".py", ".pyi", ".pyx"):
        for module in _python_modules(folder, text):
            yield f"{module}.py"
            yield f"{module}/__init__.py"
    elif suffix in _C:
        for name in _INCLUDE.findall(text):
            local = posixpath.normpath(posixpath.join(folder, name))
            yield name if local.startswith("..") else local
            yield posixpath.normpath(name).lstrip("./")
    elif suffix in _SCRIPTS:
        for name in _SCRIPT.findall(text):
            target = posixpath.normpath(posixpath.join(folder, name))
            yield target
            yield from (f"{target}{ending}" for ending in _SCRIPTS)
            yield from (f"{target}/index{ending}" for ending in _SCRIPTS)
    elif suffix in (".java", ".kt"):
        yield from (name.replace(".", "/") + suffix for name in _JAVA.findall(text))
    elif suffix == ".rs":
        for name in _RUST.findall(text):
            yield posixpath.join(folder, f"{name}.rs")
            yield posixpath.join(folder, name, "mod.rs")


def _python_modules(folder: str, text: str) -> Iterator[str]:
    """Modules that a Python file may import, as paths without suffix."""
    for dots, module, names in _PYTHON_FROM.findall(text):
        base = folder
        for _ in dots[1:]:
            base = posixpath.dirname(base)
        parts = [base] if dots else []
        stem = posixpath.join(*parts, module.replace(".", "/")).rstrip("/")
        if stem:
            yield stem
        yield from (posixpath.join(stem, name.split()[0]) for name in names.split(",") if name.strip())
    for names in _PYTHON_IMPORT.findall(text):
        yield from (name.split()[0].replace(".", "/") for name in names.split(",") if name.strip())
