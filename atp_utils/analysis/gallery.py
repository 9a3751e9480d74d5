"""All figures there are, drawn for each model into a folder of their own, each beside its numbers.

``python -m atp_utils.analysis.gallery RESULTS FIGURES`` draws all of a folder of results.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from atp_utils import ROOT, resolve, shown
from atp_utils.analysis import figures, plots, response_figures, study, study_figure  # noqa: F401  two register their figures
from atp_utils.analysis.drawing import FIGURES, OF, TABLES, drawn_by
from atp_utils.evolution import journal
from atp_utils.support import files, folders
from atp_utils.support.files import as_folder

MOST = 8  # processes that draw, of some 400 MB each


def figures_of(scenario: str) -> list[str]:
    """Names of a scenario's figures."""
    return OF.get(scenario, OF[""])


def claim(folder: str | Path, results: str | Path, *, overwrite: bool = False) -> Path:
    """The folder for figures of ``results``; one that holds figures of others is refused as `folders.claim` does."""
    source = resolve(results)
    name = shown(source) if source.is_relative_to(ROOT) else str(source)
    return folders.claim(folder, {"figures of": name}, overwrite=overwrite, name="figures")


def draw(decisions: pd.DataFrame, name: str, folder: str | Path) -> list[str]:
    """Draw figure ``name`` of `FIGURES` for every model; returns the paths of the drawings.

    They are ``<name>_<model>.png`` and ``.svg``, with a description for those who can't see them; their numbers lie
    beside them as ``.csv``. ``decisions`` are of the figure's scenario. Figures stay open, for a notebook to show at
    the end of its cell.
    """
    drawn = []
    for model, rows in drawn_by(name, decisions).groupby("model", observed=True):
        table = TABLES[name](rows)
        figure = FIGURES[name](rows, table)
        if figure is not None:
            said = f"{description(FIGURES[name])} Model: {model}.{source_of(rows)}"
            drawn += _save(figure, table, folder, f"{name}_{as_folder(model)}", said)
    return drawn


def draw_answers(answers: pd.DataFrame, folder: str | Path) -> list[str]:
    """Draw `study.answers` of all models in one figure, ``questions``, as `draw` does; nothing where there are none."""
    if answers.empty:
        return []
    figure = study_figure.questions(answers)
    return _save(figure, answers, folder, "questions", description(study_figure.questions))


def _save(figure: Figure, table: pd.DataFrame, folder: str | Path, stem: str, said: str) -> list[str]:
    files.write_text(resolve(folder) / f"{stem}.csv", table.to_csv(index=False, float_format="%.6g"))
    return plots.save(figure, folder, stem, said)


def source_of(decisions: pd.DataFrame) -> str:
    """A sentence that names the runs which ``decisions`` are from, where they say so (`journal.read_decisions`)."""
    return f" From the runs {', '.join(sorted(decisions['run'].unique()))}." if "run" in decisions else ""


def description(figure: Callable[..., Figure | None]) -> str:
    """What a figure shows, in words: the first paragraph of its function's documentation."""
    return " ".join((figure.__doc__ or figure.__name__).split("\n\n")[0].split())


def draw_all(decisions: pd.DataFrame, folder: str | Path) -> list[str]:
    """Draw the study's answers and every figure of every scenario in ``decisions``; returns their paths.

    As many are drawn at a time as there are processors (8 at most), each in a process of its own that imports this
    package anew: processes forked from one with threads may hang.
    """
    scenarios = decisions.groupby("scenario", sort=False, observed=True)
    todo = [(name, rows) for scenario, rows in scenarios for name in figures_of(scenario)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(_processors(), MOST), spawn, plots.set_style) as pool:
        drawings = [pool.submit(_draw_answers, decisions, folder)]  # it takes longest: first
        for name, rows in todo:
            models = drawn_by(name, rows).groupby("model", observed=True)
            drawings += [pool.submit(_draw, own, name, folder) for _, own in models]
        return [path for drawing in drawings for path in drawing.result()]


def _draw_answers(decisions: pd.DataFrame, folder: str | Path) -> list[str]:
    return draw_answers(study.answers(decisions), folder)


def _draw(decisions: pd.DataFrame, name: str, folder: str | Path) -> list[str]:
    drawn = draw(decisions, name, folder)
    plt.close("all")
    return drawn


def _processors() -> int:
    """How many processors this process may use: a job of a cluster has fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """Command line; 2 where the results are not there, or the folder isn't ours."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.analysis.gallery", description=__doc__)
    parser.add_argument("results", help="a folder of recorded runs, e.g. data/results")
    parser.add_argument("figures", help="where the drawings go")
    options = parser.parse_args()
    try:
        results = resolve(options.results)
        decisions = journal.with_words(journal.read_decisions(results), results)
        folder = claim(options.figures, options.results, overwrite=True)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(draw_all(decisions, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
