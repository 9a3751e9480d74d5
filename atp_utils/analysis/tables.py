"""Tables of the paper, ours beside the published ones; each row carries its model."""

from pathlib import Path

import pandas as pd

from atp_utils import resolve
from atp_utils.analysis import stats

PAPER = Path("data/paper")


def paper_table1() -> pd.DataFrame:
    """The published Table 1 in tidy form: model, arm, round, rate (a fraction)."""
    table = pd.read_csv(resolve(PAPER / "table1_role_play.csv")).rename(columns={"method": "arm"})
    return table.assign(rate=table.pop("violation_rate_pct") / 100)


def paper_columns() -> pd.DataFrame:
    """The published Table 1 in the paper's layout, in percent."""
    return stats.by_round(paper_table1(), ["model", "arm"], "rate").mul(100).round(1)


def drift(decisions: pd.DataFrame) -> pd.DataFrame:
    """Last minus first round in percentage points, of the sampled rate and of P(deviate) where recorded."""
    return _changes(decisions, stats.drift_table, "drift")


def benefit(decisions: pd.DataFrame) -> pd.DataFrame:
    """Aligned arms minus base in round 1, in percentage points, paired by environment."""
    return _changes(decisions, stats.benefit_table, "benefit")


def _changes(decisions: pd.DataFrame, table, name: str) -> pd.DataFrame:
    columns = {"violation rate": _points(table(decisions), name)}
    if decisions["p_deviate"].notna().any():
        columns["P(deviate)"] = _points(table(decisions, "p_deviate"), name)
    return pd.DataFrame(columns)


def _points(table: pd.DataFrame, column: str) -> pd.Series:
    cells = [stats.percent(*row) for row in table[[column, "low", "high"]].itertuples(index=False)]
    return pd.Series(cells, index=pd.MultiIndex.from_frame(table[["model", "arm"]]), dtype=object)


def collusion(games: pd.DataFrame) -> pd.DataFrame:
    """Collusion rate by model, arm and threshold, over all payoffs of the run; one column a round, in percent."""
    keys = ("model", "arm", "threshold")
    return stats.round_columns(stats.rate_table(games, by=(*keys, "round")), keys)


def largest_differences(games: pd.DataFrame) -> pd.DataFrame:
    """Largest minus smallest mean collusion rate over the thresholds, and over the incentive ratios, in points."""
    valid, keys = games[games["valid"]], ["model", "arm", "round"]
    columns = {}
    for factor in ("threshold", "incentive_ratio"):
        means = valid.groupby([*keys, factor], observed=True)["deviated"].mean().astype(float)
        ends = means.groupby(level=keys).agg(["min", "max"])
        columns[factor] = (ends["max"] - ends["min"]).mul(100).round(1)
    return pd.DataFrame(columns)
