"""Intention and file: data/paper/settings.csv says what the paper's profile is meant to hold, and where from."""

import csv
import json
import re

import pytest
import yaml

from atp_utils import resolve
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Reply, Sampling
from atp_utils.profiles import read_profile
from atp_utils.scenarios import collusion, role_play

PAPER = resolve("profiles/paper.yaml").read_text()
COMMENT = re.compile(r"#\s*(paper \([AB]?[\d.]*\)|release|ours)[:;, ]?")
SECTION = re.compile(r"(A\.[12](\.[12])?|B|3\.[12](\.[12])?)\b")


def intended() -> dict[tuple[str, str], dict[str, str]]:
    """(key, model) -> its row; a key stands once."""
    with resolve("data/paper/settings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {(row["key"], row["model"]): row for row in rows}
    assert len(table) == len(rows)
    return table


def held(text: str) -> dict[tuple[str, str], tuple[object, str]]:
    """(key, model) -> (value, the line that it stands on) of every setting in a profile's text."""
    root, lines, found = yaml.compose(text), text.split("\n"), {}
    parts = {key.value: node for key, node in root.value}
    own = [(model.value, node) for model, node in parts["models"].value] if "models" in parts else []
    for model, books in [("", parts["notebooks"]), *own]:
        for book, settings in books.value:
            for key, node in settings.value:
                value = yaml.safe_load(yaml.serialize(node))
                found[f"{book.value}.{key.value}", model] = (value, lines[node.start_mark.line])
    return found


def differences(text: str) -> list[tuple[str, str]]:
    """What stands in the table and not in a profile's text, or the other way round, or with another value."""
    table, profile = intended(), held(text)
    same = {name for name in table.keys() & profile.keys() if json.loads(table[name]["value"]) == profile[name][0]}
    return sorted(table.keys() ^ profile.keys() | (table.keys() - same))


def uncommented(text: str) -> list[str]:
    """Lines with a number that no comment traces to paper, release or ours."""
    return [line for value, line in held(text).values() if numbers(value) and not COMMENT.search(line)]


def numbers(value: object) -> bool:
    return bool(re.search(r"\d", json.dumps(value)))


def test_the_profile_is_what_the_table_says_and_nothing_else():
    assert differences(PAPER) == []


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("max_new_tokens: 3276  ", "max_new_tokens: 3277  ", "06_evolve_collusion.max_new_tokens"),
        ("    lora_rank: 0  # release", "    # release", "03_align_grpo/role_play.lora_rank"),
        ("    items: 0 ", "    opened: true\n    items: 0 ", "04_evolve_role_play.opened"),
    ],
)
def test_a_value_that_differs_is_missing_or_is_new_is_found(old, new, key):
    assert PAPER.count(old) >= 1
    assert (key, "") in differences(PAPER.replace(old, new, 1))


@pytest.mark.parametrize("name", ["paper", "paper_one_gpu"])
def test_every_number_says_where_it_is_from(name):
    text = resolve(f"profiles/{name}.yaml").read_text()
    assert uncommented(text) == []
    assert uncommented(re.sub(r"# ours", "# somebody's", text))


def test_table_and_comment_name_the_same_source():
    profile = held(PAPER)
    for name, row in intended().items():
        assert row["source"] in ("paper", "release", "ours") and row["where"], name
        assert row["source"] != "paper" or SECTION.match(row["where"]), name
        value, line = profile[name]
        if numbers(value):
            source, section = re.match(r"(\w+)(?: \((.*)\))?", COMMENT.search(line)[1]).groups()
            assert source == row["source"], name
            assert not section or row["where"].startswith(section), name


def test_each_model_and_scenario_gets_what_the_table_says():
    profile = read_profile("paper")
    for (key, model), row in intended().items():
        book, _, name = key.rpartition(".")
        book, _, part = book.partition("/")
        for asked in [model] if model else profile.models:
            over = (key, asked) in intended() and not model
            value = getattr(profile.parameters(book, part or None, asked if book != "01_generate_data" else None), name)
            assert over or value == json.loads(row["value"]), (key, asked)


def test_one_gpu_differs_from_eight_in_how_it_trains_alone():
    eight, one = read_profile("paper"), read_profile("paper_one_gpu")
    assert (one.models, one.evolutions, one.arms) == (eight.models, eight.evolutions, eight.arms)
    changed = {
        (book.partition("/")[0], name)
        for book in eight.notebooks
        for name in eight.notebooks[book] | one.notebooks[book]
        if eight.notebooks[book].get(name) != one.notebooks[book].get(name)
    }
    assert changed == {("02_align_dpo", "launcher")} | {("03_align_grpo", name) for name in ("launcher", "lora_rank")}


@pytest.mark.parametrize(("scenario", "rounds"), [(role_play, 6), (collusion, 3)])
def test_the_released_window_of_five_rounds_forgets_nothing_in_the_papers_rounds(scenario, rounds, splits):
    """What differs between full history and the last five is a seventh round, which the paper doesn't play."""
    own = scenario.SCENARIO
    item = splits[1][0] if scenario is role_play else own.test_items(own.Evolution())[0]
    protocol = Protocol("choose", sampling=Sampling(8))

    def asked(window: int, rounds: int) -> list:
        setting = own.Evolution(rounds=rounds, history_window=window)
        episode, replies, chats = own.episode(item, setting, protocol, 0), None, []
        try:
            while True:
                requests = episode.send(replies)
                chats += [list(request.messages) for request in requests]
                replies = [Reply("", logprobs=(-1.0, -2.0), digest=request.key) for request in requests]
        except StopIteration:
            return chats

    assert asked(5, rounds) == asked(0, rounds)
    assert asked(5, 7) != asked(0, 7)
