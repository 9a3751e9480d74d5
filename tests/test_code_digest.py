"""What counts as code, and which modules a notebook reaches: held against what the interpreter loads."""

import json
import subprocess
import sys

import nbformat
import pytest

import atp_utils
from atp_utils import ROOT
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support.code_digest import closure, code_of

BOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# What a run imports or starts late, by the end of its path: an engine when it is opened, the sandbox's other process.
LATE = ("/transformers_engine.py", "/openai_engine.py", "/sandbox/worker.py", "/sandbox/probe.py")
LOADED = """
import ast, json, sys
for path in json.load(sys.stdin):
    cells = [cell for cell in json.load(open(path))["cells"] if cell["cell_type"] == "code"]
    body = ast.parse("\\n".join("".join(cell["source"]) for cell in cells)).body
    for name in [name for name in sys.modules if name.partition(".")[0] == "atp_utils"]:
        del sys.modules[name]
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), path, "exec"), {})
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "atp_utils"]
    print(json.dumps([module.__file__ for module in ours]))
"""


@pytest.fixture(scope="module")
def loaded():
    """Notebook -> files of the package that its imports make the interpreter load."""
    paths = [str(ROOT / "notebooks" / f"{book}.ipynb") for book in BOOKS]
    done = subprocess.run(
        [sys.executable, "-c", LOADED], input=json.dumps(paths), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {book: {atp_utils.shown(path) for path in row} for book, row in zip(BOOKS, rows, strict=True)}


@pytest.mark.parametrize("book", BOOKS)
def test_the_closure_is_what_the_interpreter_loads_and_what_comes_late(book, loaded):
    # The registry loads every scenario by a name that is put together; whoever takes a digest adds the one it runs.
    registry = "atp_utils/scenarios/registry.py" in loaded[book]
    found = set(closure(f"notebooks/{book}.ipynb", *(map(source, SCENARIOS.values()) if registry else ())))
    assert loaded[book] <= found and len(loaded[book]) > 3
    late = closure(*(path for path in found - loaded[book] if path.endswith(LATE)))
    assert found - loaded[book] <= set(late)


def test_what_is_reached_by_name_is_found():
    assert "atp_utils/sandbox/worker.py" in closure(source(SCENARIOS["tool_use"]))
    # Launched training runs the module by name.
    assert "atp_utils/training/trainer.py" in closure("notebooks/03_align_grpo.ipynb")
    drawing = closure("notebooks/07_heatmaps.ipynb")
    assert not {"atp_utils/training/trainer.py", "atp_utils/sandbox/worker.py"} & set(drawing)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the package's modules, given as name=source ("__" for a slash), and a notebook of one cell per text."""
    monkeypatch.setattr(atp_utils, "ROOT", tmp_path)

    def write(*cells, **modules):
        for name, text in {"__init__": "", "engines____init__": "", **modules}.items():
            path = tmp_path / "atp_utils" / ("engines/" * name.startswith("engines__") + name.removeprefix("engines__"))
            path = path.with_name(path.name + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(book, tmp_path / "book.ipynb")
        return [path.removeprefix("atp_utils/").removesuffix(".py") for path in closure("book.ipynb")]

    return write


@pytest.mark.parametrize(
    ("cell", "reached"),
    [
        ("import atp_utils.a", ["a", "b"]),
        ("import os, atp_utils.b as other", ["b"]),
        ("from atp_utils import b, resolve", ["b"]),
        ("from atp_utils.b import x", ["b"]),
        ("from atp_utils import *", []),
        ("from atp_utils import resolve, unknown\nimport numpy.b", []),
        ("def f():\n    from atp_utils import b", ["b"]),
        ("start('atp_utils.b')", ["b"]),
        ("start('atp_utils.b.c', 'b', 'x atp_utils.b', 'sub/b.py')", []),
        ("path = folder / 'b.py'", ["b"]),
        ("!python -m atp_utils.b\nfrom atp_utils import b", ["b"]),
        ("%%time\nfrom atp_utils import resolve", []),
        ("from atp_utils.engines import transformers", ["cache", "engines/__init__", "engines/transformers"]),
        ("import atp_utils.engines.transformers", ["cache", "engines/__init__", "engines/transformers"]),
        ("start('atp_utils.engines.cache')", ["engines/__init__", "engines/cache"]),
        ("from atp_utils import engines", ["engines/__init__"]),
    ],
)
def test_ways_to_reach_a_module(package, cell, reached):
    reached = [f"engines/{name}" if name == "cache" else name for name in reached]
    found = package(
        cell,
        a="from atp_utils import b",
        b="",
        engines__transformers="from atp_utils.engines.cache import x",
        engines__cache="",
    )
    assert found == sorted(["__init__", *reached])


def test_imports_in_a_ring_end(package):
    assert package("import atp_utils.a", a="import atp_utils.b", b="import atp_utils.a") == ["__init__", "a", "b"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x = 1\n", True),
        ("# why\nx = (1)\n", True),
        ('"""Module."""\nx = 1', True),
        ("x = 2", False),
        ("x = 1\ny = 1", False),
        ('x = 1\n"""A string, not a docstring"""', False),
    ],
)
def test_the_digest_is_of_code(tmp_path, text, same):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1")
    second.write_text(text)
    assert (code_of(first) == code_of(second)) is same


def test_a_cell_with_a_magic_counts_by_its_text(tmp_path):
    def book(name, *cells):
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(content, tmp_path / name)
        return code_of(tmp_path / name)

    plain = book("a.ipynb", "%matplotlib inline", "x = 1  # one")
    assert plain == book("b.ipynb", "%matplotlib inline", "x = 1")
    assert plain != book("c.ipynb", "%matplotlib widget", "x = 1")
    assert plain != book("d.ipynb", "x = 1", "%matplotlib inline")


@pytest.mark.parametrize("read", [code_of, closure])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="notebooks/none.ipynb"):
        read("notebooks/none.ipynb")
    (tmp_path / "broken.py").write_text("x = (")
    with pytest.raises(ValueError, match=r"broken\.py: not Python: "):
        read(tmp_path / "broken.py")


@pytest.mark.parametrize("book", ["07_heatmaps", "08_figures", "09_dose_response", "10_critical_mass"])
def test_what_draws_a_figure_counts_for_the_notebook_that_shows_it(book):
    reached = closure(f"notebooks/{book}.ipynb")
    assert {"atp_utils/analysis/figures.py", "atp_utils/analysis/response_figures.py"} <= set(reached)
