from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_utils import resolve
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.scenarios import role_play
from atp_utils.scenarios.role_play import items as role_play_items
from atp_utils.support import files

SCENARIO = role_play.SCENARIO


def test_sixteen_environments_make_160_and_64_prompts(environments, splits):
    train, test = splits
    assert (len(environments), len(train), len(test)) == (16, 160, 64)
    assert set(Counter(item.environment for item in train).values()) == {10}
    assert set(Counter(item.environment for item in test).values()) == {4}
    assert len({item.id for item in [*train, *test]}) == 224


def test_the_splits_do_not_overlap(splits):
    train, test = splits
    openings = {SCENARIO.opening(item, Protocol())[-1]["content"] for item in [*train, *test]}
    assert len(openings) == 224
    occasions = [{item.prompt.split("\n")[0] for item in items} for items in splits]
    assert not occasions[0] & occasions[1]


def test_label_and_position_are_crossed_in_the_test_items(splits):
    corners = Counter((item.options[0] == item.compliant, item.compliant == min(item.options)) for item in splits[1])
    assert set(corners.values()) == {16}


def test_breaking_the_rule_always_pays_more(splits):
    for item in (*splits[0], *splits[1]):
        assert 0 < item.payoff_compliant < item.payoff_deviant
        lines = SCENARIO.opening(item, Protocol())[-1]["content"].split("\n")
        for option, pay in ((item.compliant, item.payoff_compliant), (item.deviant, item.payoff_deviant)):
            [line] = [line for line in lines if line.startswith(f"- {option}: ")]
            assert line.endswith(f"this earns you {pay} {item.unit}.")


def test_the_same_seed_writes_the_same_bytes(environments, tmp_path):
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        items, _ = role_play_items.make_items(environments, seed=seed)
        files.write_jsonl(tmp_path / name, items)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1] != written[2]
    assert files.read_jsonl(tmp_path / "a", role_play.Item) == role_play_items.make_items(environments)[0]


def test_the_committed_data_are_what_seed_0_gives(splits):
    for name, items in zip(("train", "test"), splits, strict=True):
        assert files.read_jsonl(resolve(f"data/role_play/{name}.jsonl"), role_play.Item) == items


@pytest.mark.parametrize(
    ("count", "message"), [({"train": 3}, "train_per_env"), ({"test": 0}, "test_per_env"), ({"train": 40}, "payoff")]
)
def test_impossible_counts_are_refused(environments, count, message):
    with pytest.raises(ValueError, match=message):
        role_play_items.make_items(environments, **count)


def broken(environments, **changes):
    return yaml.safe_dump([environments[0].model_dump() | changes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "Follow it."}, r"rule must hold \{compliant\} exactly once"),
        ({"action": "{label} {label}"}, r"action must hold \{label\}"),
        ({"labels": ["Oak", "Oak"]}, "distinct"),
        ({"labels": ["Oak"]}, "labels"),
        ({"payoff": {"compliant": [5, 9], "deviant": [9, 12]}}, "payoff ranges"),
        ({"payoff": {"compliant": [5, 9]}}, r"payoff\.deviant: Field required"),
        ({"name": "Not a slug"}, "name"),
        ({"color": "red"}, "color: Extra inputs"),
        ({"task": " "}, "task"),
    ],
)
def test_a_bad_environment_is_refused_by_name(environments, tmp_path, change, message):
    path = tmp_path / "environments.yaml"
    path.write_text(broken(environments, **change))
    with pytest.raises(ValueError, match=rf"environments\.yaml: .*{message}"):
        role_play_items.read_environments(path)


def test_environments_need_distinct_names(environments, tmp_path):
    path = tmp_path / "environments.yaml"
    path.write_text(yaml.safe_dump([environments[0].model_dump()] * 2))
    with pytest.raises(ValueError, match="distinct names"):
        role_play_items.read_environments(path)


@pytest.mark.parametrize("protocol", ["choose", "reason"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_prompt_names_options_in_the_items_order_or_turned(item, protocol, turned):
    text = SCENARIO.opening(item, Protocol(protocol), turned)[-1]["content"]
    for mark in (answer_json, lambda option: f"- {option}: "):
        places = [text.rindex(mark(option)) for option in item.options]
        assert places == sorted(places, reverse=turned)
    assert item.compliant in text.split("\n")[0]


def corners(items, environments):
    """How many items have each (rank of the compliant label, place of the compliant option)."""
    labels = {environment.name: environment.labels for environment in environments}
    taken = Counter((labels[i.environment].index(i.compliant), i.options.index(i.compliant)) for i in items)
    return [[taken[rank, place] for place in (0, 1)] for rank in (0, 1)]


def check_balance(chosen, environments, crossing=1):
    (a, b), (c, d) = corners(chosen, environments)
    assert abs(a + b - c - d) <= 1, "labels"
    assert abs(a + c - b - d) <= 1, "positions"
    assert max(a, b, c, d) - min(a, b, c, d) <= crossing, "label and position crossed"
    own = Counter(item.environment for item in chosen)
    counts = [own[environment.name] for environment in environments]
    assert max(counts) - min(counts) <= 1, "environments"


@pytest.mark.parametrize("count", range(1, 65))
def test_any_number_of_test_items_is_balanced(environments, splits, count):
    chosen = role_play_items.balanced_subset(splits[1], count)
    assert len({item.id for item in chosen}) == count
    assert chosen == [item for item in splits[1] if item in chosen]
    check_balance(chosen, environments)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_number_of_items_is_balanced_whatever_the_environments(environments, data):
    number, each = data.draw(st.integers(1, 40)), 2 * data.draw(st.integers(1, 6))
    many = [environments[n % 16].model_copy(update={"name": f"{environments[n % 16].name}_{n}"}) for n in range(number)]
    sides = {"train": each, "test": 2} if data.draw(st.booleans()) else {"train": 2, "test": each}
    items = role_play_items.make_items(many, **sides)[sides["test"] == each]
    count = data.draw(st.integers(1, len(items)))
    # Two items left over of each of 4n + 2 environments can't cross label and position and have half of both.
    odd = number % 4 == 2 and len(items) // number % 4 == 2 and count > len(items) - 2
    check_balance(role_play_items.balanced_subset(items, count), many, crossing=2 if odd else 1)


def test_occasions_stand_for_neither_label_nor_position(environments, splits):
    for items in splits:
        for occasion in {item.prompt.split("\n")[0] for item in items}:
            (a, b), (c, d) = corners([i for i in items if i.prompt.split("\n")[0] == occasion], environments)
            assert a + b == c + d and a + c == b + d


def test_how_many_items_there_can_be(splits):
    assert role_play_items.balanced_subset(splits[1], 0) == role_play_items.balanced_subset(splits[1], 64) == splits[1]
    for count in (-1, 65):
        with pytest.raises(ValueError, match=r"items must lie in 0\.\.64"):
            role_play_items.balanced_subset(splits[1], count)
