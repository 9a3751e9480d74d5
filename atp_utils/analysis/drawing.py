"""What all figures share: their registry, how one is drawn for each model, and panels under a title."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atp_utils import ROOT, resolve, shown
from atp_utils.analysis import plots, stats
from atp_utils.analysis.stats import ARMS
from atp_utils.support import folders
from atp_utils.support.files import as_folder

Draws = Callable[[pd.DataFrame], Figure | None]
FIGURES: dict[str, Draws] = {}
OF: dict[str, list[str]] = {}  # scenario -> its figures
ALL_CONDITIONS: set[str] = set()  # figures that take all conditions; others get the standard one


def figure_of(scenario: str, *, all_conditions: bool = False) -> Callable[[Draws], Draws]:
    """Register the decorated function, by its name, as a figure of a scenario; "" for any that has none."""

    def register(function: Draws) -> Draws:
        FIGURES[function.__name__] = function
        OF.setdefault(scenario, []).append(function.__name__)
        if all_conditions:
            ALL_CONDITIONS.add(function.__name__)
        return function

    return register


def figures_of(scenario: str) -> list[str]:
    """Names of a scenario's figures."""
    _register()
    return OF.get(scenario, OF[""])


def _register() -> None:
    """Import the modules that have figures, which register them; plainly, so that code digests see them."""
    from atp_utils.analysis import figures, response_figures  # noqa: F401


def claim(folder: str | Path, results: str | Path, *, overwrite: bool = False) -> Path:
    """The folder for figures of ``results``; one that holds figures of others is refused as `folders.claim` does."""
    source = resolve(results)
    name = shown(source) if source.is_relative_to(ROOT) else str(source)
    return folders.claim(folder, {"figures of": name}, overwrite=overwrite, name="figures")


def draw(decisions: pd.DataFrame, name: str, folder: str | Path) -> list[str]:
    """Draw figure ``name`` of `FIGURES` for every model, into ``<name>_<model>.png`` and ``.svg``; returns the paths.

    ``decisions`` are of the figure's scenario. Figures stay open, for a notebook to show at the end of its cell.
    """
    _register()
    drawn = []
    if name not in ALL_CONDITIONS:
        decisions = stats.standard(decisions)
    for model, rows in decisions.groupby("model", observed=True):
        figure = FIGURES[name](rows)
        if figure is not None:
            drawn += plots.save(figure, folder, f"{name}_{as_folder(model)}")
    return drawn


def grid(title: str, rows: int, columns: int, width: float, height: float, **sharing) -> tuple[Figure, np.ndarray]:
    """A figure of panels of ``width`` x ``height`` inches under a title that is broken where it is too long."""
    across = max(columns * width, 4)
    # Model names can be paths, with dollar signs, and longer than a panel.
    lines = textwrap.wrap(title, int(9.5 * across), break_on_hyphens=False)
    size = (across, rows * height + 0.2 + 0.25 * len(lines))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **sharing)
    figure.suptitle("\n".join(lines), parse_math=False, fontsize="large")
    return figure, axes


def about(decisions: pd.DataFrame, title: str) -> str:
    warning = stats.low_mass(decisions)
    return f"{title}: {decisions['model'].iloc[0]}{f' ({warning})' if warning else ''}"


def arms_of(decisions: pd.DataFrame) -> list[str]:
    return [arm for arm in ARMS if arm in set(decisions["arm"])]
