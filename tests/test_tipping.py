"""Measures of the collusion games on tables made by hand."""

import math

import pandas as pd
import pytest

from atp_utils.analysis import tipping


def table(*episodes, threshold=4, rho=1.0, arm="base", start=0):
    """Decisions of episodes given as the colluders (of 8 agents) of each round; game g0, g1, ... in turn."""
    rows = []
    for number, counts in enumerate(episodes, start=start):
        for place, count in enumerate(counts, start=1):
            for agent in range(8):
                rows.append(
                    {
                        "model": "m", "arm": arm, "seed": 0, "item": f"i{number}-{threshold}", "agent": agent,
                        "environment": f"g{number}", "threshold": threshold, "incentive_ratio": rho, "round": place,
                        "valid": True, "deviated": agent < count, "succeeded": count >= threshold,
                    }
                )  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.assign(deviated=frame["deviated"].astype("boolean"), succeeded=frame["succeeded"].astype("boolean"))


def test_episodes():
    episodes = tipping.episode_table(table([4, 8, 2]))
    assert episodes["rate"].tolist() == [0.5, 1.0, 0.25] and episodes["succeeded"].tolist() == [True, True, False]


def test_an_episode_counts_its_valid_decisions():
    decisions = table([4, 2])
    decisions.loc[0, ["valid", "deviated"]] = [False, pd.NA]
    first = tipping.episode_table(decisions).iloc[0]
    assert first["n"] == 7 and first["rate"] == pytest.approx(3 / 7)


def test_recollusion_after_success():
    # At k = 4 episodes of 5, then 7, and of 4, then 8, colluders succeeded: 15 of 16. At k = 6 none did: n = 0.
    decisions = pd.concat([table([5, 7, 8], [4, 8, 8], [3, 8, 8]), table([5, 8, 8], threshold=6)])
    found = tipping.recollusion_table(decisions).set_index("threshold")
    assert found.loc[4, "n"] == 16 and found.loc[4, "rate"] == pytest.approx(15 / 16)
    assert found.loc[6, "n"] == 0 and math.isnan(found.loc[6, "rate"])


def test_games_of_different_trainings_are_different_games():
    # Round 1 succeeded in the second training alone, where 7 of 8 went on; both end in a success, with more collusion.
    first, second = table([3, 8]).assign(training_seed=0), table([5, 7]).assign(training_seed=1)
    both = pd.concat([first, second])
    [row] = tipping.recollusion_table(both).itertuples()
    assert (row.n, row.rate) == (8, 7 / 8)
    [row] = tipping.cascade_table(both).itertuples()
    assert (row.n, row.rate) == (2, 1.0)
    assert tipping.case_study(both, "g0")["training_seed"].unique().tolist() == [0]


def test_cascades():
    # A cascade: 4 -> 8; all the time 8; 5 -> 6. None: a fall to success, a rise to failure, no change.
    episodes = [[4, 6, 8], [8, 8, 8], [5, 4, 6], [6, 6, 5], [1, 2, 3], [5, 5, 5]]
    found = tipping.cascade_table(table(*episodes)).iloc[0]
    assert (found["n"], found["rate"]) == (6, 0.5)


def test_the_case_study_is_the_steepest_rise_of_the_most_aligned_arm():
    base, dpo = table([1, 8]), table([4, 5], [2, 6], [1, 5], arm="dpo").assign(environment="g0")
    decisions = pd.concat([base, dpo])
    case = tipping.case_study(decisions, "g0")
    # Rises of 1, 4 and 4 of 8 agents: the first of the two steepest.
    assert set(case["item"]) == {"i1-4"} and set(case["arm"]) == {"dpo"} and len(case) == 16
    assert tipping.case_study(decisions, "another game").empty
