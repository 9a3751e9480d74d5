"""Tables of the paper, ours beside the published ones."""

from pathlib import Path

import pandas as pd

from atp_utils import resolve, stats, tipping

PAPER = Path("data/paper")


def paper_table1() -> pd.DataFrame:
    """The published Table 1 in tidy form: model, arm, round, rate (a fraction)."""
    table = pd.read_csv(resolve(PAPER / "table1_role_play.csv")).rename(columns={"method": "arm"})
    return table.assign(rate=table.pop("violation_rate_pct") / 100)


def _points(table: pd.DataFrame, column: str) -> pd.Series:
    cells = [stats.percent(*row) for row in table[[column, "low", "high"]].itertuples(index=False)]
    return pd.Series(cells, index=pd.MultiIndex.from_frame(table[["model", "arm"]]))


def drift(decisions: pd.DataFrame) -> pd.DataFrame:
    """Last minus first round in percentage points, of the sampled rate and of P(deviate) where recorded."""
    columns = {"violation rate": _points(stats.drift_table(decisions), "drift")}
    if decisions["p_deviate"].notna().any():
        columns["P(deviate)"] = _points(stats.drift_table(decisions, "p_deviate"), "drift")
    return pd.DataFrame(columns)


def benefit(decisions: pd.DataFrame) -> pd.DataFrame:
    """Aligned arms minus base in round 1, in percentage points, paired by environment."""
    columns = {"violation rate": _points(stats.benefit_table(decisions), "benefit")}
    if decisions["p_deviate"].notna().any():
        columns["P(deviate)"] = _points(stats.benefit_table(decisions, "p_deviate"), "benefit")
    return pd.DataFrame(columns)


def effect(decisions: pd.DataFrame) -> pd.DataFrame:
    """Effect of a first success on the next collusion rate, in percentage points (`tipping.success_effect`)."""
    table = tipping.success_effect(decisions)
    index = pd.MultiIndex.from_frame(table[["model", "arm"]])
    return pd.DataFrame({"games": table["games"].to_numpy(), "effect": _points(table, "effect")}, index=index)
