"""docs/new_scenario.md, as it stands: its files are written to a folder of a user, and its commands run."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest

from atp_utils import ROOT
from atp_utils.evolution import journal

PATHS = ("gates.py", "prompts", "executed", "adapter", "evolution", "drawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """The example's folder after all of its commands."""
    folder = tmp_path_factory.mktemp("mine")
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/new_scenario.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["yaml", "python", "bash", "python"]
    data, scenario, commands, evolution = (text for _, text in blocks)
    (folder / "gates.yaml").write_text(data)
    (folder / "gates.py").write_text(scenario)
    # The page names paths of the repository; here all that is written goes to the user's folder.
    for name in PATHS:
        commands = re.sub(rf"(?<=[ =]){name}\b", str(folder / name), commands)
        evolution = re.sub(rf'"{name}"(?!:)', f'"{folder / name}"', evolution)
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "ATP_PROGRESS": os.devnull}
    done = subprocess.run(["bash", "-ec", commands], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    environment |= {"ATP_SCENARIOS": str(folder / "gates.py")}
    done = subprocess.run([sys.executable, "-c", evolution], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_its_prompts_stand_beside_the_others(folder):
    assert {path.name for path in (folder / "prompts").iterdir()} == {"gates", "role_play", "collusion", "tool_use"}
    assert (folder / "prompts/gates/test.jsonl").read_text().count("\n") == 12


def test_a_model_is_aligned_on_it_and_evolves(folder):
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    table = pd.read_parquet(folder / "evolution/decisions.parquet")
    assert len(table) == 24 and table["valid"].all() and set(table["scenario"]) == {"gates"}
    assert table.groupby("item")["capital"].last().isin([0, 5, 10]).all()


def test_it_is_trained_and_asked_in_both_orders(folder):
    table = pd.read_parquet(folder / "evolution/decisions.parquet")
    assert table["p_deviate"].to_list() == pytest.approx(((table["p_first"] + table["p_second"]) / 2).to_list())
    # Two rounds, one in either order; of 12 items half name the deviant option first.
    assert (table.groupby("item")["deviant_first"].sum() == 1).all() and table["deviant_first"].sum() == 12
    assert json.loads((folder / "adapter/manifest.json").read_text())["rows"] == 24
    chats = journal.read_record(folder / "evolution/replies.jsonl")
    for row in table[table["round"] == 2].itertuples():
        asked, turned = (chats.request(digest) for digest in row.replies.split())
        assert asked.options == turned.options[::-1] and len(asked.messages) == 4
        assert asked.messages[:3] == turned.messages[:3] and asked.messages[3] != turned.messages[3]


def test_a_figure_is_drawn(folder):
    assert (folder / "drawn/rounds_smollm2-135m.png").stat().st_size > 5000


def test_a_file_that_is_no_scenario_is_refused(tmp_path):
    for content, message in ((None, "no such file"), ("x = 1", "expected a scenario called SCENARIO")):
        path = tmp_path / "mine.py"
        if content:
            path.write_text(content)
        code, environment = "import atp_utils.scenarios.registry", os.environ | {"ATP_SCENARIOS": str(path)}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr
