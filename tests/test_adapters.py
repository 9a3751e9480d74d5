"""Adapters that are published: which are, what lies with them, and when one is taken."""

import json
from itertools import product

import pandas as pd
import pytest
from test_folders import contents

from atp_utils import parameters, profiles, resolve, runs, shown
from atp_utils.runs import adapters
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support.manifest import MANIFEST

GIVEN = parameters.check("02_align_dpo", {"model": "a/b", "seed": 3}).model_dump(mode="json")
PROMPTS = {"notebook": runs.DATA, "parameters": {"seed": 0}, "sources": {"role_play.yaml": "cd"}}


def drawn(scenario, profile="quick", **changes):
    """What the prompts of a profile are, with other values of some parameters."""
    given = profiles.read_profile(profile).given(runs.DATA)
    return runs.prompts_marker(SCENARIOS[scenario], parameters.check(runs.DATA, given | changes))


def trained(run, *, size=10, seed=3, weights=b"w"):
    place = run / f"adapters/role_play/a--b/dpo-{seed}"
    place.mkdir(parents=True)
    (place / adapters.WEIGHTS).write_bytes(weights * size)
    (place / adapters.CONFIG).write_text("{}")
    (place / adapters.LOG).write_text("step,loss,margin\n1,0.7,0.1\n2,0.5,1.25\n")
    facts = {"settings": GIVEN | {"seed": seed}, "training": {"method": "dpo"}, "rows": 320, "steps": 2, "sha256": "ab"}
    facts |= {"prompts": PROMPTS}
    (place / MANIFEST).write_text(json.dumps(facts))
    return place


@pytest.fixture
def run(tmp_path):
    trained(tmp_path / "run")
    return tmp_path / "run"


def test_a_published_adapter_has_weights_log_manifest_and_card(run, tmp_path):
    [place] = adapters.publish(run, tmp_path / "published")
    assert place == tmp_path / "published/a--b/role_play/dpo/3"
    names = {".atp.json", adapters.WEIGHTS, adapters.CONFIG, adapters.LOG, adapters.CARD, MANIFEST}
    assert {path.name for path in place.iterdir()} == names
    card = (place / adapters.CARD).read_text()
    assert "2 steps on 320 rows" in card and "loss 0.5, margin 1.25" in card and "`ab`" in card
    assert "training prompts, without any history:" in card


def test_a_card_says_what_stood_before_the_prompts_and_what_was_left_out():
    facts = {"settings": GIVEN | {"history_pairs": 2, "held_out": 3}, "training": {"method": "dpo"}}
    facts |= {"rows": 1, "steps": 1, "sha256": ""}
    card = adapters.card(facts, pd.DataFrame({"step": [1], "loss": [0.5]}), "here")
    assert "training prompts, behind 2 compliant rounds and without quarter 3 of the environments:" in card


@pytest.mark.parametrize(
    "place", sorted(path.parent for path in resolve(adapters.PUBLISHED).rglob(adapters.CARD)), ids=str
)
def test_published_cards_are_those_that_would_be_made_now(place):
    made = adapters.card(json.loads((place / MANIFEST).read_text()), pd.read_csv(place / adapters.LOG), shown(place))
    assert (place / adapters.CARD).read_text() == made


def test_what_is_large_stays_where_it_is(run, tmp_path, monkeypatch):
    trained(run, size=11, seed=4)
    monkeypatch.setattr(adapters, "LARGEST", 10)
    assert [place.name for place in adapters.publish(run, tmp_path / "published")] == ["3"]


def test_another_training_takes_the_place_of_what_was_published(run, tmp_path):
    [place] = adapters.publish(run, tmp_path / "published")
    before = contents(place)
    assert adapters.publish(run, tmp_path / "published") == [place] and contents(place) == before
    (run / "adapters/role_play/a--b/dpo-3" / adapters.WEIGHTS).write_bytes(b"new")
    adapters.publish(run, tmp_path / "published")
    assert (place / adapters.WEIGHTS).read_bytes() == b"new"
    assert [path.name for path in place.parent.iterdir()] == ["3"]


def test_a_users_folder_is_left(run, tmp_path):
    mine = tmp_path / "published/a--b/role_play/dpo/3"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="wasn't made by this project"):
        adapters.publish(run, tmp_path / "published")
    assert contents(mine) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("scenario", profiles.read_profile("quick").scenarios)
def test_the_quick_profile_trains_nothing_that_it_evolves(scenario):
    profile = profiles.read_profile("quick")
    for model, policy in product(profile.models, profile.policies(scenario)):
        arm, _, seed = policy.partition("-")
        if arm != "base":
            given = profile.parameters(parameters.ALIGN[arm], scenario, model).model_dump(mode="json")
            assert adapters.published(model, scenario, arm, int(seed), given, drawn(scenario)), policy


PUBLISHED = sorted(path.parent for path in resolve(adapters.PUBLISHED).glob(f"*/*/*/*/{MANIFEST}"))


@pytest.mark.parametrize("place", PUBLISHED, ids=lambda place: "-".join(place.parts[-4:]))
def test_what_was_published_is_found_by_the_settings_that_it_had(place):
    """Also by today's parameters, of which some are newer than its manifest."""
    scenario, arm, seed = place.parts[-3:]
    given = json.loads((place / MANIFEST).read_text())["settings"]
    asked = parameters.check(parameters.ALIGN[arm], given).model_dump(mode="json")
    prompts = drawn(scenario)
    found = adapters.published(given["model"], scenario, arm, int(seed), asked, prompts)
    assert resolve(found) == place
    newer = set(asked) - set(given)
    assert all(asked[name] == getattr(parameters.Dpo(), name) for name in newer)
    for name in newer & {"scheduler"}:
        assert not adapters.published(given["model"], scenario, arm, int(seed), asked | {name: "linear"}, prompts)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [({}, True), ({"out": "else", "data": "else", "launcher": "x"}, True), ({"beta": 0.2}, False)],
)
def test_it_is_taken_for_the_settings_that_it_was_trained_with(run, tmp_path, changes, taken):
    [place] = adapters.publish(run, tmp_path / "published")
    found = adapters.published("a/b", "role_play", "dpo", 3, GIVEN | changes, PROMPTS, tmp_path / "published")
    assert found == (str(place) if taken else "")
    assert not adapters.published("a/b", "role_play", "dpo", 4, GIVEN, PROMPTS, tmp_path / "published")
    (place / adapters.WEIGHTS).unlink()
    assert not adapters.published("a/b", "role_play", "dpo", 3, GIVEN, PROMPTS, tmp_path / "published")


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS | {"parameters": {"seed": 1}}, PROMPTS | {"sources": {"role_play.yaml": "ef"}}, {}],
    ids=["parameters", "sources", "unknown"],
)
def test_it_is_not_taken_where_other_prompts_are_drawn(run, tmp_path, prompts):
    """Of which some may be tested on that it was trained on."""
    adapters.publish(run, tmp_path / "published")
    assert not adapters.published("a/b", "role_play", "dpo", 3, GIVEN, prompts, tmp_path / "published")


def test_prompts_are_told_apart_by_what_they_are_drawn_from(tmp_path):
    asked = {name: drawn(name) for name in SCENARIOS}
    assert all(drawn(name, "laptop") == asked[name] for name in SCENARIOS)
    more = {name: drawn(name, complex_test=150) for name in SCENARIOS}
    assert [name for name in SCENARIOS if more[name] != asked[name]] == ["tool_use"]
    assert all(drawn(name, seed=1) != asked[name] for name in SCENARIOS)
    problems = tmp_path / "mine.jsonl"
    for text in ("one", "other"):
        problems.write_text(text)
        asked[text] = drawn("tool_use", problem_source=str(problems))
    assert asked["one"]["sources"]["mine.jsonl"] != asked["other"]["sources"]["mine.jsonl"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_repositorys_prompts_are_of_the_sources_beside_them(scenario):
    assert json.loads(resolve(f"data/{scenario}/.atp.json").read_text()) == drawn(scenario)
