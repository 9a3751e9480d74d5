"""What a notebook or a module does, as a digest: the workflow reruns a job when it changes, and only then.

Prose is left out: markdown cells, outputs, comments, docstrings and layout. A model that ran for a day is not
asked again because a sentence was corrected. `closure` says which modules take part.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat

from atp_utils import resolve, shown

PACKAGE = "atp_utils"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_digest(*paths: str | Path) -> str:
    """SHA-256 (hexadecimal) over the code of ``paths``, .ipynb or .py; raises FileNotFoundError for a missing one.

    It is taken from Python's syntax tree, whose form may differ between Python versions.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(repr([_code(source) for source in _sources(path)]).encode())
    return digest.hexdigest()


def closure(*paths: str | Path) -> list[str]:
    """Files of the package that ``paths`` (.ipynb or .py) reach, sorted, relative to the repository root.

    Reached is what any import names, also one inside a function, and what a whole string names: a module that is
    started (``"atp_utils.train"``) or a file (``"_sandbox_worker.py"``). A path within the package reaches itself.
    Names put together at run time aren't seen. Raises FileNotFoundError for a missing path.
    """
    folder = resolve(PACKAGE)
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    named = {path.name: path for path in files if path.name != "__init__.py"}
    named |= {_dotted(path, folder): path for path in files if path.suffix == ".py"}
    found: set[Path] = set()
    left = [folder / "__init__.py", *map(resolve, paths)]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        package = _dotted(path.parent / "__init__.py", folder) if path.is_relative_to(folder) else ""
        for source in _sources(path):
            left += [named[name] for name in _names(source, package) if name in named]
    return sorted(shown(path) for path in found if path.is_relative_to(folder))


def _dotted(path: Path, folder: Path) -> str:
    """Dotted name of the module ``path`` of the package ``folder``; a package's is that of its __init__.py."""
    return ".".join([PACKAGE, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


def _sources(path: str | Path) -> list[str]:
    path = resolve(path)
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [text]
    return [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]


# Both are asked for the same sources by many notebooks.
@cache
def _names(source: str, package: str) -> frozenset[str]:
    """Modules and files that ``source``, a module or cell within ``package``, may name."""
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:
        # A cell with an IPython magic: its other lines count.
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        nodes = ast.walk(ast.parse("\n".join(lines)))
    return frozenset(name for node in nodes for name in _named(node, package))


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield from _prefixes(alias.name)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield from _prefixes(module)
        yield from (f"{module}.{alias.name}" for alias in node.names)


def _prefixes(module: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``: importing a module runs its packages' __init__ files."""
    parts = module.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


@cache
def _code(source: str) -> str:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        # A cell with an IPython magic is no Python; its text has to do.
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
