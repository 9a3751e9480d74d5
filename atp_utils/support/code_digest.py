"""What a notebook or a module does, as a digest: the workflow reruns a job when it changes, and only then.

Prose is left out: markdown cells, outputs, comments, docstrings and layout. A model that ran for a day is not
asked again because a sentence was corrected. `closure` says which modules take part.
"""

import ast
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import nbformat

from atp_utils import resolve, shown

Result = TypeVar("Result")
PACKAGE = "atp_utils"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_digest(*paths: str | Path) -> str:
    """SHA-256 (hexadecimal) over the code of ``paths``, .ipynb or .py; raises FileNotFoundError for a missing one.

    It is taken from Python's syntax tree, whose form may differ between Python versions. Magics count by their text.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(repr(_each(path, _code)).encode())
    return digest.hexdigest()


@cache
def code_of(*paths: str | Path) -> str:
    """`code_digest` of the `closure` of ``paths`` and of themselves, as it was when this process first asked.

    An edit of a file doesn't change what a running process has loaded.
    """
    return code_digest(*sorted({*closure(*paths), *map(str, paths)}))


def closure(*paths: str | Path) -> list[str]:
    """Files of the package that ``paths`` (.ipynb or .py) reach, sorted, relative to the repository root.

    Reached is what any import names, also one inside a function, and what a whole string names: a module that is
    started (``"atp_utils.run"``) or a file (``"worker.py"``). A path within the package reaches itself.
    Names put together at run time aren't seen. Raises FileNotFoundError for a missing path, ValueError for one that
    isn't Python.
    """
    folder = resolve(PACKAGE)
    named: dict[str, list[Path]] = {}
    for path in folder.rglob("*.py"):
        for name in {path.name, _dotted(path, folder)} - {"__init__.py"}:
            named.setdefault(name, []).append(path)
    found: set[Path] = set()
    left = [folder / "__init__.py", *map(resolve, paths)]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        package = ""
        if path.is_relative_to(folder):
            package = _dotted(path.parent / "__init__.py", folder)
            # Importing a module runs its packages first.
            left += [outer / "__init__.py" for outer in path.parents if (outer / "__init__.py").is_file()]
        for names in _each(path, _names, package):
            left += [reached for name in names for reached in named.get(name, [])]
    return sorted(shown(path) for path in found if path.is_relative_to(folder))


def _dotted(path: Path, folder: Path) -> str:
    """Dotted name of the module ``path`` of the package ``folder``; a package's is that of its __init__.py."""
    return ".".join([PACKAGE, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


def _each(path: str | Path, read: Callable[..., Result], *given: str) -> list[Result]:
    """What ``read`` makes of each code cell of a notebook, or of a module's text."""
    path = resolve(path)
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    sources = [path.read_text(encoding="utf-8")]
    if path.suffix == ".ipynb":
        cells = nbformat.reads(sources[0], as_version=4).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
    try:
        return [read(source, *given) for source in sources]
    except SyntaxError as error:
        raise ValueError(f"{shown(path)}: not Python: {error}") from None


@cache
def _names(source: str, package: str) -> frozenset[str]:
    """Modules and files that ``source``, a module or cell within ``package``, may name."""
    return frozenset(name for node in ast.walk(_tree(source)) for name in _named(node, package))


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def _code(source: str) -> str:
    tree = _tree(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _tree(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        # A cell with a magic is no Python; IPython, slow to import, makes it a call with the magic's text.
        from IPython.core.inputtransformer2 import TransformerManager

        return ast.parse(TransformerManager().transform_cell(source))
