"""The packages' one order: each uses those before it, and no other."""

import ast

import pytest

from atp_utils import ROOT

LAYERS = (
    "support", "evolution", "analysis", "problems", "sandbox", "scenarios", "models", "engines",
    "parameters", "profiles", "runs", "training", "rescore", "inspect_task", "inspect_log", "explore", "run", "pilot",
)  # fmt: skip
FILES = sorted((ROOT / "atp_utils").rglob("*.py"))
MOST_LINES = 350


def layer(path):
    return path.relative_to(ROOT / "atp_utils").with_suffix("").parts[0]


def used(path):
    """Layers that a file imports anything of, also late."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in modules:
            package, _, rest = name.partition(".")
            if package == "atp_utils" and rest.partition(".")[0] in LAYERS:
                yield rest.partition(".")[0]


def test_every_file_has_a_layer():
    assert {layer(path) for path in FILES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "atp_utils")))
def test_arrows_go_one_way(path):
    own = layer(path)
    allowed = () if own == "__init__" else LAYERS[: LAYERS.index(own) + 1]
    assert set(used(path)) <= set(allowed)
    assert path.read_text().count("\n") <= MOST_LINES


def test_the_readme_lists_the_layers_in_this_order():
    listing = (ROOT / "README.md").read_text().partition("`atp_utils`, from the bottom up")[2].split("```")[1]
    named = [line.split()[0].strip("/").removesuffix(".py") for line in listing.strip().splitlines()]
    assert named == [name for name in LAYERS if name != "pilot"]


def test_only_its_own_modules_need_inspect():
    named = {path.name for path in FILES if "inspect_ai" in path.read_text()}
    assert named == {"inspect_task.py", "inspect_log.py"}
