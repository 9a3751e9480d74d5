"""What a notebook or a module does, as a digest: the workflow reruns a job when it changes, and only then.

Prose is left out: markdown cells, outputs, comments, docstrings and layout. A model that ran for a day is not
asked again because a sentence was corrected.
"""

import ast
import hashlib
from pathlib import Path

import nbformat

from atp_utils import resolve, shown

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_digest(*paths: str | Path) -> str:
    """SHA-256 (hexadecimal) over the code of ``paths``, .ipynb or .py; raises FileNotFoundError for a missing one.

    It is taken from Python's syntax tree, whose form may differ between Python versions.
    """
    digest = hashlib.sha256()
    for path in map(resolve, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{shown(path)}: no such file")
        digest.update(repr([_code(source) for source in _sources(path)]).encode())
    return digest.hexdigest()


def _sources(path: Path) -> list[str]:
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


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
