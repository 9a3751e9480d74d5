"""The paper's claims beside runs whose outcome is known."""

import pandas as pd
import pytest

from atp_utils.analysis import scoreboard

ENVIRONMENTS = "abcdefgh"


def table_of(rows, scenario="role_play", **facts):
    """Decisions from (arm, environment, round, P(deviate))."""
    table = pd.DataFrame(rows, columns=["arm", "environment", "round", "p_deviate"])
    return table.assign(
        **{"scenario": scenario, "model": "m", "condition": "standard", "training_seed": 0, "seed": 0, "valid": True,
           "item": table["environment"], "deviated": table["p_deviate"] > 0.5, "threshold": None} | facts
    ).astype({"p_deviate": "Float64"})  # fmt: skip


def status_of(decisions, item, claim):
    rows = scoreboard.scores(decisions).set_index(["item", "claim"]).loc[(item, claim)]
    return rows["status"], rows["estimate"]


@pytest.mark.parametrize(
    ("drift", "spread", "status"),
    [
        (0.20, 0.06, "reproduced"),  # the paper's 15.6 and 23.4 points are within 20 +- 5 or so
        (0.60, 0.02, "direction only"),
        (0.01, 0.10, "not reproduced"),
        (-0.30, 0.02, "not reproduced"),
    ],
)
def test_a_drift_is_held_against_the_papers(drift, spread, status):
    rows = []
    for place, name in enumerate(ENVIRONMENTS):
        moved = drift + spread * (1 if place % 2 else -1)
        rows += [("base", name, 1, 0.35), ("base", name, 6, 0.35 + moved)]
    found, estimate = status_of(table_of(rows), "Table 1", "violations of base climb, round 1 to 6")
    assert found == status and estimate == pytest.approx(drift)


@pytest.mark.parametrize("environments", ["a", "ab"])
def test_what_was_not_run_and_what_has_few_units_say_so(environments):
    decisions = table_of([row for name in environments for row in (("base", name, 1, 0.4), ("base", name, 6, 0.6))])
    assert status_of(decisions, "Table 1", "violations of base climb, round 1 to 6")[0] == "too few units"
    assert status_of(decisions, "Table 1", "DPO begins below base")[0] == "not run"
    assert status_of(decisions, "Figure 3", "collusion of base climbs at k = 2, 4")[0] == "not run"


def test_an_arm_that_begins_lower():
    rows = [(arm, name, 1, (0.5 if arm == "base" else 0.35) + 0.01 * place)
            for arm in ("base", "dpo") for place, name in enumerate(ENVIRONMENTS)]  # fmt: skip
    shaken = table_of(rows).assign(p_deviate=lambda table: table["p_deviate"] + 0.02 * (table.index == 3))
    found, estimate = status_of(shaken, "Table 1", "DPO begins below base")
    # .35 - .5, and .02 less in one of eight environments; the paper has -.125.
    assert found == "direction only" and estimate == pytest.approx(-0.1525)


def test_thresholds_are_judged_apart():
    rows, facts = [], {"scenario": "collusion"}
    parts = []
    for threshold, sign in ((2, 1), (8, -1)):
        rows = [("base", name, number, 0.5 + (sign * (0.2 + 0.01 * place) if number == 3 else 0))
                for place, name in enumerate(ENVIRONMENTS) for number in (1, 3)]  # fmt: skip
        parts.append(table_of(rows, **facts, threshold=threshold, incentive_ratio=1.0, succeeded=True, agent=0))
    decisions = pd.concat(parts, ignore_index=True)
    assert status_of(decisions, "Figure 3", "collusion of base climbs at k = 2, 4")[0] == "reproduced"
    assert status_of(decisions, "Figure 3", "collusion of base falls at k = 6, 8")[0] == "reproduced"


def test_a_part_of_the_thresholds_is_named():
    rows = [("base", name, number, 0.5 + (0.2 + 0.01 * place) * (number == 3))
            for place, name in enumerate(ENVIRONMENTS) for number in (1, 3)]  # fmt: skip
    games = {k: table_of(rows, "collusion", threshold=k, incentive_ratio=1.0, succeeded=True, agent=0) for k in (2, 4)}
    claim = ("Figure 3", "collusion of base climbs at k = 2, 4")
    # Thresholds that another arm played are no part of it.
    for played, part in (([games[4], games[2].assign(arm="dpo")], "k = 4 only"), (list(games.values()), "")):
        table = scoreboard.scores(pd.concat(played, ignore_index=True))
        row = table.set_index(["item", "claim"]).loc[claim]
        assert row[["status", "part"]].tolist() == ["reproduced", part]
        cell = scoreboard.shown(table).loc[claim, "m"]
        assert cell.endswith("n=8 reproduced" + (" (k = 4 only)" if part else ""))
    assert set(table["part"]) == {""}


def test_colluding_again_counts_rounds_after_a_success_only():
    rows, won = [], []
    for place, name in enumerate(ENVIRONMENTS):
        rows += [("base", name, 1, 0.9), ("base", name, 2, 0.9 if place < 7 else 0.1)]
        won += [place < 7] * 2
    decisions = table_of(rows, "collusion", threshold=4, incentive_ratio=1.0, agent=0).assign(succeeded=won)
    rows = scoreboard.scores(decisions).query("item == 'Figure 4'").set_index("claim")
    row = rows.loc["base colludes again after a success in more than 75%"]
    # All seven that succeeded collude again; the eighth game didn't succeed.
    assert row["estimate"] == pytest.approx(0.25) and row["n"] == 7


def test_the_table_has_a_row_a_claim_in_the_papers_order():
    shown = scoreboard.shown(scoreboard.scores(table_of([("base", name, 1, 0.4) for name in ENVIRONMENTS])))
    assert len(shown) == len(list(scoreboard.claims())) and shown.columns.tolist() == ["paper", "m"]
    assert list(dict.fromkeys(shown.index.get_level_values("item"))) == ["Table 1", "Table 2", "Figure 3", "Figure 4"]
    assert shown.loc[("Table 1", "DPO begins below base"), "paper"] == "-31.2 and -12.5"
