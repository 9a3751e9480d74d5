"""Figures: each function draws on an ``ax`` and returns it; nothing here computes a statistic."""

import io
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from atp_utils import resolve, shown
from atp_utils.support import files

# Okabe-Ito colours: told apart with every common colour-vision deficiency, and by marker in print.
STYLES = {"base": ("#0072B2", "o"), "dpo": ("#E69F00", "s"), "grpo": ("#009E73", "^")}
NAMES = {"base": "base", "dpo": "DPO", "grpo": "GRPO"}


def set_style() -> None:
    """The look of every figure and table; SVG output that is the same for the same data."""
    pd.set_option("display.max_colwidth", None)
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 110, "svg.hashsalt": "atp", "figure.constrained_layout.use": True})


def round_curves(ax: Axes, rates: pd.DataFrame, *, title: str, label: str, dashed: bool = False) -> Axes:
    """Rate by round in percent, a line an arm, with the 95 % interval as a band (`stats.rate_table`'s columns).

    ``rates`` without low and high (published values) is drawn without bands. A single round has bars, side by side.
    """
    rounds = sorted(rates["round"].unique())
    for place, (arm, group) in enumerate(rates.groupby("arm", sort=True)):
        colour, marker = STYLES[arm]
        line = "--" if dashed else "-"
        x = group["round"].astype(float) + (0.05 * place if len(rounds) == 1 else 0)
        ax.plot(x, 100 * group["rate"], color=colour, marker=marker, linestyle=line, label=NAMES[arm])
        if "low" in group:
            ends = 100 * group["low"], 100 * group["high"]
            if len(rounds) == 1:
                ax.vlines(x, *ends, color=colour, alpha=0.5)
            else:
                ax.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
    if rates["rate"].isna().all():
        ax.text(0.5, 0.5, "no valid decision", transform=ax.transAxes, ha="center", va="center", color="0.3")
    ax.set(title=title, xlabel="round", ylabel=label, xticks=rounds[:: math.ceil(len(rounds) / 10)])
    # A little room, so that marks at 0 and 100 are whole, and above them a row where the legend hides no curve.
    ax.set(ylim=(-3, 119), yticks=range(0, 101, 20))
    margin = 0.05 * (rounds[-1] - rounds[0]) or 0.5
    ax.set_xlim(rounds[0] - margin, rounds[-1] + margin)
    row = {"ncols": len(NAMES), "columnspacing": 1, "handlelength": 1.6, "handletextpad": 0.4, "borderaxespad": 0.2}
    ax.legend(title=None, loc="upper center", frameon=False, fontsize="small", **row)
    return ax


def first_last(ax: Axes, decisions: pd.DataFrame, *, title: str) -> Axes:
    """Mean P(deviate) of each environment, first round against last; the diagonal is no change."""
    means = decisions.groupby(["environment", "round"])["p_deviate"].mean().astype(float).unstack("round")
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    arm = decisions["arm"].iloc[0]
    colour, marker = STYLES[arm]
    ax.scatter(means.iloc[:, 0], means.iloc[:, -1], color=colour, marker=marker, alpha=0.8)
    first, last = means.columns[0], means.columns[-1]
    ax.set(title=title, xlabel=f"P(deviate), round {first}", ylabel=f"P(deviate), round {last}")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), box_aspect=1)
    return ax


def training_curve(ax: Axes, log: pd.DataFrame, column: str, *, title: str) -> Axes:
    """One column of a training log by step: the raw values thin, their running mean over five steps thick."""
    ax.plot(log["step"], log[column], color="0.7", linewidth=1)
    ax.plot(log["step"], log[column].rolling(5, min_periods=1).mean(), color="#0072B2", linewidth=2)
    ax.set(title=title, xlabel="step")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def save(figure: Figure, folder: str | Path, name: str, description: str = "") -> list[str]:
    """Write ``name.png`` and ``name.svg`` into ``folder``, with a description; returns their paths in the project."""
    paths = [resolve(folder) / f"{name}.{kind}" for kind in ("png", "svg")]
    drawn, said = io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=160)
    said.add_text("Description", description)
    with files.replacing(paths[0]) as temporary:
        # 256 colours are enough for figures like these, and take a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(256).save(temporary, "png", pnginfo=said, optimize=True)
    figure.set_layout_engine("none")  # as it is laid out now: finding that again takes most of the time
    with files.replacing(paths[1]) as temporary:
        figure.savefig(temporary, metadata={"Description": description, "Date": None})
    return [shown(path) for path in paths]


def heatmap(ax: Axes, cells: pd.DataFrame, *, title: str, colour_bar: bool = False) -> Axes:
    """A rate over incentive ratio (across) and threshold (down); every cell shows its rate and n.

    ``cells`` has threshold, incentive_ratio, n and rate. A cell without a decision (n = 0) is hatched: nothing
    was seen there, which is not a rate of 0.
    """
    wide = {name: cells.pivot(index="threshold", columns="incentive_ratio", values=name) for name in ("rate", "n")}
    rate, n = wide["rate"].astype(float) * 100, wide["n"].fillna(0).astype(int)
    texts = rate.map("{:.0f}".format) + n.map("\nn={}".format)
    texts = texts.where(n > 0, "n=0")
    ax.set_facecolor("0.92")
    layout = ax.figure.get_layout_engine()
    ax.figure.set_layout_engine("none")  # seaborn draws the whole figure, to see whether labels overlap
    sns.heatmap(
        rate.mask(n == 0), annot=texts, fmt="", vmin=0, vmax=100, cmap="cividis", cbar=colour_bar, ax=ax,
        linewidths=0.5, annot_kws={"size": 8}, cbar_kws={"label": "%"} if colour_bar else None, mask=n == 0,
    )  # fmt: skip
    for row, column in zip(*(n == 0).to_numpy().nonzero(), strict=True):
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))
        ax.text(column + 0.5, row + 0.5, "n=0", ha="center", va="center", size=8, color="0.3")
    ax.figure.set_layout_engine(layout)
    ax.set(title=title, xlabel="incentive ratio", ylabel="threshold k")
    ax.grid(False)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    return ax


def trace(ax: Axes, decisions: pd.DataFrame, *, title: str) -> Axes:
    """One collusion episode: agents down, rounds across; filled where the agent colluded, with choice and capital."""
    for across, down, row, colour in _episode(ax, decisions, title):
        text = f"{row.choice if row.valid else 'invalid'}\n{row.capital:.3g}"
        ax.text(across + 0.5, down + 0.5, text, ha="center", va="center", size=8, color=colour)
    return ax


def spoken(ax: Axes, decisions: pd.DataFrame, *, title: str, characters: int, lines: int) -> Axes:
    """One collusion episode as it was said: agents down, rounds across, the end of each one's ``words`` in its cell.

    Filled where the agent colluded. A line has so many ``characters``, a cell so many ``lines``.
    """
    for across, down, row, colour in _episode(ax, decisions, title):
        said = "invalid" if pd.isna(row.words) else " ".join(row.words.split())
        kept = textwrap.wrap(said, characters)
        shown = "\n".join(kept if len(kept) <= lines else ["... " + kept[-lines], *kept[1 - lines :]])
        ax.text(across + 0.03, down + 0.5, shown, va="center", size=7, color=colour, parse_math=False)
    return ax


def _episode(ax: Axes, decisions: pd.DataFrame, title: str) -> list[tuple[int, int, Any, str]]:
    """Cells of an episode, agents down and rounds across; returns (across, down, decision, colour of text) of each."""
    rounds, agents = sorted(decisions["round"].unique()), sorted(decisions["agent"].unique())
    cells = []
    for row in decisions.itertuples():
        filled, text = ("#D55E00", "white") if row.valid and row.deviated else ("white", "0.2")
        across, down = rounds.index(row.round), agents.index(row.agent)
        ax.add_patch(Rectangle((across, down), 1, 1, facecolor=filled, edgecolor="0.5"))
        cells.append((across, down, row, text))
    met = decisions.groupby("round")["succeeded"].first()
    ax.set(title=title, xlim=(0, len(rounds)), ylim=(len(agents), 0), ylabel="agent")
    ax.set_xticks(
        [i + 0.5 for i in range(len(rounds))], [f"round {r}\n{'success' if met[r] else 'failure'}" for r in rounds]
    )
    ax.set_yticks([i + 0.5 for i in range(len(agents))], agents)
    ax.grid(False)
    return cells
