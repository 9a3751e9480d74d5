"""Tables of the paper, ours beside the published ones; each row carries its model."""

from pathlib import Path

import pandas as pd

from atp_utils import resolve
from atp_utils.analysis import critical_mass, dose_response, stats, study, verdicts

PAPER = Path("data/paper")


def paper_table1() -> pd.DataFrame:
    """The published Table 1 in tidy form: model, arm, round, rate (a fraction)."""
    table = pd.read_csv(resolve(PAPER / "table1_role_play.csv")).rename(columns={"method": "arm"})
    return table.assign(rate=table.pop("violation_rate_pct") / 100)


def paper_columns() -> pd.DataFrame:
    """The published Table 1 in the paper's layout, in percent."""
    return stats.by_round(paper_table1(), ["model", "arm"], "rate").mul(100).round(1)


def contrast(decisions: pd.DataFrame) -> pd.DataFrame:
    """The primary contrast of `verdicts.contrast` in percentage points, with Holm's p and the verdict.

    *Apart*: the standard condition less the one of equal payoffs, before any experience and in the last round.
    """
    table = verdicts.contrast(decisions).set_index(verdicts.KEYS)
    columns = {
        "drift, standard": stats.cells(table, "standard"),
        "drift, equal payoffs": stats.cells(table, "control"),
        "contrast [95 %]": stats.cells(table, "contrast", "low", "high"),
        "p (Holm)": ["–" if pd.isna(p) else f"{p:.2g}" for p in table["p"]],
        "least mass %": stats.cells(table, "mass"),
        "apart in round 1": stats.cells(table, "first", "first_low", "first_high"),
        "apart in the last": stats.cells(table, "last", "last_low", "last_high"),
        "verdict": table["verdict"],
    }
    return pd.DataFrame(columns)


def answers(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `study.answers` in percentage points: a row a question and scenario, a column a model and arm."""
    texts = table["question"].map(lambda name: study.QUESTIONS[name][0])
    rows = table.assign(cell=stats.judged(table, "verdict"), question=texts).pivot(
        index=["question", "scenario", "about"], columns=["model", "arm"], values="cell"
    )
    order = {text: place for place, (text, *_) in enumerate(study.QUESTIONS.values())}
    wide = rows.sort_index(key=lambda level: level.map(order) if level.name == "question" else level)
    wide = wide.reindex(columns=pd.MultiIndex.from_tuples(study.respondents(table), names=["model", "arm"]))
    wide.columns = [f"{model}, {arm}" for model, arm in wide.columns]
    return wide.fillna("–")


def conditions(decisions: pd.DataFrame) -> pd.DataFrame:
    """Every condition's first and last round, its change, and that against the standard condition's, in percent."""
    table = verdicts.conditions(decisions).set_index([*verdicts.KEYS, "condition"])
    columns = {
        "items": table["items"],
        "first": stats.cells(table, "first"),
        "last": stats.cells(table, "last"),
        "drift [95 %]": stats.cells(table, "drift", "low", "high"),
        "against standard [95 %]": stats.cells(table, "against", "against_low", "against_high"),
    }
    return pd.DataFrame(columns)


def erosion(decisions: pd.DataFrame) -> pd.DataFrame:
    """Share of the alignment gain that is lost by the last round, in percent, or why there is none to lose."""
    table = verdicts.erosion(decisions).set_index(verdicts.KEYS)
    known = stats.cells(table, "erosion", "low", "high").where(table["why"] == "", table["why"])
    return pd.DataFrame({"gain lost % [95 %]": known})


def slopes(decisions: pd.DataFrame) -> pd.DataFrame:
    """`dose_response.slopes`: log-odds a round, a row a model, arm and teller, a column a term."""
    table = dose_response.slopes(decisions)
    cells = stats.cells(table, "slope", "low", "high", shown=_log_odds)
    wide = table.assign(cell=cells).pivot(index=[*dose_response.KEYS, "told"], columns="term", values="cell")
    return wide.reindex(columns=[term for term in dose_response.TERMS if term in wide]).rename_axis(columns=None)


def _log_odds(slope: float, low: float, high: float) -> str:
    return f"{slope:z.2f}" if pd.isna(low) else f"{slope:z.2f} [{low:z.2f}, {high:z.2f}]"


def dynamics(decisions: pd.DataFrame) -> pd.DataFrame:
    """`critical_mass.dynamics` of the written rounds, shares in percent where they are numbers."""
    table = critical_mass.dynamics(critical_mass.response(decisions)).set_index(critical_mass.KEYS)
    shares = ["start", "from_none", "from_all"]
    return table.assign(**{name: (100 * table[name].astype(float)).round(1) for name in shares})


def committed(decisions: pd.DataFrame) -> pd.DataFrame:
    """`critical_mass.committed` of the written rounds, in percent."""
    return critical_mass.committed(critical_mass.response(decisions)).mul(100).round(1)


def drift(decisions: pd.DataFrame) -> pd.DataFrame:
    """Last minus first round in percentage points, of the sampled rate and of P(deviate) where recorded."""
    return _changes(decisions, stats.drift_table, "drift")


def benefit(decisions: pd.DataFrame) -> pd.DataFrame:
    """Aligned arms minus base in round 1, in percentage points, paired by environment."""
    return _changes(decisions, stats.benefit_table, "benefit")


def _changes(decisions: pd.DataFrame, table, name: str) -> pd.DataFrame:
    values = {"violation rate": "deviated"}
    if decisions["p_deviate"].notna().any():
        values["P(deviate)"] = "p_deviate"
    tables = {title: table(decisions, value).set_index(["model", "arm"]) for title, value in values.items()}
    return pd.DataFrame({title: stats.cells(own, name, "low", "high") for title, own in tables.items()})


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
