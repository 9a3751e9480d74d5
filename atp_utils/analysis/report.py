"""``python -m atp_utils.analysis.report RUN``: the tables of a run and where its figures and notebooks are."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from atp_utils import resolve, shown
from atp_utils.analysis import dose_response, positions, scoreboard, stats, study, tables, tool_use_tables
from atp_utils.evolution import journal
from atp_utils.support.manifest import read_manifest
from atp_utils.support.text import inert

Tables = tuple[tuple[str, Callable[[pd.DataFrame], pd.DataFrame]], ...]


def _violations(decisions: pd.DataFrame) -> pd.DataFrame:
    return stats.round_columns(stats.rate_table(decisions))


PRIMARY = "Primary contrast: last round minus first under the standard payoffs, less that under equal ones, points"
PLACES = "P(deviate) by the place of the deviant option, and the probability of both answers, %"
CONDITIONS = "P(deviate) by condition, first and last round, %, and changes in points"
SLOPES = "log-odds of deviating by written history (GEE over environments)"
MASS = "start, fixed points, and where groups of 8 end from nobody and from all, %"
PREMISE = "problems solved, % [95 % interval], and whether an easy success without the tool was there to be met"
DRIFT = "Last round minus first, percentage points"
# The tables of a scenario; "" has those of any other.
TABLES: dict[str, Tables] = {
    "": (("deviations by round, % [95 % interval]", _violations), (DRIFT, tables.drift)),
    "role_play": (("rule violations by round, % [95 % interval]", _violations), (DRIFT, tables.drift)),
    "tool_use": (
        (PREMISE, tool_use_tables.premise),
        ("% by round [95 % interval], costs in units", tool_use_tables.table2),
        (DRIFT, tool_use_tables.drift_columns),
    ),
    "collusion": (("rate by round, % [95 % interval]", tables.collusion),),
}


def parts(decisions: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Scenario, title and table of all that a run holds: the primary contrast first, of scenario ""."""
    yield "", PRIMARY, tables.contrast(decisions)
    for name, rows in decisions.groupby("scenario", sort=False):
        own = stats.standard(rows)
        for title, tabled in TABLES.get(name, TABLES[""]) if len(own) else ():
            yield name, title, tabled(own)
        if own["p_first"].notna().any():
            yield name, PLACES, positions.position_table(own)
        if stats.lived(rows)["condition"].nunique() > 1:
            yield name, CONDITIONS, tables.conditions(rows)
    if len(doses := dose_response.written(decisions)):
        yield "role_play", SLOPES, tables.slopes(doses)
    if len(written := dose_response.written(decisions, "collusion")):
        yield "collusion", MASS, tables.dynamics(written)


def report(run: Path) -> str:
    """Text of the report: every scenario's tables, then the paths of figures and executed notebooks."""
    decisions = journal.read_decisions(run / "evolution")
    lines = []
    for name, rows in decisions.groupby("scenario", sort=False):
        lines += [f"{name}: {warning}"] if (warning := stats.low_mass(rows)) else []
    for scenario, title, table in parts(decisions):
        lines += [f"{scenario}: {title}" if scenario else title, table.to_string()]
    paths = sorted([*(run / "figures").glob("*.png"), *(run / "notebooks").glob("*.ipynb")])
    return "\n".join([*lines, "Figures and executed notebooks:", *(f"  {shown(path)}" for path in paths)])


def costs(results: Path) -> pd.DataFrame:
    """What made the published runs, a row a command and scenario: runs, decisions, minutes, and on which processors.

    ``results`` has a folder a profile, as `runs.publish` writes them; minutes are of the runs that tell their time.
    """
    rows = []
    for run in journal.complete_runs(results):
        facts = read_manifest(run)
        profile, _, scenario = run.relative_to(results).parts[:3]
        command = f"`make reproduce PROFILE={profile} MODEL={facts['settings']['model']}`"
        seconds, processor = facts.get("seconds", float("nan")), facts.get("processor")
        rows.append((command, scenario, facts["counts"]["decisions"], seconds, processor))
    columns = ["command", "scenario", "decisions", "seconds", "processor"]
    table = pd.DataFrame(rows, columns=columns).groupby(["command", "scenario"])
    made = table.agg(runs=("seconds", "size"), decisions=("decisions", "sum"), timed=("seconds", "count"))
    return made.assign(
        minutes=table["seconds"].sum().div(60).round(1).where(made["timed"] > 0),
        processor=table["processor"].agg(lambda names: ", ".join(sorted(names.dropna().unique())) or None),
    )


def readme_tables(results: Path) -> dict[str, str]:
    """The README's result tables in Markdown by name, from a results folder; a test holds the README against them."""
    decisions = journal.read_decisions(results)
    role_play, problems, games = (
        decisions[decisions["scenario"] == name] for name in ("role_play", "tool_use", "collusion")
    )
    written, answers = dose_response.written(role_play), dose_response.written(games, "collusion")
    made: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], pd.DataFrame]]] = {
        "primary contrast": (decisions, tables.contrast),
        "questions": (study.answers(decisions), tables.answers),
        "scoreboard": (scoreboard.scores(decisions), scoreboard.shown),
        "role-play": (stats.standard(role_play), _violations),
        "slopes": (written, tables.slopes),
        "premise": (stats.standard(problems), tool_use_tables.premise),
        "critical mass": (answers, tables.dynamics),
    }
    ours = {name: tabled(rows) for name, (rows, tabled) in made.items() if len(rows)}
    ours["costs"] = costs(results).astype(object).fillna("–")
    return {name: table.reset_index().to_markdown(index=False, disable_numparse=True) for name, table in ours.items()}


def main() -> int:
    """Command line; 2 where the run is not there."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.analysis.report", description=__doc__)
    parser.add_argument("run", help="a profile's folder, e.g. runs/quick")
    options = parser.parse_args()
    try:
        print(inert(report(resolve(options.run))))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
