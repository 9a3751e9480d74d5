"""What holds the repository's own files together."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml

from atp_utils import ROOT
from atp_utils.models.digests import sha256
from atp_utils.runs import adapters

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_conda_users_get_the_same_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    pins = {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert {entry for entry in pip if not entry.startswith("-e")} == pins
    assert all("==" in pin for pin in pins)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebooks_read_well(path):
    book = json.loads(path.read_text())
    assert "papermill" not in book["metadata"], "execute with `make notebooks`"
    cells = book["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) < len(cells) - len(code) + 2, "prose before code"
    tagged = ["parameters" in cell["metadata"].get("tags", []) for cell in code]
    assert sum(tagged) == 1
    # Question, what it reads and writes, how long it takes; then few lines before the first thing to see.
    opening = "".join(cells[0]["source"]).split("\n\n")[1]
    assert re.match(r"\*[^*]+\?\*", opening) and "eads" in opening and re.search("econds|minute", opening), opening
    assert len("".join(code[1]["source"]).replace("\n\n", "\n").splitlines()) <= 8
    for cell, listing in zip(code, tagged, strict=True):
        source, outputs = "".join(cell["source"]), json.dumps(cell["outputs"])
        assert source.count("\n") < (36 if listing else 25) and cell["execution_count"] is not None, source
        assert '"output_type": "error"' not in outputs and '"stderr"' not in outputs, source
        assert "execution" not in cell["metadata"], "times of execution: run make notebooks"
        assert str(ROOT.parent) + "/" not in outputs


def test_nothing_large_and_no_weights_but_small_adapters_are_tracked():
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listing.stdout.split("\0") if name]
    present = [path for path in tracked if path.is_file()]
    assert sum(path.stat().st_size for path in present) < 25e6
    weights = [path for path in present if path.suffix in (".safetensors", ".gguf", ".bin")]
    published = [path for path in weights if path.is_relative_to(ROOT / adapters.PUBLISHED)]
    assert weights == published and sum(path.stat().st_size for path in published) < 20e6
    for path in published:
        facts = json.loads(path.with_name("manifest.json").read_text())
        assert path.stat().st_size <= adapters.LARGEST and facts["sha256"] == sha256(path)
