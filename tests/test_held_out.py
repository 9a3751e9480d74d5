"""Held-out environments: what an arm never trained on is what its evolution plays."""

import pytest
from trainings import a_run

from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files
from atp_utils.training import pairs

PLAYED = {"role_play": {"items": 0}, "collusion": {}, "tool_use": {}}


def names(items):
    return {item.environment for item in items}


def sides(name, tmp_path, fold, data="data"):
    """(trained, played) items of a fold."""
    run = a_run("grpo", "smollm2-135m", tmp_path / "out", scenario=name, data=str(data), held_out=fold)
    scenario = SCENARIOS[name]
    return pairs.training_items(run, "grpo"), scenario.test_items(
        scenario.Evolution(data=str(data), held_out=fold, **PLAYED[name])
    )


@pytest.mark.parametrize("name", PLAYED)
def test_folds_are_disjoint_and_complete(name, tmp_path):
    trained, played = sides(name, tmp_path, 0)
    everything, all_played = names(trained) | names(played), []
    for fold in (1, 2, 3, 4):
        some, others = sides(name, tmp_path, fold)
        # What is played and what was trained on share no environment, and together they are all there are.
        assert not names(some) & names(others) and names(some) | names(others) == everything
        assert [item.id for item in some] == [item.id for item in trained if item.environment not in names(others)]
        assert abs(len(names(others)) - len(everything) / 4) < 1
        all_played += others
    assert sorted(item.id for item in all_played) == sorted(item.id for item in played)


def test_environments_of_a_fold_by_name(tmp_path):
    games = sorted(names(sides("collusion", tmp_path, 0)[1]))
    assert [sorted(names(sides("collusion", tmp_path, fold)[1])) for fold in (1, 2, 3, 4)] == [
        [games[0], games[4]],
        [games[1], games[5]],
        [games[2], games[6]],
        [games[3]],
    ]


def test_splits_without_a_common_environment_have_the_same_folds(tmp_path):
    """Of few problems, a family may be in one split only; counted within each, folds of the two would be others."""
    scenario = SCENARIOS["tool_use"]
    families = sorted(names(scenario.read_items("train", "data")))
    for split, kept in (("train", families[1:]), ("test", families[:-3])):
        items = [item for item in scenario.read_items(split, "data") if item.environment in kept]
        files.write_jsonl(tmp_path / f"tool_use/{split}.jsonl", items)
    for fold in (1, 2, 3, 4):
        trained, played = sides("tool_use", tmp_path, fold, tmp_path)
        assert names(played) <= set(families[fold - 1 :: 4]) and not names(trained) & set(families[fold - 1 :: 4])


def test_a_fold_without_environments_is_refused(tmp_path):
    scenario = SCENARIOS["role_play"]
    few = sorted(names(scenario.read_items("train", "data")))[:3]
    for split in ("train", "test"):
        items = [item for item in scenario.read_items(split, "data") if item.environment in few]
        files.write_jsonl(tmp_path / f"role_play/{split}.jsonl", items)
    for settings in ({"held_out": 4}, {"held_out": 5}):
        with pytest.raises(ValueError, match="held_out"):
            scenario.test_items(scenario.Evolution(data=str(tmp_path), items=0, **settings))
    with pytest.raises(ValueError, match="role_play has 3 environments only"):
        sides("role_play", tmp_path, 4, tmp_path)
