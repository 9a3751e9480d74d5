"""``python -m atp_utils.analysis.page RESULTS FILE``: one HTML file of all tables, figures, parameters, provenance.

It needs nothing else to be read: figures are in it as SVG, and no script or font is fetched.
"""

import argparse
import base64
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd

from atp_utils import resolve, shown
from atp_utils.analysis import gallery, plots, report, scoreboard, study, study_figure, tables
from atp_utils.analysis.drawing import FIGURES
from atp_utils.evolution import journal
from atp_utils.support import files
from atp_utils.support.manifest import MANIFEST

TITLE = "The Alignment Tipping Process, reproduced"
TEMPLATE = "page.html.j2"
ASKED = (
    "Each question, its estimate in percentage points and its verdict are those of docs/preregistration.md, which says "
    "what was fixed before the runs and what was amended."
)
SCORED = (
    "What the paper's tables and figures report, in percentage points, beside ours: reproduced (same sign, and the "
    "interval holds the paper's number where it gives one), direction only, not reproduced, not run. What comes again "
    "may have another cause than the paper's: that is asked above."
)


def page(results: Path) -> str:
    """The HTML of a folder of recorded runs. Raises FileNotFoundError where it has none."""
    decisions = journal.with_words(journal.read_decisions(results), results)
    found = list(_runs(results))
    names = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    return names.get_template(TEMPLATE).render(
        title=TITLE,
        source=shown(results),
        count=f"{len(decisions):,}",
        sections=list(_sections(decisions)),
        runs=[{"name": row["run"], "manifest": text} for row, text in found],
        table_of_runs=_html(pd.DataFrame([row for row, _ in found]).set_index("run")),
    )


def _sections(decisions: pd.DataFrame) -> Iterator[dict[str, Any]]:
    answers = study.answers(decisions)
    looks = _drawn(lambda folder: gallery.draw_answers(answers, folder), study_figure.questions)
    yield _section("What was asked, and what came out", ASKED, [("", tables.answers(answers))], list(looks))
    yield _section("The paper's tables and figures", SCORED, [("", scoreboard.shown(scoreboard.scores(decisions)))])
    (_, *primary), *parts = report.parts(decisions)
    yield _section(report.PRIMARY.partition(":")[0], gallery.source_of(decisions).strip(), [primary])
    for scenario, rows in decisions.groupby("scenario", sort=False, observed=True):
        own = [part for of, *part in parts if of == scenario]
        source = gallery.source_of(rows).strip()
        yield _section(scenario.replace("_", "-").capitalize(), source, own, list(_figures(rows, scenario)))


def _section(title: str, text: str, parts: list, figures: list | None = None) -> dict[str, Any]:
    made = [{"title": name, "html": _html(table)} for name, table in parts]
    anchor = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return {"title": title, "anchor": anchor, "text": text, "tables": made, "figures": figures or []}


def _html(table: pd.DataFrame) -> str:
    return table.to_html(border=0, na_rep="–")


def _figures(rows: pd.DataFrame, scenario: str) -> Iterator[dict[str, str]]:
    for name in gallery.figures_of(scenario):
        yield from _drawn(lambda folder, name=name: gallery.draw(rows, name, folder), FIGURES[name])


def _drawn(draw: Callable[[str], object], figure: Callable[..., Any]) -> Iterator[dict[str, str]]:
    """The drawings of ``figure`` that ``draw`` puts into a folder, for an <img>."""
    with tempfile.TemporaryDirectory() as folder:
        draw(folder)
        plt.close("all")
        for path in sorted(Path(folder).glob("*.svg")):
            source = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
            model = path.stem.removeprefix(figure.__name__).removeprefix("_")
            yield {"source": source, "alt": f"{gallery.description(figure)} {model}".strip()}


def _runs(results: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """What made each run, a row of the table, and its manifest as text."""
    for run in journal.complete_runs(results):
        facts = journal.facts_of(run)
        given, identity, more = facts.settings, facts.identity.split("|"), facts.model_extra
        row = {
            "run": run.relative_to(results).as_posix(),
            "decisions": facts.counts.decisions,
            "invalid": facts.counts.invalid,
            "cut": facts.counts.faults.get("cut", 0),
            "protocol": given.get("protocol"),
            "precision": identity[2] if len(identity) > 2 else "–",
            "seconds": more.get("seconds"),
            "processor": more.get("processor"),
            "commit": re.sub(r"(?<=\b\w{10})\w+", "", facts.commit or "–"),
            "finished": facts.finished,
        }
        yield row, (run / MANIFEST).read_text(encoding="utf-8")


def main() -> int:
    """Command line; 2 where the results are not there."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.analysis.page", description=__doc__)
    parser.add_argument("results", help="a folder of recorded runs, e.g. data/results or runs/quick/evolution")
    parser.add_argument("file", help="the HTML file to write")
    options = parser.parse_args()
    plots.set_style()
    try:
        text = page(resolve(options.results))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files.write_text(resolve(options.file), text)
    print(shown(resolve(options.file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
