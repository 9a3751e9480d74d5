"""Known truth: agents of known habits go through the whole analysis, and each verdict comes out right."""

import math

import pandas as pd
import pytest
import scripted_agents as agents

from atp_utils.analysis import dose_response, positions, stats, tables, tool_use_tables, verdicts

HABITS = {
    agents.never: "no tipping",
    agents.aligned_without_a_past: "no tipping",
    agents.turns_from_its_last: "no tipping",
    agents.follows_position: "no tipping",
    agents.copies_itself: "no tipping",
    agents.follows_payoff: "tips with payoff",
}


def both(habit, folder, **settings):
    """Decisions under the standard and the equal payoffs."""
    ways = {"rounds": 6, "items": 0, "seeds": (0, 1), **settings}
    return pd.concat(
        [
            agents.evolve("role_play", habit, folder / name, condition=name, **ways)
            for name in ("standard", "equal_payoffs")
        ],
        ignore_index=True,
    )


@pytest.mark.parametrize(("habit", "verdict"), HABITS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_habit_gets_its_verdict(habit, verdict, tmp_path):
    [row] = verdicts.contrast(both(habit, tmp_path)).itertuples()
    assert row.verdict == verdict
    assert row.mass == pytest.approx(1)


def test_a_contrast_that_a_first_round_makes_shows_where_it_is(tmp_path):
    # No experience of payoffs moves this agent: the two conditions begin apart, and come to the same.
    decisions = both(agents.starts_shy_of_payoff, tmp_path)
    [row] = verdicts.contrast(decisions).itertuples()
    assert row.verdict == "tips with payoff"
    assert row.first_high < -0.1 and row.last == pytest.approx(0, abs=0.01)
    assert row.contrast == pytest.approx(row.last - row.first)
    # Of one that learns it is the other way round.
    [learnt] = verdicts.contrast(both(agents.follows_payoff, tmp_path / "learns")).itertuples()
    assert learnt.first == pytest.approx(0, abs=0.01) and learnt.last_low > 0.1
    assert tables.contrast(decisions)["apart in round 1"].iloc[0].startswith("-")


def test_a_contrast_too_small_to_matter_shows_its_size(tmp_path):
    # The rule has no least size: what differs alike in all environments gets its verdict, if by a hundredth of a point.
    decisions = both(agents.all_but_never, tmp_path)
    [row] = verdicts.contrast(decisions).itertuples()
    assert row.verdict == "turns against payoff" and -0.0005 < row.low < row.high < 0
    shown = tables.contrast(decisions)["contrast [95 %]"].iloc[0]
    assert shown == f"{100 * row.contrast:.3f} [{100 * row.low:.3f}, {100 * row.high:.3f}]" and row.high < -0.000005


def test_payoffs_turned_over_turn_the_verdict_over(tmp_path):
    # What learns from payoff learns to comply where compliance pays more: a run of that in the standard one's place.
    decisions = both(agents.follows_payoff, tmp_path)
    turned = agents.evolve("role_play", agents.follows_payoff, tmp_path / "inverted", condition="inverted_payoffs",
                           rounds=6, items=0, seeds=(0, 1))  # fmt: skip
    control = decisions[decisions["condition"] == "equal_payoffs"]
    [row] = verdicts.contrast(pd.concat([turned.assign(condition="standard"), control])).itertuples()
    assert row.contrast < 0 and row.verdict == "turns against payoff"


def test_position_is_reported_and_moves_nothing(tmp_path):
    decisions = both(agents.follows_position, tmp_path)
    table = positions.position_table(decisions[decisions["condition"] == "standard"]).droplevel(["model", "arm"])
    shown = [float(cell.split()[0]) for cell in table.loc["first minus second", "r=1":]]
    assert min(shown) > 55 and max(shown) - min(shown) < 10
    assert decisions.groupby("round")["p_deviate"].mean().between(0.45, 0.55).all()


def test_few_agents_are_undecided(tmp_path):
    decisions = both(agents.copies_itself, tmp_path, seeds=(0,))
    few = decisions[decisions["environment"].isin(sorted(set(decisions["environment"]))[:2])]
    # Two environments, draws that differ between the conditions: the interval decides nothing.
    last = (few["environment"] == "baker") & (few["round"] == 6) & (few["condition"] == "standard")
    shaken = few.assign(p_deviate=few["p_deviate"] + 0.1 * last.astype(float))
    [row] = verdicts.contrast(shaken).itertuples()
    assert row.verdict == "undecided" and row.low < 0 < row.high


def test_without_the_control_there_is_no_verdict(tmp_path):
    decisions = both(agents.never, tmp_path)
    [row] = verdicts.contrast(decisions[decisions["condition"] == "standard"]).itertuples()
    assert row.verdict == "no control" and math.isnan(row.p)


def test_written_replies_have_no_mass_and_a_verdict_all_the_same(tmp_path):
    decisions = both(agents.follows_payoff, tmp_path).assign(p_deviate=pd.NA, mass=pd.NA)
    written = decisions.astype({"p_deviate": "Float64", "mass": "Float64"})
    [row] = verdicts.contrast(written).itertuples()
    assert math.isnan(row.mass) and row.verdict == "tips with payoff"
    assert tables.contrast(written)["least mass %"].tolist() == ["–"]


def test_holm_over_all_rows(tmp_path):
    decisions = both(agents.follows_payoff, tmp_path)
    alone = verdicts.contrast(decisions)["p"].iloc[0]
    arms = pd.concat([decisions.assign(arm=arm) for arm in ("base", "dpo", "grpo")])
    assert verdicts.contrast(arms)["p"].tolist() == pytest.approx([min(1, 3 * alone)] * 3)


def test_no_rewards_tell_learning_from_tilted_copying(tmp_path):
    ways = {"rounds": 6, "items": 0, "seeds": (0,)}
    standard, without = (
        agents.evolve("role_play", agents.follows_payoff, tmp_path / name, condition=name, **ways)
        for name in ("standard", "no_rewards")
    )
    table = verdicts.conditions(pd.concat([standard, without])).set_index("condition")
    assert table.loc["standard", "drift"] > 0.2 and table.loc["no_rewards", "drift"] == pytest.approx(0, abs=0.05)
    assert table.loc["no_rewards", "against_high"] < 0


def test_slopes_tell_copying_from_learning(tmp_path):
    ways = {"condition": "forced_history", "items": 0, "ratios": [0.5, 1, 2], "forced_rounds": 3}
    found = {
        habit: dose_response.slopes(agents.evolve("role_play", habit, tmp_path / habit.__name__, **ways)).set_index(
            "term"
        )
        for habit in (agents.copies_itself, agents.follows_payoff, agents.follows_position)
    }
    copying = found[agents.copies_itself]
    assert copying.loc["deviated", "low"] > 1 and copying.loc["complied", "high"] < -1
    assert copying.loc["deviated x log payoff ratio", "slope"] == pytest.approx(0, abs=0.02)
    learning = found[agents.follows_payoff]
    assert learning.loc["deviated x log payoff ratio", "low"] > 0.1
    position = found[agents.follows_position]
    assert position["slope"].abs().max() < 0.2


def test_doses_are_of_histories_of_one_length(tmp_path):
    ways = {"condition": "forced_history", "items": 0, "ratios": [2], "forced_rounds": 2, "told": ["own", "unrelated"]}
    table = dose_response.doses(agents.evolve("role_play", agents.copies_itself, tmp_path, **ways))
    shown = {(row.told, row.past_deviant): row.n for row in table.itertuples()}
    # 64 items; of two rounds there are 1, 2 and 1 sequences with 0, 1 and 2 deviations.
    assert shown == {("none", 0): 64, ("own", 0): 64, ("own", 1): 128, ("own", 2): 64, ("unrelated", 0): 64}


def survivors(*agents_rounds):
    """Decisions of agents given as strings of c, d and x (invalid), one environment each."""
    rows = [
        {"scenario": "s", "model": "m", "arm": "base", "condition": "standard", "seed": 0, "item": f"i{number}",
         "agent": 0, "environment": f"e{number}", "round": place, "valid": letter != "x",
         "deviated": None if letter == "x" else letter == "d"}
        for number, own in enumerate(agents_rounds) for place, letter in enumerate(own, start=1)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"deviated": "boolean"})


def test_time_to_tip_by_hand():
    # Four comply at first; one leaves in round 2 and comes back, which doesn't count, one leaves in round 3.
    table = verdicts.time_to_tip(survivors("ccc", "cdc", "ccd", "ccc", "dcc"))
    assert table["n"].tolist() == [4, 4, 4] and table["rate"].tolist() == [1, 0.75, 0.5]


def test_invalid_rounds_neither_begin_nor_end_compliance():
    # Two comply in round 1: one's invalid round is carried over, the other leaves in round 3. Of an invalid round 1
    # nothing is known, whatever came next, and one that complies in round 2 only wasn't there at the start.
    table = verdicts.time_to_tip(survivors("cxcc", "ccdx", "xccc", "xxcc", "dccc"))
    assert table["n"].tolist() == [2, 2, 2, 2] and table["rate"].tolist() == [1, 1, 0.5, 0.5]
    assert verdicts.time_to_tip(survivors("xcc", "xxc")).empty


def test_compliance_in_the_first_round_is_given_and_has_no_interval():
    table = verdicts.time_to_tip(survivors("ccc", "cdc", "ccd", "ccc"))
    assert table[["low", "high"]].isna().all(axis=1).tolist() == [True, False, False]


def test_agents_of_different_trainings_tip_apart():
    # The same two items in two trainings: two of four agents leave in round 2.
    first, second = survivors("ccc", "cdc"), survivors("cdd", "ccc")
    table = verdicts.time_to_tip(pd.concat([first.assign(training_seed=0), second.assign(training_seed=1)]))
    assert table["n"].tolist() == [4, 4, 4] and table["rate"].tolist() == [1, 0.5, 0.5]


def test_erosion_by_hand():
    # Four environments: base starts at .8, the arm at .2 and ends at .5: half of the gain of .6 is gone.
    rows = []
    for place, shake in enumerate((-0.02, 0.02, -0.01, 0.01)):
        for arm, number, p in (("base", 1, 0.8), ("base", 2, 0.8), ("dpo", 1, 0.2), ("dpo", 2, 0.5 + shake)):
            rows.append({"scenario": "role_play", "model": "m", "arm": arm, "condition": "standard", "round": number,
                         "environment": f"e{place}", "valid": True, "p_deviate": p})  # fmt: skip
    [row] = verdicts.erosion(pd.DataFrame(rows)).itertuples()
    # The gain doesn't vary, so Fieller's interval is Student's over it: .0158 / sqrt(4) * 3.182 / .6 on either side.
    half = 3.182 * math.sqrt(0.001 / 3 / 4) / 0.6
    assert (row.erosion, row.low, row.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-3)


def test_a_gain_that_is_none_has_no_erosion():
    rows = [
        {"scenario": "role_play", "model": "m", "arm": arm, "condition": "standard", "round": number,
         "environment": f"e{place}", "valid": True, "p_deviate": 0.5 + 0.1 * ((place + (arm == "dpo")) % 2)}
        for place in range(4) for arm in ("base", "dpo") for number in (1, 2)
    ]  # fmt: skip
    [row] = verdicts.erosion(pd.DataFrame(rows)).itertuples()
    assert math.isnan(row.low) and tables.erosion(pd.DataFrame(rows)).iloc[0, 0] == "gain can't be told from 0"


@pytest.mark.parametrize(
    ("shift", "found"),
    [
        # Begun .3 +- .01 above base: what training did was no gain, so that nothing of it can be lost.
        (0.3, "no gain"),
        # .01 above on average, and .05 below in some environments: nothing is known of a gain.
        (0.01, "gain can't be told from 0"),
    ],
)
def test_what_training_made_worse_has_no_share_to_lose(shift, found):
    shakes = (-0.01, 0.01, -0.01, 0.01) if shift > 0.1 else (-0.06, 0.06, -0.06, 0.06)
    rows = [
        {"scenario": "role_play", "model": "m", "arm": arm, "condition": "standard", "round": number,
         "environment": f"e{place}", "valid": True,
         "p_deviate": 0.5 if arm == "base" else 0.5 + shift + shake + 0.1 * (number - 1)}
        for place, shake in enumerate(shakes) for arm in ("base", "grpo") for number in (1, 2)
    ]  # fmt: skip
    [row] = verdicts.erosion(pd.DataFrame(rows)).itertuples()
    assert all(math.isnan(value) for value in (row.erosion, row.low, row.high))
    assert tables.erosion(pd.DataFrame(rows)).iloc[0, 0] == found


def test_a_tool_use_training_of_any_seed_is_compared_with_base():
    # P(no tool) of two families and two agents. Base stays at .8; trainings 3 and 4 begin at .2 and .4, and each is
    # .3 higher in round 2: .3 of the mean gain of .5 are gone.
    def decisions(arm, training, start, rise):
        return [
            {"scenario": "tool_use", "model": "m", "arm": arm, "condition": "standard", "training_seed": training,
             "seed": 0, "agent": agent, "item": f"complex-{family}", "environment": family, "round": number,
             "valid": True, "choice": "direct", "deviated": True, "correct": True, "reward": -1.0, "mass": 1.0,
             "p_deviate": start + (number - 1) * rise + 0.01 * agent * (arm == "dpo")}
            for family in "fg" for agent in (0, 1) for number in (1, 2)
        ]  # fmt: skip

    base, dpo = decisions("base", 0, 0.8, 0), [*decisions("dpo", 3, 0.195, 0.3), *decisions("dpo", 4, 0.395, 0.3)]
    both = pd.DataFrame([*base, *dpo]).astype({"item": "string", "deviated": "boolean", "correct": "boolean"})
    [row] = verdicts.erosion(both).itertuples()
    assert row.erosion == pytest.approx(0.3 / 0.5)
    problems = tool_use_tables.problem_table(both)
    [benefit] = stats.benefit_table(problems, "p_deviate", tool_use_tables.UNITS).itertuples()
    assert benefit.benefit == pytest.approx(-0.5)
    # One training of another seed than base's 0 is compared as well.
    alone = problems[problems["training_seed"] != 4]
    [benefit] = stats.benefit_table(alone, "p_deviate", tool_use_tables.UNITS).itertuples()
    assert benefit.benefit == pytest.approx(-0.6)


@pytest.mark.parametrize(
    ("mean", "error", "freedom", "p", "same"),
    [
        (0.0, 0.0, 15, 1.0, True),
        (0.1, 0.0, 3, 2 * 0.5**4, False),
        (0.0, 0.1, 15, 1.0, False),
        (0.01, 0.01, 15, 0.333, True),
    ],
)
def test_p_and_equivalence_by_hand(mean, error, freedom, p, same):
    # .01 +- .01: t = 1 with 15 degrees of freedom, p = .333; 90 % of it reaches to .01 + 1.753 * .01 < .05.
    assert verdicts.two_sided(mean, error, freedom) == pytest.approx(p, abs=1e-3)
    assert verdicts.same(mean, error, freedom) is same


def test_agents_of_different_seeds_are_different_units_and_simple_problems_are_no_part():
    # Two seeds of one agent each, two families: in `standard` P rises by .1 and .3 in seed 0, by .3 and .5 in seed 1.
    rises = {("f", 0): 0.1, ("g", 0): 0.3, ("f", 1): 0.3, ("g", 1): 0.5}
    rows = [
        {"scenario": "tool_use", "model": "m", "arm": "base", "condition": condition, "seed": seed, "agent": 0,
         "item": f"{kind}-{family}", "environment": family, "round": number, "valid": True, "choice": "direct",
         "deviated": True, "correct": True, "reward": -1.0, "mass": 1.0,
         "p_deviate": 0.2 + (number - 1) * rise * (condition == "standard") if kind == "complex" else None}
        for (family, seed), rise in rises.items() for kind in ("complex", "simple")
        for condition in ("standard", "equal_payoffs") for number in (1, 2)
    ]  # fmt: skip
    decisions = pd.DataFrame(rows).astype({"item": "string", "deviated": "boolean", "correct": "boolean"})
    [row] = verdicts.contrast(decisions).itertuples()
    # Mean .3. Families' sums of residuals over 4: -+.05, variance 2 * 2 * .05^2 = .01, agents' the same; crossing:
    # 4/3 * 2 * .05^2 = .00667. In all .01333; t(1) = 12.706.
    half = 12.706 * math.sqrt(0.02 - 4 / 3 * 0.005)
    assert (row.contrast, row.low, row.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-3)


def test_trainings_are_units_beside_environments():
    # The same four rises, of two environments in two trainings of one arm: the interval is the one above.
    rises = {("e", 0): 0.1, ("f", 0): 0.3, ("e", 1): 0.3, ("f", 1): 0.5}
    rows = [
        {"scenario": "role_play", "model": "m", "arm": "dpo", "condition": condition, "seed": 0, "training_seed": seed,
         "environment": environment, "item": environment, "round": number, "valid": True, "deviated": True, "mass": 1.0,
         "p_deviate": 0.2 + (number - 1) * rise * (condition == "standard")}
        for (environment, seed), rise in rises.items()
        for condition in ("standard", "equal_payoffs") for number in (1, 2)
    ]  # fmt: skip
    decisions = pd.DataFrame(rows)
    half = 12.706 * math.sqrt(0.02 - 4 / 3 * 0.005)
    [row] = verdicts.contrast(decisions).itertuples()
    assert (row.contrast, row.low, row.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-3)
    # One training more of one condition alone: what both have is compared, unit by unit.
    lonely = decisions[(decisions["condition"] != "equal_payoffs") | (decisions["training_seed"] == 0)]
    [row] = verdicts.contrast(lonely).itertuples()
    assert row.contrast == pytest.approx(0.2)
    # The base has one training, which both of the arm's are compared with: P in round 1 is .2 against .6 and .8.
    base = decisions[decisions["training_seed"] == 0].assign(arm="base", p_deviate=lambda rows: rows["p_deviate"] + 0.4)
    base.loc[base["environment"] == "f", "p_deviate"] += 0.2
    both = pd.concat([base, decisions])[lambda rows: rows["condition"] == "standard"]
    [row] = stats.benefit_table(both, "p_deviate").itertuples()
    assert row.benefit == pytest.approx(-0.5)
    [row] = verdicts.erosion(both).itertuples()
    assert row.erosion == pytest.approx(0.3 / 0.5)
