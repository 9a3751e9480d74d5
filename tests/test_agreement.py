"""Runs that disagree in what must agree stand in no figure together."""

import json
import shutil

import pandas as pd
import pytest

from atp_utils import resolve
from atp_utils.analysis import gallery
from atp_utils.evolution import journal

RECORD = resolve("data/results/quick/evolution")


@pytest.fixture
def runs(tmp_path):
    """Role-play's recorded runs, of which a test may change manifests."""
    shutil.copytree(RECORD / "role_play", tmp_path / "role_play")
    return tmp_path


def change(run, settings=(), **facts):
    path = run / "manifest.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | facts | {"settings": known["settings"] | dict(settings)}))


STANDARD, OTHER = "role_play/smollm2-135m/standard/dpo-0", "role_play/smollm2-135m/forced_history/dpo-0"


def test_the_record_agrees_and_every_decision_has_its_run():
    decisions = journal.read_decisions(resolve("data/results"))
    assert decisions["run"].nunique() == len(journal.complete_runs(resolve("data/results"))) > 9
    assert decisions.groupby("run")[journal.RUN].nunique().eq(1).all(axis=None)


@pytest.mark.parametrize(
    ("run", "settings", "named"),
    [
        (STANDARD, {"protocol": "reason"}, "protocol"),
        (STANDARD, {"rounds": 9}, "rounds"),
        (OTHER, {"rounds": 9}, "rounds"),
        (STANDARD, {"history_window": 2}, "history_window"),
        (STANDARD, {"temperature": 0.5}, "temperature"),
        (OTHER, {"ratios": [1, 9]}, "ratios"),
    ],
)
def test_settings_that_disagree_are_named_with_both_runs(runs, run, settings, named):
    change(runs / run, settings)
    with pytest.raises(ValueError, match=rf"\S+ and \S+ can't stand in one figure: {named} is .* in the other"):
        journal.read_decisions(runs)


def test_weights_templates_and_prompts_must_agree(runs):
    known = json.loads((runs / STANDARD / "manifest.json").read_text())["identity"].split("|")
    for place, name in ((1, "weights"), (3, "chat template")):
        change(runs / STANDARD, identity="|".join([*known[:place], "0" * 16, *known[place + 1 :]]))
        with pytest.raises(ValueError, match=f"{name} is"):
            journal.read_decisions(runs)
    change(runs / STANDARD, identity="|".join(known), prompts="a" * 64)
    journal.read_decisions(runs)  # the other's manifest doesn't say
    change(runs / STANDARD.replace("dpo-0", "base"), prompts="b" * 64)
    with pytest.raises(ValueError, match="prompts is"):
        journal.read_decisions(runs)


@pytest.mark.parametrize("settings", [{"seeds": [0, 1]}, {"items": 4}, {"dtype": "float32"}, {"data": "elsewhere"}])
def test_sizes_and_places_may_differ(runs, settings):
    change(runs / STANDARD, settings)
    journal.read_decisions(runs)


def test_what_a_condition_has_for_itself_counts_in_it_alone(runs):
    for policy in ("base", "dpo-0"):
        change(runs / OTHER.replace("dpo-0", policy), {"forced_rounds": 1})
    journal.read_decisions(runs)


def test_a_figure_names_its_runs(runs, tmp_path):
    decisions = journal.read_decisions(runs)
    drawn = gallery.draw(decisions, "role_play", tmp_path / "figures")
    svg = (tmp_path / "figures/role_play_smollm2-135m.svg").read_text()
    assert len(drawn) == 2
    assert STANDARD in svg and OTHER not in svg
    assert gallery.source_of(pd.DataFrame({"run": ["b", "a", "b"]})) == " From the runs a, b."
    assert gallery.source_of(pd.DataFrame({"x": [1]})) == ""
