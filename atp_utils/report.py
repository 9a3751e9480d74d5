"""``python -m atp_utils.report RUN``: the tables of a run and where its figures and notebooks are."""

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd

from atp_utils import journal, resolve, shown, stats, tables


def report(run: Path) -> str:
    """Text of the report: every scenario's table, then the paths of figures and executed notebooks."""
    decisions = journal.read_decisions(run / "evolution")
    parts = []
    role_play = decisions[decisions["scenario"] == "role_play"]
    if len(role_play):
        parts += ["Role-play: rule violations by round, % [95 % interval]", _text(stats.rate_table(role_play))]
        parts += ["Last round minus first, percentage points", tables.drift(role_play).to_string()]
    paths = sorted([*(run / "figures").glob("*.png"), *(run / "notebooks").glob("*.ipynb")])
    return "\n".join([*parts, "Figures and executed notebooks:", *(f"  {shown(path)}" for path in paths)])


def _text(rates: pd.DataFrame) -> str:
    with pd.option_context("display.width", 220, "display.max_columns", 20):
        return stats.round_columns(rates).to_string()


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
