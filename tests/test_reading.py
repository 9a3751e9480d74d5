"""The sentences below the figures, against numbers worked out by hand."""

import pandas as pd
import pytest

from atp_utils.analysis import gallery, reading, scoreboard, study  # noqa: F401  gallery registers the figures
from atp_utils.analysis.drawing import FIGURES

NAN = float("nan")


def lived(rows, **facts):
    """Role-play decisions from (arm, environment, round, P(deviate))."""
    table = pd.DataFrame(rows, columns=["arm", "environment", "round", "p_deviate"])
    given = {"scenario": "role_play", "condition": "standard", "model": "m", "valid": True, "deviated": True, "seed": 0,
             "agent": 0, "training_seed": 0, "p_first": None, "mass": 1.0, "told": None, "payoff_ratio": None,
             "past_compliant": None, "past_deviant": None, "past_others": None}  # fmt: skip
    return table.assign(item=table["environment"], **(given | facts)).astype({"p_deviate": "Float64"})


def climbing(arm="base"):
    """Four environments that climb from .2 by .1, .2, .3 and .4."""
    return [
        (arm, name, number, 0.2 + (number == 2) * rise)
        for name, rise in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)
        for number in (1, 2)
    ]


def test_a_figure_without_a_reading_of_its_own_is_read_by_its_rounds(monkeypatch):
    monkeypatch.delitem(reading.READINGS, "role_play_environments")
    assert "+25.0 points [4.5, 45.5], above 0" in reading.read(lived(climbing()), "role_play_environments")


def sentences(figure, table, decisions=None):
    return list(reading.READINGS[figure](decisions, pd.DataFrame(table)))


def test_every_figure_has_a_reading():
    assert set(reading.READINGS) == set(FIGURES)


def test_a_change_and_its_interval():
    [said] = reading.changes(lived(climbing()))
    # Residuals of -.15, -.05, .05, .15 make a standard error of .0645; t with 3 degrees of freedom is 3.182.
    assert said.startswith("base: P(deviate) is 20.0 %") and said.endswith("+25.0 points [4.5, 45.5], above 0")
    assert "45.0 % [" in said and "round 2" in said


def test_an_interval_that_holds_0_is_said_to():
    rows = [("base", name, number, 0.5 + (number == 2) * rise) for name, rise in (("a", 0.1), ("b", -0.1), ("c", 0.0))
            for number in (1, 2)]  # fmt: skip
    [said] = reading.changes(lived(rows))
    assert "+0.0 points [" in said and said.endswith("holds 0")
    [falls] = reading.changes(lived([(arm, name, 3 - number, p) for arm, name, number, p in climbing()]))
    assert falls.endswith("-25.0 points [-45.5, -4.5], below 0")


def test_one_environment_one_round_and_no_valid_decision():
    [alone] = reading.changes(lived(climbing()[:2]))
    assert alone.endswith("+10.0 points without an interval, too few units")
    [first] = reading.changes(lived([row for row in climbing() if row[2] == 1]))
    assert "round 1" in first and "points" not in first
    assert list(reading.changes(lived(climbing(), valid=False))) == ["base: no valid decision"]


def test_a_figure_is_read_for_every_model_and_arm_that_is_there():
    decisions = pd.concat([lived(climbing()), lived(climbing("dpo")), lived(climbing(), model="n")])
    text = reading.read(decisions, "role_play")
    assert text.count("**m**") == text.count("**n**") == 1 and text.count("- DPO:") == 1 and text.count("- base:") == 2
    assert "Careful" not in text
    assert "Careful, both answers together below 50%: base r=1, 2." in reading.read(
        lived(climbing(), mass=0.1), "role_play"
    )


@pytest.mark.parametrize("figure", sorted(FIGURES))
def test_nothing_recorded(figure):
    assert reading.read(lived(climbing()).iloc[:0], figure) == reading.NOTHING
    assert reading.read(lived(climbing(), condition="caught"), "role_play") == reading.NOTHING


def test_conditions_are_compared_with_the_standard_one():
    caught = lived([(arm, name, number, 0.2) for arm, name, number, _ in climbing()], condition="caught")
    text = reading.read(pd.concat([lived(climbing()), caught]), "conditions")
    assert "- base, standard: +25.0 points [4.5, 45.5], above 0" in text
    assert "- base, caught less standard: -25.0 points [-45.5, -4.5], below 0" in text


def test_environments_are_counted():
    assert "rose in 4 of 4 environments; between +10.0 points (a) and +40.0 (d)" in reading.read(
        lived(climbing()), "role_play_environments"
    )


def answers(*rows):
    table = pd.DataFrame(rows, columns=["question", "model", "arm", "about", "estimate", "low", "high", "verdict"])
    return table.assign(scenario="role_play", n=table["estimate"].notna() * 4, p=0.5)


def test_verdicts_are_those_of_the_study():
    table = answers(
        ("payoff", "m", "base", "", 0.1, 0.05, 0.15, study.SHOWN),
        ("payoff", "m", "dpo", "", 0.02, -0.1, 0.14, study.UNDECIDED),
        ("erosion", "m", "dpo", "", NAN, NAN, NAN, "no gain"),
    )
    text = reading.answered(table, "payoff", "erosion", "dose")
    assert f"*{study.QUESTIONS['payoff'][0]}*\n\n- m, base: +10.0 points [5.0, 15.0], **shown**\n- m, DPO: " in text
    assert "[-10.0, 14.0], **undecided**" in text and "- m, DPO: **no gain**" in text
    assert text.endswith(f"*{study.QUESTIONS['dose'][0]}*\n\n- what it needs has not been run")
    assert "not been run" in reading.answered(table, "payoff", scenario="collusion")
    short = reading.verdicts_in_short(table)
    assert short.startswith("3 answers to 2 questions:") and "1 shown, 1 undecided" in short and "1 no gain" in short
    assert reading.verdicts_in_short(table.iloc[:0]) == reading.NOTHING


def test_a_trend_that_is_shown_is_read_as_shown():
    control = lived([(arm, name, number, 0.2) for arm, name, number, _ in climbing()], condition="equal_payoffs")
    found = study.answers(pd.concat([lived(climbing()), control]))
    assert "- m, base: +25.0 points [4.5, 45.5], **shown**" in reading.answered(found, "payoff")


def test_claims_stand_beside_the_papers_numbers():
    rows = [
        ("Table 1", "it climbs", "m", (0.234, 0.156), 4, 0.25, 0.045, 0.455, scoreboard.REPRODUCED, ""),
        ("Table 1", "it starts low", "m", (), 0, NAN, NAN, NAN, scoreboard.NOT_RUN, ""),
        ("Table 2", "it falls", "m", (), 1, -0.5, NAN, NAN, scoreboard.TOO_FEW, ""),
        ("Figure 3", "it climbs", "m", (), 7, 0.25, 0.045, 0.455, scoreboard.REPRODUCED, "k = 4 only"),
    ]
    names = ["item", "claim", "model", "paper", "n", "estimate", "low", "high", "status", "part"]
    scores = pd.DataFrame(rows, columns=names)
    assert reading.claimed(scores, "Table 1") == (
        "*Table 1*: 1 of 2 claims were run.\n\n"
        "- m, it climbs: +25.0 points [4.5, 45.5] (the paper's: +23.4 and +15.6), **reproduced**"
    )
    assert "-50.0 points without an interval, **too few units**" in reading.claimed(scores, "Table 2")
    assert reading.claimed(scores, "Figure 3").endswith(
        "m, it climbs: +25.0 points [4.5, 45.5], **reproduced** (k = 4 only)"
    )
    assert reading.claimed(scores, "Figure 9").startswith("*Figure 9*: 0 of 0 claims")


def test_success_and_what_comes_after():
    cells = [("base", 2, 1.0, 10, 0.9), ("base", 4, 1.0, 30, 0.5), ("base", 8, 1.0, 0, NAN), ("dpo", 2, 1.0, 0, NAN)]
    base, dpo = sentences(
        "recollusion", [dict(zip(("arm", "threshold", "incentive_ratio", "n", "rate"), c, strict=True)) for c in cells]
    )
    # (9 + 15) of 40 decisions.
    assert base == (
        "base: a first round succeeded in 2 of 3 settings; behind it 60.0 % of 40 decisions collude, between 50.0 % "
        "and 90.0 % by setting; more than 75% in 1 of them"
    )
    assert dpo == "DPO: a first round succeeded in 0 of 1 settings"


def test_spreads_over_a_grid():
    rows = [("m", "base", 1, k, ratio, k == 2) for k in (2, 4) for ratio in (1.0,) for _ in range(2)]
    games = pd.DataFrame(rows, columns=["model", "arm", "round", "threshold", "incentive_ratio", "deviated"])
    [said] = sentences("collusion_grid", [], games.assign(valid=True))
    assert said == "base, round 1: over 2 thresholds rates lie 100.0 points apart; there is one incentive only"


def test_an_episode_is_counted():
    rows = [(1, True, True, 1.2), (1, False, True, 1.2), (2, None, False, 0.8), (2, False, True, 1.0)]
    names = ["round", "deviated", "valid", "capital"]
    played = pd.DataFrame(rows, columns=names).assign(succeeded=[True, True, False, False])
    assert list(reading.episode(played)) == [
        "round 1: 1 of 2 valid choices collude, enough; mean capital 1.20",
        "round 2: 0 of 1 valid choices collude, not enough; mean capital 0.90",
    ]
    assert list(reading.episode(played.assign(succeeded=None))) == []
    assert reading.listed("Seen", iter(())) == reading.NOTHING


def test_survivors_doses_and_sizes():
    ends = {"low": 0.1, "high": 0.5}
    kept = [{"arm": "dpo", "condition": "equal_payoffs", "round": r, "n": 12, "rate": 1 / r, **ends} for r in (1, 4)]
    assert sentences("survival", kept) == [
        "DPO, equal payoffs: of 12 agents that kept the rule in round 1, 25.0 % [10.0, 50.0] kept it up to round 4"
    ]
    doses = [{"arm": "base", "told": told, "payoff_ratio": 2.0, "past_deviant": dose, "rate": 0.2 + dose / 10, **ends}
             for told, dose in (("own", 3), ("own", 0), ("none", 0))]  # fmt: skip
    [said] = sentences("dose", doses)
    assert (
        "own history, deviating pays 2 times: P(deviate) is 20.0 %" in said and "50.0 % [10.0, 50.0] behind 3" in said
    )
    sizes = [{"arm": "base", "agents": 10_000, "start": start, "end": start / 2} for start in (1.0, 0.5, 0.0)]
    assert sentences("group_size", sizes) == [
        "base, 10,000 agents: begun with nobody they end at 0.0 %, with all at 50.0 %"
    ]


def test_a_response_and_its_critical_mass():
    def table(steep):
        ends = {"arm": "base", "threshold": 4, "low": NAN, "high": NAN}
        rates = [0.1] * 4 + [0.9] * 4 if steep else [0.5] * 8
        rows = [{"own": own, "others": n, "rate": rate, **ends} for own in ("abstained", "colluded")
                for n, rate in enumerate(rates)]  # fmt: skip
        return [{"own": "start", "others": 0, "rate": 0.5, **ends}, *rows]

    *lines, flat = sentences("response", table(steep=False))
    assert "had abstained: 50.0 % collude where 0 others did, 50.0 % where 7 did" in lines[0]
    assert flat == "base, k = 4: the mean share settles at 0.50; no critical mass"
    # Between shares of 3/7 and 4/7 the response rises from .1 to .9, by symmetry through 1/2.
    assert sentences("response", table(steep=True))[-1] == (
        "base, k = 4: the mean share settles at 0.10, 0.90; critical masses at 0.50"
    )


def test_a_prediction_beside_what_was_played():
    rows = [(1, 0.5, 0.6, 0.55, 0.65), (2, 0.5, 0.52, 0.4, 0.6), (3, 0.5, 0.5, NAN, NAN)]
    names = ["round", "predicted", "played", "low", "high"]
    [said] = sentences("chain", pd.DataFrame(rows, columns=names).assign(arm="base", threshold=4))
    assert said == (
        "base, k = 4: the prediction lies in 1 of 2 intervals of the rounds played; farthest off in round 1, 50.0 % "
        "against 60.0 % [55.0, 65.0]"
    )


def test_a_training_from_its_first_to_its_last_step():
    log = pd.DataFrame({"step": [1, 3], "loss": [0.6931, 0.5], "dead_groups": [0, 1]})
    assert list(reading.training(log)) == [
        "loss: 0.693 at step 1, 0.5 at step 3",
        "dead groups: 0 at step 1, 1 at step 3",
    ]


def test_points_too_few_for_tenths_are_written_all_the_same():
    assert reading.points(0.054, -0.078, 0.187) == "+5.4 points [-7.8, 18.7]"
    assert reading.points(-0.000133, -0.000178, -0.000088) == "-0.013 points [-0.018, -0.009]"
    assert reading.points(6.8e-7, 1.6e-7, 1.2e-6) == "+7e-05 points [2e-05, 1e-04]"
    assert reading.points(0.0, float("nan"), float("nan")) == "+0.0 points without an interval"
