"""What a notebook or a module does, as a digest: the workflow reruns a job when it changes, and only then.

Prose is left out: markdown cells, outputs, comments, docstrings and layout. A model that ran for a day is not
asked again because a sentence was corrected. `closure` says which modules take part.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from atp_utils import resolve, shown

PACKAGE = "atp_utils"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def code_of(*paths: str | Path) -> str:
    """SHA-256 (hexadecimal) over the code of ``paths``, .ipynb or .py, and of their `closure`.

    It is that of the time when this process first asked: an edit of a file doesn't change what a running process has
    loaded. Taken from Python's syntax tree, whose form may differ between Python versions; magics count by their text.
    """
    reached = sorted({*closure(*paths), *map(str, paths)})
    return hashlib.sha256(repr([code for path in reached for code, _ in _read(path)]).encode()).hexdigest()


def closure(*paths: str | Path) -> list[str]:
    """Files of the package that ``paths`` (.ipynb or .py) reach, sorted, relative to the repository root.

    Reached is what any import names, also one inside a function, and what a whole string names: a module that is
    started (``"atp_utils.run"``) or a file (``"worker.py"``). A path within the package reaches itself.
    Relative imports and names put together at run time aren't seen. Raises FileNotFoundError for a missing path,
    ValueError for one that isn't Python.
    """
    folder = resolve(PACKAGE)
    named: dict[str, set[Path]] = {}
    for path in folder.rglob("*.py"):
        dotted = ".".join([PACKAGE, *path.relative_to(folder).with_suffix("").parts])
        for name in {path.name, dotted.removesuffix(".__init__")} - {"__init__.py"}:
            named.setdefault(name, set()).add(path)
    found: set[Path] = set()
    left = {folder / "__init__.py", *map(resolve, paths)}
    while left:
        path = left.pop()
        found.add(path)
        reached = {other for _, names in _read(path) for name in names for other in named.get(name, ())}
        # Importing a module runs its packages first.
        packages = {outer / "__init__.py" for outer in path.parents if outer.is_relative_to(folder)}
        left |= (reached | packages) - found
    return sorted(shown(path) for path in found if path.is_relative_to(folder))


def _read(path: str | Path) -> list[tuple[str, frozenset[str]]]:
    """`_parsed` of each code cell of a notebook, or of a module's text."""
    path = resolve(path)
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    sources = [path.read_text(encoding="utf-8")]
    if path.suffix == ".ipynb":
        # Read as JSON: nbformat takes seconds to import, in every process.
        sources = ["".join(cell["source"]) for cell in json.loads(sources[0])["cells"] if cell["cell_type"] == "code"]
    try:
        return [_parsed(source) for source in sources]
    except SyntaxError as error:
        raise ValueError(f"{shown(path)}: not Python: {error}") from None


@cache
def _parsed(source: str) -> tuple[str, frozenset[str]]:
    """What ``source`` does, without prose, and all that may name a module or a file in it."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        # A cell with a magic is no Python; IPython, slow to import, makes it a call with the magic's text.
        from IPython.core.inputtransformer2 import TransformerManager

        tree = ast.parse(TransformerManager().transform_cell(source))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return ast.dump(tree), frozenset(filter(None, names))
