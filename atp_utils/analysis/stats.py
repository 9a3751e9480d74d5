"""Rates and their intervals. The unit that is resampled is the environment, not the row.

Decisions within an environment share a persona, a rule and often a history; resampling rows would treat them
as independent and print intervals that are too narrow.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap

ARMS = ("base", "dpo", "grpo")


def cluster_interval(
    totals: Sequence[float], counts: Sequence[float], *, proportion: bool = True, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of ``sum(totals) / sum(counts)``, resampling clusters.

    ``totals[i]`` and ``counts[i]`` belong to cluster i. Where every cluster of a ``proportion`` has the rate 0, or
    every one 1, resampling can't vary; there the exact (Clopper-Pearson) interval with clusters as trials is
    given. Fewer than two clusters with data, or others than proportions that are all equal, have no interval:
    (nan, nan).
    """
    totals, counts = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    totals, counts = totals[counts > 0], counts[counts > 0]
    if len(counts) < 2:
        return float("nan"), float("nan")
    if proportion and (np.allclose(totals, 0) or np.allclose(totals, counts)):
        exact = binomtest(len(counts) if totals.any() else 0, len(counts)).proportion_ci()
        return float(exact.low), float(exact.high)
    if np.ptp(totals / counts) == 0 and not proportion:
        return float("nan"), float("nan")
    done = bootstrap(
        (totals, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return float(done.confidence_interval.low), float(done.confidence_interval.high)


def rate_table(
    decisions: pd.DataFrame,
    value: str = "deviated",
    by: Sequence[str] = ("model", "arm", "round"),
    cluster: str = "environment",
) -> pd.DataFrame:
    """Mean of ``value`` by group, with what is needed to judge it.

    Columns: ``by``, then n (valid decisions with a value), invalid (share of all decisions), rate, low, high
    (95 %, `cluster_interval`). Invalid decisions are in no rate's numerator or denominator.
    """
    rows = []
    for key, group in decisions.groupby(list(by), sort=True, observed=True):
        valid = group[group["valid"] & group[value].notna()]
        clusters = valid.groupby(cluster)[value].agg(["sum", "count"]).astype(float)
        low, high = cluster_interval(clusters["sum"], clusters["count"])
        rate = clusters["sum"].sum() / clusters["count"].sum() if len(valid) else float("nan")
        rows.append(
            (*key, len(valid), float((~group["valid"]).mean()), float(rate), low, high),
        )
    return pd.DataFrame(rows, columns=[*by, "n", "invalid", "rate", "low", "high"])


def drift_table(decisions: pd.DataFrame, value: str = "deviated", cluster: str = "environment") -> pd.DataFrame:
    """Last round's rate minus the first's by model and arm, with a 95 % interval paired by cluster.

    This is the change that the paper reads off Table 1: positive means more violations after experience than before
    it. Columns: model, arm, drift, low, high; NaN where an arm has one round only or no cluster with both.
    """
    keys, rows = ["model", "arm"], []
    for key, group in decisions.groupby(keys, sort=True, observed=True):
        means = _cluster_means(group, value, ["round"], cluster).unstack("round")
        first, last = group["round"].min(), group["round"].max()
        known = first < last and {first, last} <= set(means.columns)
        rows.append((*key, *_mean_change(means[last] - means[first] if known else [])))
    return pd.DataFrame(rows, columns=[*keys, "drift", "low", "high"])


def benefit_table(decisions: pd.DataFrame, value: str = "deviated", cluster: str = "environment") -> pd.DataFrame:
    """Round-1 rate of each aligned arm minus the base's, with a 95 % interval paired by cluster.

    Negative means that training made the agent keep the rule more often. Columns: model, arm, benefit, low, high; NaN
    where no cluster has both. A model without a base arm has no rows.
    """
    rows = []
    for model, group in decisions[decisions["round"] == decisions["round"].min()].groupby("model", observed=True):
        means = _cluster_means(group, value, ["arm"], cluster).unstack("arm")
        arms = set(group["arm"])
        for arm in sorted(arms - {"base"}) if "base" in arms else []:
            known = {arm, "base"} <= set(means.columns)
            rows.append((model, arm, *_mean_change(means[arm] - means["base"] if known else [])))
    return pd.DataFrame(rows, columns=["model", "arm", "benefit", "low", "high"])


def _cluster_means(decisions: pd.DataFrame, value: str, keys: list[str], cluster: str) -> pd.Series:
    valid = decisions[decisions["valid"]]
    return valid.groupby([*keys, cluster], observed=True)[value].mean().astype(float)


def _mean_change(changes: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the changes that are known, with its interval over clusters."""
    known = pd.Series(changes, dtype=float).dropna()
    return float(known.mean()), *cluster_interval(known, np.ones(len(known)), proportion=False)


def percent(rate: float, low: float | None = None, high: float | None = None) -> str:
    """``42.2`` or ``42.2 [33.1, 51.6]`` from fractions, without a sign at 0; an en dash where there is no value."""
    if pd.isna(rate):
        return "–"
    text = f"{100 * rate:z.1f}"
    return text if low is None or pd.isna(low) else f"{text} [{100 * low:z.1f}, {100 * high:z.1f}]"


def by_round(cells: pd.DataFrame, index: Sequence[str], values: str = "cell") -> pd.DataFrame:
    """One row an ``index``, one column ``r=N`` a round in the rounds' order; an en dash where a round has no value."""
    wide = cells.pivot(index=list(index), columns="round", values=values)
    wide = wide.rename(columns="r={}".format).rename_axis(columns=None)
    return wide.astype(object).where(wide.notna(), "–") if wide.isna().to_numpy().any() else wide


def round_columns(table: pd.DataFrame, by: Sequence[str] = ("model", "arm")) -> pd.DataFrame:
    """A `rate_table` in the paper's layout: one row a ``by``, ``rate [low, high]`` a round, in percent."""
    cells = [percent(*row) for row in table[["rate", "low", "high"]].itertuples(index=False)]
    wide = by_round(table.assign(cell=cells), by)
    facts = table.groupby(list(by)).agg(n=("n", "min"), invalid=("invalid", "mean"))
    wide.insert(0, "n a round", facts["n"])
    wide.insert(1, "invalid %", (100 * facts["invalid"].astype(float)).round(1))
    return wide
