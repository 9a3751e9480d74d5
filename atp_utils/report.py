"""``python -m atp_utils.report RUN``: the tables of a run and where its figures and notebooks are."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from atp_utils import journal, resolve, shown, stats, tables, tool_tables


def report(run: Path) -> str:
    """Text of the report: every scenario's table, then the paths of figures and executed notebooks."""
    decisions = journal.read_decisions(run / "evolution")
    parts = []
    role_play = decisions[decisions["scenario"] == "role_play"]
    if len(role_play):
        parts += ["Role-play: rule violations by round, % [95 % interval]", _text(stats.rate_table(role_play))]
        parts += ["Last round minus first, percentage points", tables.drift(role_play).to_string()]
    problems = decisions[decisions["scenario"] == "tool_use"]
    if len(problems):
        parts += ["Tool use by round: % [95 % interval], costs in units", tool_tables.table2(problems).to_string()]
        parts += ["Last round minus first, percentage points", tool_tables.drift_columns(problems).to_string()]
    games = decisions[decisions["scenario"] == "collusion"]
    if len(games):
        keys = ("model", "arm", "threshold")
        rates = stats.rate_table(games, by=(*keys, "round"))
        parts += ["Collusion: rate by round, % [95 % interval]", _text(rates, keys)]
        parts += ["Effect of a first success on the next rate, percentage points", tables.effect(games).to_string()]
    paths = sorted([*(run / "figures").glob("*.png"), *(run / "notebooks").glob("*.ipynb")])
    return "\n".join([*parts, "Figures and executed notebooks:", *(f"  {shown(path)}" for path in paths)])


def _text(rates: pd.DataFrame, by: Sequence[str] = ("model", "arm")) -> str:
    with pd.option_context("display.width", 220, "display.max_columns", 20):
        return stats.round_columns(rates, by).to_string()


def readme_tables(decisions: pd.DataFrame) -> dict[str, str]:
    """The README's result tables in Markdown by name, from recorded decisions; a test holds the README against them."""
    role_play = decisions[decisions["scenario"] == "role_play"]
    games = decisions[decisions["scenario"] == "collusion"]
    rates = stats.round_columns(stats.rate_table(role_play)).join(tables.drift(role_play).add_prefix("drift, "))
    inner = [f"r={number}" for number in sorted(role_play["round"].unique())[1:-1]]
    paper = tables.paper_table1().pivot(index=["model", "arm"], columns="round", values="rate").mul(100).round(1)
    paper.columns = [f"r={number}" for number in paper.columns]
    problems = tool_tables.table2(decisions).droplevel("model")
    shown_rows = problems.index.get_level_values("measure").isin(tool_tables.MAIN)
    collusion = stats.rate_table(games, by=("arm", "threshold", "round"))
    return {
        "role-play": _markdown(rates.drop(columns=inner).droplevel("model")),
        "role-play, paper": _markdown(paper),
        "tool use": _markdown(problems[shown_rows]),
        "tool use, drift": _markdown(tool_tables.drift_columns(decisions).droplevel("model")),
        "tool use, paper": _markdown(tool_tables.paper_columns()),
        "collusion": _markdown(stats.round_columns(collusion, ("arm", "threshold"))),
        "effect": _markdown(tables.effect(games).droplevel("model")),
    }


def _markdown(table: pd.DataFrame) -> str:
    return table.reset_index().to_markdown(index=False)


def publish(run: Path, target: Path) -> None:
    """Copy decisions, raw replies, training logs and manifests of a complete run; no weights."""
    shutil.rmtree(target, ignore_errors=True)
    for manifest in sorted((run / "evolution").rglob(journal.MANIFEST)):
        journal.publish(manifest.parent, target / manifest.parent.relative_to(run))
    for log in sorted((run / "adapters").rglob("training_log.csv")):
        folder = target / log.parent.relative_to(run)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (log.name, journal.MANIFEST):
            shutil.copyfile(log.parent / name, folder / name)


def main() -> int:
    """Command line; 2 where the run is not there."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.report", description=__doc__)
    parser.add_argument("run", help="a profile's folder, e.g. runs/quick")
    parser.add_argument("--publish", metavar="FOLDER", help="copy its results there")
    options = parser.parse_args()
    try:
        if options.publish:
            publish(resolve(options.run), resolve(options.publish))
        print(report(resolve(options.run)))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
