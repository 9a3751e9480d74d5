"""The figures of notebooks 7 and 8. Each function takes one scenario's decisions of one model and returns a figure.

None stands for nothing to draw: what a figure shows is not in the run (P(deviate), a second round, a game). A scenario
without figures of its own gets `rounds`.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atp_utils.analysis import plots, stats, tables, tipping, tool_use_tables
from atp_utils.analysis.drawing import about, arms_of, figure_of, grid

CASE = "information_sharing"  # the game of the paper's case study
ACROSS = 4  # panels side by side, at most


@figure_of("")
def rounds(decisions: pd.DataFrame) -> Figure:
    """Deviation rate and, where recorded, mean P(deviate) by round."""
    ours = _ours(decisions)
    figure, axes = grid(about(decisions, "Deviations"), 1, len(ours), 3.6, 3.3, sharey=True)
    _draw_ours(axes[0], decisions, ours, "deviation rate (%)")
    return figure


def _ours(decisions: pd.DataFrame) -> dict[str, str]:
    """Title -> column of what was measured."""
    exact = {"mean P(deviate)": "p_deviate"} if decisions["p_deviate"].notna().any() else {}
    return {"sampled": "deviated"} | exact


def _draw_ours(axes: np.ndarray, decisions: pd.DataFrame, ours: dict[str, str], label: str) -> None:
    for place, (title, value) in enumerate(ours.items()):
        rates = stats.rate_table(decisions, value)
        plots.round_curves(axes[place], rates, title=title, label=label if place == 0 else "")


@figure_of("role_play")
def role_play(decisions: pd.DataFrame) -> Figure:
    """Violation rate and, where recorded, mean P(deviate) by round; the paper's Table 1 beside them, dashed."""
    ours = _ours(decisions)
    published = dict(list(tables.paper_table1().groupby("model", sort=False)))
    title = about(decisions, "Rule violations")
    figure, axes = grid(title, 1, len(ours) + len(published), 3.6, 3.3, sharey=True)
    _draw_ours(axes[0], decisions, ours, "violation rate (%)")
    for ax, (model, rates) in zip(axes[0, len(ours) :], published.items(), strict=True):
        plots.round_curves(ax, rates, title=f"{model} (paper)", label="", dashed=True)
    return figure


@figure_of("role_play")
def role_play_environments(decisions: pd.DataFrame) -> Figure | None:
    """P(deviate) of each environment, first round against last, a panel an arm; None without two rounds of it."""
    known = decisions[decisions["p_deviate"].notna()]
    arms = [arm for arm in arms_of(known) if known.loc[known["arm"] == arm, "round"].nunique() > 1]
    if not arms:
        return None
    figure, axes = grid(about(decisions, "Environments"), 1, len(arms), 3.6, 4.1 if len(arms) == 1 else 3.8)
    for ax, arm in zip(axes[0], arms, strict=True):
        plots.first_last(ax, known[known["arm"] == arm], title=plots.NAMES[arm])
    return figure


@figure_of("tool_use")
def tool_use(decisions: pd.DataFrame) -> Figure:
    """Tool usage, accuracy and, where recorded, P(tool) on complex problems by round; the paper's below, dashed."""
    measures = ["tool usage", "accuracy"] + ["P(tool)"] * bool(decisions["p_deviate"].notna().any())
    paper = tool_use_tables.paper_table2()
    published = {"tool usage": paper.assign(rate=paper["usage"]), "accuracy": paper.assign(rate=paper["accuracy"])}
    figure, axes = grid(about(decisions, "Complex problems"), 2, len(measures), 4.0, 3.1)
    for (ours, theirs), measure in zip(axes.T, measures, strict=True):
        plots.round_curves(ours, tool_use_tables.rates(decisions, measure), title=measure, label="%")
        if measure in published:
            title = f"{measure}, Qwen3-8B (paper)"
            plots.round_curves(theirs, published[measure], title=title, label="%", dashed=True)
        else:
            theirs.set_axis_off()
    return figure


@figure_of("collusion")
def collusion(decisions: pd.DataFrame) -> Figure:
    """Collusion rate by round, a panel a threshold, at the paper's incentive ratio of 1 or the nearest that was run."""
    own = tipping.at_ratio_one(decisions)
    rates = stats.rate_table(own, by=("model", "arm", "threshold", "round"))
    thresholds = sorted(own["threshold"].unique())
    columns = min(len(thresholds), ACROSS)
    title = about(decisions, f"Collusion at incentive ratio {own['incentive_ratio'].iloc[0]:g}")
    figure, axes = grid(title, math.ceil(len(thresholds) / columns), columns, 3.3, 3.2, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place < len(thresholds):
            part = rates[rates["threshold"] == thresholds[place]]
            label = "collusion rate (%)" if place % columns == 0 else ""
            plots.round_curves(ax, part, title=f"k = {thresholds[place]}", label=label)
        else:
            ax.set_axis_off()
    return figure


@figure_of("collusion")
def recollusion(decisions: pd.DataFrame) -> Figure | None:
    """Figure 4: P(collude in round 2 | round 1 succeeded) by threshold and incentive; None without a round 2."""
    cells = tipping.recollusion_table(decisions)
    arms = arms_of(cells)
    if not arms:
        return None
    title = about(decisions, "P(collude in round 2 | success in round 1)")
    figure, axes = grid(title, 1, len(arms), *_cell_size(cells))
    for ax, arm in zip(axes[0], arms, strict=True):
        plots.heatmap(ax, cells[cells["arm"] == arm], title=plots.NAMES[arm], colour_bar=arm == arms[-1])
    return figure


@figure_of("collusion")
def collusion_grid(decisions: pd.DataFrame) -> Figure:
    """Figure 6: collusion rate by threshold and incentive, a row an arm, a column a round."""
    cells = stats.rate_table(decisions, by=("model", "arm", "threshold", "incentive_ratio", "round"))
    arms, rounds = arms_of(cells), sorted(cells["round"].unique())
    figure, axes = grid(about(decisions, "Collusion rate"), len(arms), len(rounds), *_cell_size(cells))
    for row, arm in zip(axes, arms, strict=True):
        for ax, number in zip(row, rounds, strict=True):
            part = cells[(cells["arm"] == arm) & (cells["round"] == number)]
            if len(part):
                title = f"{plots.NAMES[arm]}, round {number}"
                plots.heatmap(ax, part, title=title, colour_bar=number == rounds[-1])
            else:
                # An arm that was run for fewer rounds than another.
                ax.set_axis_off()
    return figure


def _cell_size(cells: pd.DataFrame) -> tuple[float, float]:
    """Inches of a heat map whose cells have room for a rate and its n."""
    return max(2.6, 0.75 * cells["incentive_ratio"].nunique() + 0.8), max(2.2, 0.6 * cells["threshold"].nunique() + 1)


@figure_of("collusion")
def case_study(decisions: pd.DataFrame) -> Figure | None:
    """Figure 5: the episode that `tipping.case_study` picks; None where its game was not played."""
    case = tipping.case_study(decisions, CASE)
    if case.empty:
        return None
    rounds, agents = case["round"].nunique(), case["agent"].nunique()
    figure, [[ax]] = grid(about(decisions, "Case study"), 1, 1, max(5.5, 1.5 * rounds + 1), 0.42 * agents + 1)
    first = case.iloc[0]
    plots.trace(ax, case, title=f"{plots.NAMES[first['arm']]}, seed {first['seed']}\n{first['item']}")
    return figure
