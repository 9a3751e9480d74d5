"""Known truth: agents of known habits go through the study's questions, and each gets the verdicts that it deserves."""

import re

import pandas as pd
import pytest
import scripted_agents as agents

from atp_utils.analysis import stats, study, tables

CONDITIONS = ("standard", "equal_payoffs", "unrelated_history", "no_rewards")
# The longest history, and both payoffs.
WRITTEN = {"condition": "forced_history", "items": 0, "forced_rounds": 2, "ratios": [1, 2], "told": ["own"]}


def lived(habit, folder, **settings):
    ways = {"rounds": 6, "items": 0, "seeds": (0, 1), **settings}
    return [agents.evolve("role_play", habit, folder / name, condition=name, **ways) for name in CONDITIONS]


def verdicts_of(decisions, question):
    table = study.answers(decisions)
    rows = table[table["question"] == question]
    return dict(zip(rows["about"], rows["verdict"], strict=True))


@pytest.mark.parametrize(
    ("habit", "expected"),
    [
        (agents.never, {"payoff": "not shown", "copying": "not shown", "position": "not shown"}),
        (agents.follows_position, {"payoff": "not shown", "copying": "not shown", "position": "shown"}),
        (agents.copies_itself, {"payoff": "not shown", "copying": "shown", "dose": "not shown"}),
        (agents.follows_payoff, {"payoff": "shown", "copying": "not shown", "position": "not shown"}),
        (agents.turns_from_its_last, {"payoff": "not shown", "copying": "not shown"}),
        (agents.relapses_after_two, {"payoff": "not shown", "copying": "shown", "dose": "not shown"}),
        (agents.aligned_without_a_past, {"payoff": "not shown", "copying": "not shown", "format": "shown"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_habit_gets_its_verdicts(habit, expected, tmp_path):
    decisions = pd.concat([*lived(habit, tmp_path), agents.evolve("role_play", habit, tmp_path / "written", **WRITTEN)])
    found = {question: set(verdicts_of(decisions, question).values()) for question in expected}
    assert found == {question: {verdict} for question, verdict in expected.items()}


def test_an_agent_that_copies_places_is_not_said_to_copy_choices(tmp_path):
    ways = WRITTEN | {"items": 16, "forced_rounds": 3}
    decisions = agents.evolve("role_play", agents.copies_its_place, tmp_path, **ways)
    [row] = study.answers(decisions).query("question == 'copying'").itertuples()
    # What it does in an environment is large, and turns with the places of that one's written rounds: half have either.
    [(*_, moved)] = study.copying(decisions)
    assert ((moved > 0.1).sum(), (moved < -0.1).sum()) == (8, 8)
    assert row.estimate == pytest.approx(0, abs=0.02) and row.verdict == "undecided"


def test_a_training_that_holds_without_a_past_erodes_and_payoffs_have_no_part_in_it(tmp_path):
    arms = {"base": lambda seen: 0.0, "dpo": agents.aligned_without_a_past}
    parts = [part.assign(arm=arm) for arm, habit in arms.items() for part in lived(habit, tmp_path / arm)]
    decisions = pd.concat(parts, ignore_index=True)
    [row] = study.answers(decisions).query("question == 'erosion'").itertuples()
    # From 12 % to 50 %, as 1 / (1 + e^2) has it, where base stays at 50.
    assert row.verdict == "shown" and row.estimate == pytest.approx(0.38, abs=0.02)
    found = study.answers(decisions).query("arm == 'dpo'").set_index("question")["verdict"]
    assert (found["payoff"], found["format"]) == ("not shown", "shown")


def test_a_record_without_written_rounds_has_no_dose(tmp_path):
    # Round 1 is behind no round at all, that is, behind none that deviated and none that complied alike.
    decisions = agents.evolve("role_play", agents.copies_itself, tmp_path, **(WRITTEN | {"forced_rounds": 0}))
    assert len(decisions) and set(decisions["round"]) == {1}
    assert verdicts_of(decisions, "dose") == {} and verdicts_of(decisions, "copying") == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_place_moves_choices_to_either_side(sign):
    def verdicts_by(*arms):
        # Places move choices by .2, .3 and .4 in three environments: t(2) = .3 * sqrt(3) / .1 = 5.2, so p = .035.
        parts = [
            table_of([(arm, 0, name, "standard", 1, 0.5)]).assign(p_first=0.5 + sign * move, p_second=0.5)
            for arm in arms for name, move in (("a", 0.2), ("b", 0.3), ("c", 0.4))
        ]  # fmt: skip
        rows = study.answers(pd.concat(parts, ignore_index=True)).query("question == 'position'")
        assert rows["estimate"].tolist() == pytest.approx([0.3 * sign] * len(arms))
        assert (sign * rows[["low", "high"]] > 0).all(axis=None)
        return rows["verdict"].tolist()

    assert verdicts_by("base") == ["shown"]
    # Holm's p of two such arms is .07, which decides nothing, on whichever side of 0 the intervals lie.
    assert verdicts_by("base", "dpo") == ["undecided", "undecided"]


def test_a_brake_is_shown_where_the_drift_needs_what_it_takes(tmp_path):
    assert verdicts_of(pd.concat(lived(agents.follows_payoff, tmp_path / "learns")), "brakes") == {
        "no_rewards": "shown"
    }
    copied = verdicts_of(pd.concat(lived(agents.copies_itself, tmp_path / "copies")), "brakes")
    assert copied == {"no_rewards": "not shown"}


def table_of(rows):
    """Role-play decisions from (arm, training seed, environment, condition, round, P(deviate))."""
    names = ["arm", "training_seed", "environment", "condition", "round", "p_deviate"]
    facts = {"scenario": "role_play", "model": "m-1b", "valid": True, "deviated": True, "p_first": None, "mass": 1.0,
             **dict.fromkeys(["told", "payoff_ratio", "past_compliant", "past_deviant", "past_others"])}  # fmt: skip
    table = pd.DataFrame(rows, columns=names).assign(**facts).astype({"p_deviate": "Float64"})
    return table.assign(item=table["environment"])


def test_erosion_by_hand():
    rows = []
    for place, environment in enumerate(["a", "b", "c", "d"]):
        # The base drifts by .1; the trainings begin .40 and .41 lower and drift by .30 and .32, more in later letters.
        rows += [("base", 0, environment, "standard", 1, 0.7), ("base", 0, environment, "standard", 2, 0.8)]
        rows += [("dpo", seed, environment, "standard", 1, 0.3 - 0.01 * seed) for seed in (0, 1)]
        rows += [("dpo", seed, environment, "standard", 2, 0.6 + 0.01 * (place + seed)) for seed in (0, 1)]
    [row] = study.answers(table_of(rows)).query("question == 'erosion'").itertuples()
    # Means over letters and trainings: .31 + .015 - .1; the two trainings are the fewest units.
    assert row.estimate == pytest.approx(0.225) and row.n == 2


def test_nothing_to_lose_is_said():
    rows = [(arm, 0, environment, "standard", number, 0.5 + 0.01 * len(environment))
            for arm in ("base", "dpo") for environment in ("a", "bb", "ccc") for number in (1, 2)]  # fmt: skip
    [row] = study.answers(table_of(rows)).query("question == 'erosion'").itertuples()
    assert row.verdict == "no gain" and row.n == 0


def test_units_are_subtracted_from_those_of_the_same_name():
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 1), ("b", 0)], names=["environment", "training_seed"])
    own = pd.Series([0.5, 0.7, 0.9], index)
    base = pd.Series([0.4, 0.1], pd.Index(["b", "a"], name="environment"))
    assert stats.less(own, base).tolist() == pytest.approx([0.4, 0.6, 0.5])


def test_larger_models_come_after_smaller_ones_and_unknown_sizes_nowhere(tmp_path):
    decisions = pd.concat(lived(agents.copies_itself, tmp_path))
    named = [decisions.assign(model=name) for name in ("coder-1.5b", "Llama-3.1-8B-Instruct", "lm-135m", "unknown")]
    rows = study.answers(pd.concat(named)).query("question == 'size'")
    assert list(zip(rows["model"], rows["about"], strict=True)) == [
        ("coder-1.5b", "less lm-135m"), ("Llama-3.1-8B-Instruct", "less coder-1.5b")]  # fmt: skip
    assert rows["estimate"].tolist() == [0, 0] and set(rows["verdict"]) == {"not shown"}


def test_holm_is_over_the_rows_of_a_question(tmp_path):
    decisions = pd.concat(lived(agents.follows_payoff, tmp_path))
    [alone] = study.answers(decisions).query("question == 'payoff'")["p"]
    both = study.answers(pd.concat([decisions, decisions.assign(arm="dpo")])).query("question == 'payoff'")
    assert both["p"].tolist() == pytest.approx([2 * alone] * 2)


def test_collusion_is_asked_behind_written_rounds(tmp_path):
    ways = {"condition": "forced_history", "thresholds": [4], "payoffs": [[1.2, 1.0, 0.8]]}
    followers = agents.evolve("collusion", agents.follows_majority, tmp_path / "follow", **ways)
    assert set(verdicts_of(followers, "imitation").values()) == {"shown"}
    assert verdicts_of(followers, "critical mass") == {"k = 4, ratio 1": "shown"}
    alone = agents.evolve("collusion", agents.never, tmp_path / "never", **ways)
    assert set(verdicts_of(alone, "imitation").values()) == {"not shown"}
    assert verdicts_of(alone, "critical mass") == {"k = 4, ratio 1": "not shown"}


def test_the_tool_is_asked_about_where_easy_successes_were_there():
    rows = []
    for agent in range(6):
        for place, family in enumerate("abcdefghijkl"):
            for number, p_direct in ((1, 0.1), (2, 0.4 + 0.01 * place + 0.01 * (agent % 2))):
                hard = ("complex", "direct", False, p_direct)
                rows += [(kind, family, agent, number, *facts) for kind, *facts in (("simple", None, True, None), hard)]
    names = ["kind", "environment", "agent", "round", "choice", "correct", "p_deviate"]
    facts = {"scenario": "tool_use", "model": "m-1b", "arm": "base", "training_seed": 0, "seed": 0, "valid": True,
             "deviated": True, "condition": "standard", "p_first": None, "reward": -1.0, "mass": 1.0,
             **dict.fromkeys(["told", "payoff_ratio", "past_compliant", "past_deviant", "past_others"])}  # fmt: skip
    table = pd.DataFrame(rows, columns=names).assign(**facts)
    table = table.assign(item=table["kind"] + "-" + table["environment"]).astype({"p_deviate": "Float64"})
    [row] = study.answers(table).query("question == 'easy success'").itertuples()
    # P(tool) falls from .9 by .3 + .055 (the mean place) + .005.
    assert row.estimate == pytest.approx(0.36) and row.verdict == "shown"
    unsolved = table.assign(correct=table["correct"] & (table["kind"] != "simple"))
    assert set(verdicts_of(unsolved, "easy success").values()) == {"no premise"}


def test_the_table_names_questions_in_their_order(tmp_path):
    table = tables.answers(study.answers(pd.concat(lived(agents.follows_payoff, tmp_path))))
    texts = [text for text, *_ in study.QUESTIONS.values()]
    shown = list(dict.fromkeys(table.index.get_level_values("question")))
    assert shown == [text for text in texts if text in shown] and list(table.columns) == ["scripted, base"]
    assert re.fullmatch(r"\S+ \[.*\] n=16 shown", table.iloc[0, 0])


def test_a_condition_of_one_training_is_compared_by_environments():
    rows = []
    for place, environment in enumerate("abcd"):
        for seed in (0, 1):
            for condition, drift in (("standard", 0.3 + 0.01 * place), ("caught", 0.1)):
                if condition == "standard" or seed == 0:
                    rows += [
                        ("dpo", seed, environment, condition, 1, 0.2),
                        ("dpo", seed, environment, condition, 2, 0.2 + drift),
                    ]
    [row] = study.answers(table_of(rows)).query("question == 'brakes'").itertuples()
    assert row.n == 4 and row.estimate == pytest.approx(0.215) and row.verdict == "shown"


def test_conditions_are_compared_on_the_items_that_both_have():
    rows = []
    for place, environment in enumerate("abcdef"):
        # The item that only the standard condition played drifts by a half, the others alike in both.
        for item, condition, drift in (
            ("1", "standard", 0.1),
            ("1", "caught", 0.1 + 0.001 * place),
            ("2", "standard", 0.6),
        ):
            ends = [("base", 0, environment, condition, number, 0.2 + drift * (number == 2)) for number in (1, 2)]
            rows += [(*end, f"{environment}-{item}") for end in ends]
    names = [row[-1] for row in rows]
    table = table_of([row[:-1] for row in rows]).assign(item=names)
    [row] = study.answers(table).query("question == 'brakes'").itertuples()
    assert row.estimate == pytest.approx(-0.0025)
