"""The problems of the tool-use scenario: which policy is named first, in the data and in an agent's blocks."""

import json
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_utils import resolve
from atp_utils.problems import make_problem
from atp_utils.scenarios.tool_use import items as tool_items
from atp_utils.scenarios.tool_use.items import Evolution
from atp_utils.support import files

NUMBERS = {"simple": (500, 100), "complex": (300, 72)}


@cache
def data():
    """(train, test) items as notebook 1 makes them."""
    parts = [tool_items.make_items(tool_items.draw_problems(kind, n)[0], test=t) for kind, (n, t) in NUMBERS.items()]
    return [simple + hard for simple, hard in zip(*parts, strict=True)]


def excess(items):
    """How many more of the items name the tool first than the direct answer."""
    return sum(1 if item.options[0] == "tool" else -1 for item in items)


def families(items):
    return Counter(item.environment for item in items)


def check_families(drawn, pool):
    """As many of each family, give or take one, unless a family has no more."""
    own, all_of_them = families(drawn), families(pool)
    assert all(own[name] == all_of_them[name] or own[name] >= max(own.values()) - 1 for name in all_of_them)


def made(sizes, test):
    """(train, test) items of families with so many problems each."""
    drawn = [
        (make_problem("complex", f"family_{family}", f"What is {n} times {family}?", 1, "test"), "")
        for family, size in enumerate(sizes)
        for n in range(size)
    ]
    return tool_items.make_items(drawn, test=test)


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1)


def test_the_committed_data_are_what_seed_0_gives():
    for split, items in zip(("train", "test"), data(), strict=True):
        assert files.read_jsonl(resolve(f"data/tool_use/{split}.jsonl"), tool_items.Item) == items


@settings(max_examples=150, deadline=None)
@given(sizes, st.data())
def test_policies_take_turns_in_a_split_and_in_its_families(sizes, data):
    for part in made(sizes, data.draw(st.integers(1, sum(sizes) - 1))):
        assert abs(excess(part)) <= 1
        for name in families(part):
            assert abs(excess([item for item in part if item.environment == name])) <= 1


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.data())
def test_either_policy_is_first_in_half_of_every_block(rounds, data_):
    size, hard = data_.draw(st.integers(1, 100 // rounds)), data_.draw(st.integers(1, 72))
    setting = Evolution(rounds=rounds, simple_per_round=size, complex_per_round=hard)
    pool = data()[1]
    exposed, asked = tool_items.blocks(pool, setting, data_.draw(st.integers(0, 99)), data_.draw(st.integers(0, 99)))
    assert [len(block) for block in exposed] == [size] * rounds and len(asked) == hard
    assert all(abs(excess(block)) <= 1 for block in exposed)
    simple = [item for block in exposed for item in block]
    for kind, drawn in (("simple", simple), ("complex", asked)):
        assert abs(excess(drawn)) <= 1 and len({item.id for item in drawn}) == len(drawn)
        check_families(drawn, [item for item in pool if item.kind == kind])


@settings(max_examples=300, deadline=None)
@given(sizes, st.data())
def test_families_of_any_size_are_drawn_in_balance(sizes, data):
    pool = made([*sizes, 2], 1)[0]
    count = data.draw(st.integers(1, len(pool)))
    drawn = tool_items._draw(data.draw(st.permutations(pool)), count)
    assert len({item.id for item in drawn}) == count
    assert all(abs(excess(drawn[:end])) <= 1 for end in range(1, count + 1))
    check_families(drawn, pool)


def test_no_agent_is_like_another_in_which_policy_comes_first():
    setting = Evolution(rounds=3, simple_per_round=1, complex_per_round=1)
    firsts = Counter()
    for agent in range(40):
        exposed, asked = tool_items.blocks(data()[1], setting, 0, agent)
        firsts["simple"] += excess(exposed[0])
        firsts["complex"] += excess(asked)
    assert abs(firsts["simple"]) < 20 and abs(firsts["complex"]) < 20


def test_what_can_not_be_balanced_is_drawn_all_the_same():
    train, _ = made([8], 1)
    same = [item for item in train if item.options[0] == "tool"]
    assert [item.id for item in tool_items._draw(same, len(same))] == [item.id for item in same]


def test_too_few_problems_are_refused_by_kind():
    with pytest.raises(ValueError, match="101 simple test problems needed, there are 100"):
        tool_items.blocks(data()[1], Evolution(rounds=1, simple_per_round=101), 0, 0)


def test_a_changed_file_of_problems_is_read_again(tmp_path):
    path, row = tmp_path / "mine.jsonl", {"id": "a", "kind": "simple", "family": "f", "source": "s"}
    for answers in (["1"], ["1", "2"]):
        lines = [json.dumps(row | {"question": f"What is {answer}?", "answer": answer}) for answer in answers]
        path.write_text("\n".join(lines))
        assert tool_items.draw_problems("simple", len(answers), path)[1]["rows"] == len(answers)
