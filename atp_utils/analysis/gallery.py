"""All figures there are, drawn for each model into a folder of their own."""

from pathlib import Path

import pandas as pd

from atp_utils import ROOT, resolve, shown
from atp_utils.analysis import figures, plots, response_figures, stats  # noqa: F401  these register their figures
from atp_utils.analysis.drawing import ALL_CONDITIONS, FIGURES, OF
from atp_utils.support import folders
from atp_utils.support.files import as_folder


def figures_of(scenario: str) -> list[str]:
    """Names of a scenario's figures."""
    return OF.get(scenario, OF[""])


def claim(folder: str | Path, results: str | Path, *, overwrite: bool = False) -> Path:
    """The folder for figures of ``results``; one that holds figures of others is refused as `folders.claim` does."""
    source = resolve(results)
    name = shown(source) if source.is_relative_to(ROOT) else str(source)
    return folders.claim(folder, {"figures of": name}, overwrite=overwrite, name="figures")


def draw(decisions: pd.DataFrame, name: str, folder: str | Path) -> list[str]:
    """Draw figure ``name`` of `FIGURES` for every model, into ``<name>_<model>.png`` and ``.svg``; returns the paths.

    ``decisions`` are of the figure's scenario. Figures stay open, for a notebook to show at the end of its cell.
    """
    drawn = []
    if name not in ALL_CONDITIONS:
        decisions = stats.standard(decisions)
    for model, rows in decisions.groupby("model", observed=True):
        figure = FIGURES[name](rows)
        if figure is not None:
            drawn += plots.save(figure, folder, f"{name}_{as_folder(model)}")
    return drawn
