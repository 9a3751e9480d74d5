"""Measures of the collusion games (Section 3.2): collusion after success, cascades, the case study.

They describe; none of them tells imitation from agents that would have chosen the same without seeing each other.
"""

import numpy as np
import pandas as pd

from atp_utils.analysis.stats import ARMS, repetitions


def at_ratio_one(games: pd.DataFrame) -> pd.DataFrame:
    """The ``games`` (one or more) at the paper's incentive ratio of 1, or the nearest that was played."""
    ratio = min(sorted(games["incentive_ratio"].unique()), key=lambda ratio: abs(np.log(ratio)))
    return games[games["incentive_ratio"] == ratio]


def episode_table(decisions: pd.DataFrame) -> pd.DataFrame:
    """Collusion by episode and round: one row a (model, arm, training_seed, seed, item, round).

    Columns besides these: environment, threshold, incentive_ratio, n (valid decisions), rate (share of them that
    collude; NaN for n = 0) and succeeded.
    """
    game = ["item", "environment", "threshold", "incentive_ratio", "round"]
    keys = ["model", "arm", *repetitions(decisions), *game]
    groups = decisions.groupby(keys, observed=True)
    table = groups.agg(n=("valid", "sum"), rate=("deviated", "mean"), succeeded=("succeeded", "first"))
    return table.reset_index().astype({"rate": float, "n": int, "succeeded": bool})


def recollusion_table(decisions: pd.DataFrame) -> pd.DataFrame:
    """P(an agent colludes in round 2 | round 1 succeeded), by model, arm, threshold and incentive ratio (Figure 4).

    Columns: these, n (valid round-2 decisions after a success; 0 where no episode succeeded) and rate (NaN there).
    """
    cells = ["model", "arm", "threshold", "incentive_ratio"]
    table = after_success(decisions).groupby(cells, observed=True)["deviated"].agg(n="count", rate="mean")
    return table.reset_index().astype({"n": int, "rate": float})


def after_success(decisions: pd.DataFrame) -> pd.DataFrame:
    """The decisions of round 2, ``deviated`` missing where they aren't valid or round 1 didn't succeed."""
    keys = ["model", "arm", *repetitions(decisions), "item"]
    first = decisions[decisions["round"] == 1].groupby(keys, observed=True)["succeeded"].first().rename("won")
    second = decisions[decisions["round"] == 2].join(first, on=keys)
    return second.assign(deviated=second["deviated"].where(second["valid"] & second["won"].astype(bool)))


def cascade_table(decisions: pd.DataFrame) -> pd.DataFrame:
    """Cascade probability by setting: the share of episodes that end in a success with more collusion than they began.

    An episode in which everyone colludes from the first round to the last counts as a cascade too. Columns: model,
    arm, threshold, incentive_ratio, n (episodes), rate.
    """
    table = episode_table(decisions).sort_values("round")
    keys = ["model", "arm", "threshold", "incentive_ratio", *repetitions(table), "item"]
    ends = table.groupby(keys, observed=True).agg(
        first=("rate", "first"), last=("rate", "last"), lowest=("rate", "min"), won=("succeeded", "last")
    )
    cascade = ends["won"] & ((ends["last"] > ends["first"]) | (ends["lowest"] == 1))
    return cascade.groupby(keys[:4], observed=True).agg(n="count", rate="mean").reset_index()


def case_study(decisions: pd.DataFrame, environment: str) -> pd.DataFrame:
    """The decisions of one episode of ``environment``, picked by a rule: the one whose collusion rate rose most.

    Only episodes of the most aligned arm that played it count (GRPO before DPO before base, as in Figure 5). Ties go
    to the first by seeds, then item, then model. Empty where the environment was not played.
    """
    own = decisions[decisions["environment"] == environment]
    if own.empty:
        return own
    own = own[own["arm"] == max(own["arm"].unique(), key=ARMS.index)]
    keys = [*repetitions(own), "item", "model"]
    table = episode_table(own).sort_values("round")
    rises = table.groupby(keys, observed=True)["rate"].agg(lambda rate: rate.iloc[-1] - rate.iloc[0])
    # An episode without a valid decision at either end is behind all others.
    picked = rises.index[int(np.argmax(rises.fillna(-2)))]
    same = (own[keys] == list(picked)).all(axis=1)
    return own[same].sort_values(["round", "agent"])
