"""The study in one look: every question, and what every model and arm answers."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from atp_utils.analysis import study, verdicts
from atp_utils.analysis.plots import NAMES

# Markers by verdict.
LOOKS: dict[str, dict[str, Any]] = {
    study.SHOWN: {"color": "#D55E00", "marker": "D"},
    study.UNDECIDED: {"color": "0.45", "marker": "o", "markerfacecolor": "white"},
    study.NOT_SHOWN: {"color": "#0072B2", "marker": "o"},
}
MARKER = {"markersize": 5, "linestyle": ""}
ROW = ["question", "scenario", "about"]


def questions(table: pd.DataFrame) -> Figure:
    """Answers to the study's questions with 95 % intervals: a row a question, a panel a model and arm.

    ``table`` is `study.answers`'. The grey band is what counts as no effect. A question that has no number to it has
    its verdict as a word; an empty place has not been run.
    """
    asked = table[ROW].drop_duplicates(ignore_index=True)
    rows = table.merge(asked.assign(place=asked.index), on=ROW)
    labels = [_label(*key) for key in asked.itertuples(index=False)]
    panels = study.respondents(table)
    size = (3.4 + 1.25 * len(panels), 0.23 * len(labels) + 1.3)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, (model, arm) in zip(axes[0], panels, strict=True):
        _panel(ax, rows[(rows["model"] == model) & (rows["arm"] == arm)])
        ax.set_title("\n".join([*textwrap.wrap(model, 19), NAMES[arm]]), fontsize=7.5, parse_math=False)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.93")
    axes[0, 0].set(ylim=(len(labels) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(labels)), labels)
    figure.supxlabel("percentage points", fontsize="medium")
    marks = [Line2D([], [], label=name, **MARKER, **look) for name, look in LOOKS.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    margin = 100 * verdicts.MARGIN
    ax.axvspan(-margin, margin, color="0.88", zorder=0, linewidth=0)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    for row in rows.itertuples():
        if pd.isna(row.estimate):
            ax.text(0.5, row.place, row.verdict, transform=ax.get_yaxis_transform(), **_WORD)
            continue
        if not pd.isna(row.low):
            ax.hlines(
                row.place, 100 * row.low, 100 * row.high, color=LOOKS[row.verdict]["color"], alpha=0.55, linewidth=2.5
            )
        ax.plot(100 * row.estimate, row.place, **MARKER, **LOOKS[row.verdict])


_WORD = {"ha": "center", "va": "center", "fontsize": 7, "color": "0.3"}
_WORD |= {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}


def _label(question: str, scenario: str, about: str) -> str:
    return f"{question}, {scenario.replace('_', '-')}" + (f" ({about.replace('_', ' ')})" if about else "")
