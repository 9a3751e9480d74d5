"""What a folder of results holds, and what its raw replies tell beyond the decisions."""

import numpy as np
import pandas as pd
from scipy.special import softmax

from atp_utils.analysis import stats
from atp_utils.evolution.requests import Reply


def contents(decisions: pd.DataFrame) -> pd.DataFrame:
    """What was run: by scenario, model and arm the counts of decisions, invalid ones, items, seeds and rounds."""
    groups = decisions.groupby(["scenario", "model", "arm"], observed=True)
    counts = groups.agg(
        decisions=("valid", "size"), valid=("valid", "sum"), items=("item", "nunique"), seeds=("seed", "nunique"),
        rounds=("round", "nunique"), scored=("p_deviate", "count"),
    )  # fmt: skip
    counts.insert(1, "invalid", counts["decisions"] - counts.pop("valid").astype(int))
    return counts.assign(protocol=np.where(counts.pop("scored") > 0, "choose", "reason"))


def scored_options(decisions: pd.DataFrame, replies: dict[str, Reply]) -> pd.DataFrame:
    """The decisions by forced choice whose raw reply is at hand, with how their options stood in the prompt.

    Added columns: ``named_first``, whether the prompt names the deviant option first, and ``mass``, the probability of
    both answers together, on which P(deviate) conditions; decisions made before it was recorded get that of the
    complete answers, not opened. A reply's log-probabilities are in the order of the
    options, so the order is the one that was recorded, whatever the prompts on disk say now. Where both answers are
    equally probable the order can't be told, and P(deviate) is the same for either.
    """
    rows = decisions[decisions["p_deviate"].notna()]
    logprobs = {key: replies[key].logprobs for key in rows["reply"] if key in replies}
    rows = rows[np.array([logprobs.get(key) is not None for key in rows["reply"]], dtype=bool)]
    scores = np.array([logprobs[key] for key in rows["reply"]], dtype=float).reshape(len(rows), 2)
    distance = np.abs(rows[["p_deviate"]].to_numpy(dtype=float) - softmax(scores, axis=1))
    whole = pd.Series(np.exp(scores).sum(axis=1), index=rows.index)
    mass = rows["mass"].astype(float).fillna(whole) if "mass" in rows else whole
    return rows.assign(named_first=distance[:, 0] <= distance[:, 1], mass=mass)


def position_table(decisions: pd.DataFrame, replies: dict[str, Reply]) -> pd.DataFrame:
    """P(deviate) by whether the deviant option is named first or second, and the mass of both answers, in percent.

    One row a model, arm and measure, one column a round. Empty for decisions that were written freely.
    """
    rows = scored_options(decisions, replies)
    parts = []
    for measure, part, value in (
        ("P(deviate), deviant option first", rows[rows["named_first"]], "p_deviate"),
        ("P(deviate), deviant option second", rows[~rows["named_first"]], "p_deviate"),
        ("probability of both answers", rows, "mass"),
    ):
        means = part.groupby(["model", "arm", "round"], observed=True)[value].agg(["mean", "count"]).reset_index()
        parts.append(means.assign(measure=measure, cell=[stats.percent(mean) for mean in means["mean"]]))
    cells = pd.concat(parts, ignore_index=True)
    index = ["model", "arm", "measure"]
    wide = stats.by_round(cells, index)
    wide.insert(0, "n a round", cells.groupby(index)["count"].min())
    return wide
