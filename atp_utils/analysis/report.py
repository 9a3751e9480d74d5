"""``python -m atp_utils.analysis.report RUN``: the tables of a run and where its figures and notebooks are."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from atp_utils import resolve, shown
from atp_utils.analysis import positions, stats, tables, tool_use_tables
from atp_utils.evolution import journal

Tables = tuple[tuple[str, Callable[[pd.DataFrame], pd.DataFrame]], ...]


def _violations(decisions: pd.DataFrame) -> pd.DataFrame:
    return stats.round_columns(stats.rate_table(decisions))


DRIFT = "Last round minus first, percentage points"
# The tables of a scenario; "" has those of any other.
TABLES: dict[str, Tables] = {
    "": (("deviations by round, % [95 % interval]", _violations), (DRIFT, tables.drift)),
    "role_play": (("rule violations by round, % [95 % interval]", _violations), (DRIFT, tables.drift)),
    "tool_use": (
        ("% by round [95 % interval], costs in units", tool_use_tables.table2),
        (DRIFT, tool_use_tables.drift_columns),
    ),
    "collusion": (("rate by round, % [95 % interval]", tables.collusion),),
}


def report(run: Path) -> str:
    """Text of the report: every scenario's tables, then the paths of figures and executed notebooks."""
    decisions, replies = journal.read_decisions(run / "evolution"), journal.read_replies(run / "evolution")
    parts = []
    for name, rows in decisions.groupby("scenario", sort=False):
        parts += [f"{name}: {warning}"] if (warning := stats.low_mass(rows)) else []
        for title, tabled in TABLES.get(name, TABLES[""]):
            parts += [f"{name}: {title}", tabled(rows).to_string()]
        if rows["p_deviate"].notna().any():
            title = f"{name}: P(deviate) by the place of the deviant option, and the probability of both answers, %"
            parts += [title, positions.position_table(rows, replies).to_string()]
    paths = sorted([*(run / "figures").glob("*.png"), *(run / "notebooks").glob("*.ipynb")])
    return "\n".join([*parts, "Figures and executed notebooks:", *(f"  {shown(path)}" for path in paths)])


def readme_tables(results: Path) -> dict[str, str]:
    """The README's result tables in Markdown by name, from a results folder; a test holds the README against them."""
    decisions, replies = journal.read_decisions(results), journal.read_replies(results)
    role_play, problems, games = (
        decisions[decisions["scenario"] == name] for name in ("role_play", "tool_use", "collusion")
    )
    rates = _violations(role_play).join(tables.drift(role_play).add_prefix("drift, "))
    inner = [f"r={number}" for number in sorted(role_play["round"].unique())[1:-1]]
    table2 = tool_use_tables.table2(problems)
    main = table2.index.get_level_values("measure").isin(tool_use_tables.MAIN)
    ours = {
        "role-play": rates.drop(columns=inner),
        "role-play, position": positions.position_table(role_play, replies),
        "tool use": table2[main],
        "tool use, drift": tool_use_tables.drift_columns(problems),
        "tool use, position": positions.position_table(problems, replies),
        "collusion": tables.collusion(games),
        "collusion, position": positions.position_table(games, replies),
    }
    paper = {"role-play, paper": tables.paper_columns(), "tool use, paper": tool_use_tables.paper_columns()}
    if decisions["model"].nunique() == 1:
        ours = {name: table.droplevel("model") for name, table in ours.items()}
    return {name: table.reset_index().to_markdown(index=False) for name, table in (ours | paper).items()}


def main() -> int:
    """Command line; 2 where the run is not there."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.analysis.report", description=__doc__)
    parser.add_argument("run", help="a profile's folder, e.g. runs/quick")
    options = parser.parse_args()
    try:
        print(report(resolve(options.run)))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
