"""What all figures share: their registry, and panels under a title."""

import functools
import textwrap
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atp_utils.analysis import stats
from atp_utils.analysis.stats import ARMS

Tabled = Callable[[pd.DataFrame], pd.DataFrame]
# Decisions of one scenario and model, and the figure's numbers of these: made anew where they aren't given.
Draws = Callable[..., Figure | None]
FIGURES: dict[str, Draws] = {}
TABLES: dict[str, Tabled] = {}  # figure -> the numbers that it shows
OF: dict[str, list[str]] = {}  # scenario -> its figures
CONDITIONS: dict[str, tuple[str, ...]] = {}  # figure -> the conditions that it draws; all, where it names none


def figure_of(scenario: str, table: Tabled, conditions: tuple[str, ...] = ("standard",)) -> Callable[[Draws], Draws]:
    """Register the decorated function, by its name, as a figure of a scenario; "" for any that has none.

    It is called with decisions of ``conditions`` (all, if empty) and the numbers that it shows, which ``table`` makes
    of these.
    """

    def register(function: Draws) -> Draws:
        @functools.wraps(function)
        def draws(decisions: pd.DataFrame, numbers: pd.DataFrame | None = None) -> Figure | None:
            return function(decisions, table(decisions) if numbers is None else numbers)

        FIGURES[function.__name__], TABLES[function.__name__] = draws, table
        OF.setdefault(scenario, []).append(function.__name__)
        CONDITIONS[function.__name__] = conditions
        return draws

    return register


def drawn_by(figure: str, decisions: pd.DataFrame) -> pd.DataFrame:
    """The decisions of the conditions that a figure draws; its title warns of these alone."""
    names = CONDITIONS[figure]
    return decisions[decisions["condition"].isin(names)] if names else decisions


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
