"""Table 2 of the paper (Section 3.1.2), ours beside the published one: tool usage, accuracy and cost by round and arm.

Problems of one family are alike, and all problems of an agent share one history: intervals take both families and
agents for units (`stats.interval`). A run with a single agent has none.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from atp_utils import resolve
from atp_utils.analysis import stats
from atp_utils.evolution.journal import complete_runs, facts_of, read_table

PAPER = Path("data/paper/table2_tool_use.csv")
GRID = 24  # every published accuracy is a multiple of 1/24, rounded to a whole per cent
KEYS = ("model", "arm", "round")
UNITS = ("environment", "history")
MEASURES = {
    "tool usage": "used",
    "P(tool)": "p_tool",
    "code ran": "tool_used",
    "accuracy": "solved",
    "unanswered": "unanswered",
}


def paper_table2() -> pd.DataFrame:
    """The published Table 2 in tidy form: model, arm, round, and usage and accuracy as fractions.

    ``solved`` is the number of the 24 problems that the accuracy stands for; usage isn't on that grid.
    """
    table = pd.read_csv(resolve(PAPER)).rename(columns={"method": "arm"})
    usage, accuracy = table.pop("tool_usage_pct"), table.pop("complex_accuracy_pct")
    return table.assign(usage=usage / 100, accuracy=accuracy / 100, solved=(accuracy * GRID / 100).round().astype(int))


def problem_table(decisions: pd.DataFrame, kind: str = "complex") -> pd.DataFrame:
    """The tool-use rows of a ``kind`` of problem, with the columns that `MEASURES` names, each True, False or missing.

    history: which agent it is, by its seed and number. Where several trainings are played these agents meet the same
    problems with the same draws in each, base's among them, and so are one unit: trainings are a kind of their own
    beside families and agents (`stats.kinds_of`), in which what one training's agents have in common is counted.
    used: whether the policy was the tool, p_tool: the engine's probability of it (complex problems, ``choose`` only),
    tool_used: whether code ran; these three are missing for invalid decisions. solved and unanswered are known for all:
    what has no marked answer counts as not solved.
    """
    rows = decisions[(decisions["scenario"] == "tool_use") & decisions["item"].str.startswith(f"{kind}-")]
    return rows.assign(
        history=rows["seed"].astype(str) + "-" + rows["agent"].astype(str),
        used=rows["choice"] == "tool",
        p_tool=1 - rows["p_deviate"],
        solved=rows["correct"].fillna(False),
        unanswered=rows["correct"].isna(),
        cost=-rows["reward"].fillna(0),
    )


def rates(decisions: pd.DataFrame, measure: str, kind: str = "complex", by: Sequence[str] = KEYS) -> pd.DataFrame:
    """A measure of `MEASURES` by group, in the form of `stats.rate_table`: n, invalid, rate, low, high.

    Usage is about valid decisions, accuracy about all problems; ``invalid`` is the share of decisions without a policy.
    """
    rows = problem_table(decisions, kind)
    known = MEASURES[measure] in ("solved", "unanswered")
    table = stats.rate_table(rows.assign(valid=True) if known else rows, MEASURES[measure], by, UNITS)
    if known and len(rows):
        share = (~rows["valid"]).groupby([rows[key] for key in by], sort=True, observed=True).mean()
        table["invalid"] = share.astype(float).to_numpy()
    return table


def cost_per_solved(decisions: pd.DataFrame, kind: str = "complex", by: Sequence[str] = KEYS) -> pd.DataFrame:
    """Cost units spent for each problem solved, by group: n (problems), solved, rate, low, high.

    The interval is that of solved problems a unit of cost, turned over, so that families in which nothing was solved
    weigh in; its upper end is infinite where that may be none. Nothing solved: infinite, without an interval.
    """
    table = []
    for key, group in problem_table(decisions, kind).groupby(list(by), sort=True, observed=True):
        solved, cost = group["solved"].sum(), group["cost"].sum()
        low, high = float("nan"), float("nan")
        if solved:
            kinds = (group[unit] for unit in stats.kinds_of(group, UNITS))
            least, most = stats.interval(group["solved"].astype(float), *kinds, weights=group["cost"], proportion=False)
            low, high = 1 / most, float("inf") if least <= 0 else 1 / least
        table.append((*key, len(group), int(solved), cost / solved if solved else float("inf"), low, high))
    return pd.DataFrame(table, columns=[*by, "n", "solved", "rate", "low", "high"])


def units(rate: float, low: float, high: float) -> str:
    """``12.5 [8.0, 31.2]`` in cost units; an en dash where nothing was solved."""
    if pd.isna(rate) or rate == float("inf"):
        return "–"
    end = "∞" if high == float("inf") else f"{high:.1f}"
    return f"{rate:.1f}" if pd.isna(low) else f"{rate:.1f} [{low:.1f}, {end}]"


def table2(decisions: pd.DataFrame) -> pd.DataFrame:
    """Our Table 2: one row a model, arm and measure, ``value [95 % interval]`` a round; in percent, costs in units.

    ``n a round`` is the number that the first round's value is a share of. Measures without a value are left out;
    without tool-use decisions the table is empty.
    """
    parts = []
    for kind in ("complex", "simple"):
        for measure in MEASURES:
            table = rates(decisions, measure, kind)
            parts.append(_labelled(table, f"{measure}, {kind}", stats.percent))
        parts.append(_labelled(cost_per_solved(decisions, kind), f"cost per solved, {kind}", units))
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame()
    cells = pd.concat(parts, ignore_index=True)
    index = ["model", "arm", "measure"]
    wide = stats.by_round(cells, index)
    wide.insert(0, "n a round", cells.groupby(index)["n"].first())
    order = {name: place for place, name in enumerate(cells["measure"].unique())}
    return wide.sort_index(key=lambda level: level.map(order) if level.name == "measure" else level)


def _labelled(table: pd.DataFrame, name: str, shown) -> pd.DataFrame:
    """A table's cells as text; nothing where no group has a value (P(tool) of a run that wrote freely)."""
    if not table["n"].any():
        return table.iloc[:0]
    return table[[*KEYS, "n"]].assign(measure=name, cell=stats.cells(table, shown=shown))


def premise(decisions: pd.DataFrame) -> pd.DataFrame:
    """Whether the scenario's premise holds: without the tool easy problems succeed, and hard ones more seldom.

    One row a model and arm: problems solved over all rounds, in percent [95 % interval over `UNITS`], simple ones and,
    by the policy, complex ones. ``premise`` is "holds" where the interval of simple problems lies above that of complex
    ones solved directly, "fails" where no simple problem is solved, else "undecided", as it is with a single agent,
    who has no interval. Where it fails no agent has met an easy success, and no change of tool use is owed to one.
    """
    by, rows = ["model", "arm"], {"simple": problem_table(decisions, "simple")}
    for policy in ("direct", "tool"):
        rows[f"complex, {policy}"] = problem_table(decisions[decisions["choice"] == policy])
    found = {
        name: stats.rate_table(own.assign(valid=True), "solved", by, UNITS).set_index(by).drop(columns="invalid")
        for name, own in rows.items()
    }
    simple, direct = found["simple"], found["complex, direct"].reindex(found["simple"].index)
    verdict = np.select([simple["rate"] == 0, simple["low"] > direct["high"]], ["fails", "holds"], "undecided")
    solved = pd.DataFrame({name: stats.cells(table) for name, table in found.items()}, index=simple.index)
    return solved.fillna("–").assign(premise=verdict)


def drift(decisions: pd.DataFrame, measure: str = "tool usage") -> pd.DataFrame:
    """Last round minus the first on complex problems, paired by family and agent: model, arm, drift, low, high."""
    return stats.drift_table(measured(decisions, measure), "value", UNITS)


def measured(decisions: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The complex problems with a measure of `MEASURES` as ``value``; accuracy is known of invalid decisions too."""
    rows = problem_table(decisions)
    if measure in ("accuracy", "unanswered"):
        rows = rows.assign(valid=True)
    return rows.assign(value=rows[MEASURES[measure]].astype("Float64"))


def drift_columns(decisions: pd.DataFrame) -> pd.DataFrame:
    """`drift` of usage, P(tool) where recorded, and accuracy: one row a model and arm, ``points [95 % interval]``."""
    columns, known = {}, problem_table(decisions).notna().any()
    for measure in ("tool usage", "P(tool)", "accuracy"):
        if known[MEASURES[measure]]:
            columns[measure] = stats.cells(
                drift(decisions, measure).set_index(["model", "arm"]), "drift", "low", "high"
            )
    return pd.DataFrame(columns)


def agent_spread(decisions: pd.DataFrame, measure: str = "tool usage") -> pd.DataFrame:
    """How far agents (each with a history of its own) lie apart on complex problems: ``lowest-highest``, in percent.

    One row a model and arm, with the number of agents; a column a round.
    """
    rows = problem_table(decisions)
    rows = rows[rows[MEASURES[measure]].notna()]
    agents = rows.groupby([*KEYS, *stats.repetitions(rows), "agent"], observed=True)
    means = agents[MEASURES[measure]].mean().astype(float)
    ends = means.groupby(level=list(KEYS)).agg(["count", "min", "max"]).reset_index()
    cells = [f"{100 * low:.1f}-{100 * high:.1f}" for low, high in zip(ends["min"], ends["max"], strict=True)]
    wide = stats.by_round(ends.assign(cell=cells), ["model", "arm"])
    wide.insert(0, "agents", ends.groupby(["model", "arm"])["count"].max())
    return wide


def tool_events(results: Path) -> pd.DataFrame:
    """What was wrong with calls and answers, summed over a results folder's tool-use runs (`calls.Tally`).

    Of the standard condition. Rows: (model, event); columns: (arm, simple or complex) counts. Empty where no manifest
    holds any.
    """
    rows = []
    for run in complete_runs(results):
        facts = facts_of(run)
        for model in stats.standard(read_table(run))["model"].unique() if facts.tool_events else ():
            rows += [{"model": model, "arm": facts.settings["arm"], **event} for event in facts.tool_events]
    if not rows:
        return pd.DataFrame()
    counts = pd.DataFrame(rows).pivot_table(
        index=["model", "event"], columns="arm", values=["simple", "complex"], aggfunc="sum"
    )
    return counts.swaplevel(axis=1).sort_index(axis=1).fillna(0).astype(int)
