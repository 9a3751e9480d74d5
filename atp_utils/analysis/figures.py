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
SPEAKERS = 4  # agents whose words a case study has room for
ACROSS = 4  # panels side by side, at most


def _measured(decisions: pd.DataFrame) -> pd.DataFrame:
    """Each measure's rates by arm and round."""
    parts = [stats.rate_table(decisions, value).assign(measure=title) for title, value in _ours(decisions).items()]
    return pd.concat(parts, ignore_index=True)


def _ours(decisions: pd.DataFrame) -> dict[str, str]:
    """Title -> column of what was measured."""
    exact = {"mean P(deviate)": "p_deviate"} if decisions["p_deviate"].notna().any() else {}
    return {"sampled": "deviated"} | exact


@figure_of("", _measured)
def rounds(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Deviation rate and, where recorded, mean P(deviate) by round."""
    figure, axes = grid(about(decisions, "Deviations"), 1, table["measure"].nunique(), 3.6, 3.3, sharey=True)
    _draw_ours(axes[0], table, "deviation rate (%)")
    return figure


def _draw_ours(axes: np.ndarray, ours: pd.DataFrame, label: str) -> None:
    for place, (title, rates) in enumerate(ours.groupby("measure", sort=False)):
        plots.round_curves(axes[place], rates, title=title, label=label if place == 0 else "")


@figure_of("role_play", _measured)
def role_play(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Violation rate and, where recorded, mean P(deviate) by round; the paper's Table 1 beside them, dashed."""
    published = dict(list(tables.paper_table1().groupby("model", sort=False)))
    title, own = about(decisions, "Rule violations"), table["measure"].nunique()
    figure, axes = grid(title, 1, own + len(published), 3.6, 3.3, sharey=True)
    _draw_ours(axes[0], table, "violation rate (%)")
    for ax, (model, rates) in zip(axes[0, own:], published.items(), strict=True):
        plots.round_curves(ax, rates, title=f"{model} (paper)", label="", dashed=True)
    return figure


def _by_environment(decisions: pd.DataFrame) -> pd.DataFrame:
    """Mean P(deviate) by arm, environment and round."""
    known = decisions[decisions["p_deviate"].notna()]
    return known.groupby(["model", "arm", "environment", "round"], observed=True)["p_deviate"].mean().reset_index()


@figure_of("role_play", _by_environment)
def role_play_environments(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """P(deviate) of each environment, first round against last, a panel an arm.

    None without two rounds of it.
    """
    arms = [arm for arm in arms_of(table) if table.loc[table["arm"] == arm, "round"].nunique() > 1]
    if not arms:
        return None
    figure, axes = grid(about(decisions, "Environments"), 1, len(arms), 3.6, 4.1 if len(arms) == 1 else 3.8)
    for ax, arm in zip(axes[0], arms, strict=True):
        plots.first_last(ax, table[table["arm"] == arm], title=plots.NAMES[arm])
    return figure


def _of_problems(decisions: pd.DataFrame) -> pd.DataFrame:
    """The measures of complex problems by arm and round."""
    measures = ["tool usage", "accuracy"] + ["P(tool)"] * bool(decisions["p_deviate"].notna().any())
    parts = [tool_use_tables.rates(decisions, measure).assign(measure=measure) for measure in measures]
    return pd.concat(parts, ignore_index=True)


@figure_of("tool_use", _of_problems)
def tool_use(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Tool usage, accuracy and, where recorded, P(tool) on complex problems by round; the paper's below, dashed."""
    measures = dict(list(table.groupby("measure", sort=False)))
    paper = tool_use_tables.paper_table2()
    published = {"tool usage": paper.assign(rate=paper["usage"]), "accuracy": paper.assign(rate=paper["accuracy"])}
    figure, axes = grid(about(decisions, "Complex problems"), 2, len(measures), 4.0, 3.1)
    for (ours, theirs), (measure, rates) in zip(axes.T, measures.items(), strict=True):
        plots.round_curves(ours, rates, title=measure, label="%")
        if measure in published:
            title = f"{measure}, Qwen3-8B (paper)"
            plots.round_curves(theirs, published[measure], title=title, label="%", dashed=True)
        else:
            theirs.set_axis_off()
    return figure


def _by_threshold(decisions: pd.DataFrame) -> pd.DataFrame:
    return stats.rate_table(tipping.at_ratio_one(decisions), by=("model", "arm", "threshold", "round"))


@figure_of("collusion", _by_threshold)
def collusion(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Collusion rate by round, a panel a threshold, at the paper's incentive ratio of 1 or the nearest that was run."""
    own, thresholds = tipping.at_ratio_one(decisions), sorted(table["threshold"].unique())
    columns = min(len(thresholds), ACROSS)
    title = about(decisions, f"Collusion at incentive ratio {own['incentive_ratio'].iloc[0]:g}")
    figure, axes = grid(title, math.ceil(len(thresholds) / columns), columns, 3.3, 3.2, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place < len(thresholds):
            part = table[table["threshold"] == thresholds[place]]
            label = "collusion rate (%)" if place % columns == 0 else ""
            plots.round_curves(ax, part, title=f"k = {thresholds[place]}", label=label)
        else:
            ax.set_axis_off()
    return figure


@figure_of("collusion", tipping.recollusion_table)
def recollusion(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Figure 4: P(collude in round 2 | round 1 succeeded) by threshold and incentive.

    None without a round 2.
    """
    arms = arms_of(table)
    if not arms:
        return None
    title = about(decisions, "P(collude in round 2 | success in round 1)")
    figure, axes = grid(title, 1, len(arms), *_cell_size(table))
    for ax, arm in zip(axes[0], arms, strict=True):
        plots.heatmap(ax, table[table["arm"] == arm], title=plots.NAMES[arm], colour_bar=arm == arms[-1])
    return figure


def _by_setting(decisions: pd.DataFrame) -> pd.DataFrame:
    return stats.rate_table(decisions, by=("model", "arm", "threshold", "incentive_ratio", "round"))


@figure_of("collusion", _by_setting)
def collusion_grid(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Figure 6: collusion rate by threshold and incentive, a row an arm, a column a round."""
    arms, rounds = arms_of(table), sorted(table["round"].unique())
    figure, axes = grid(about(decisions, "Collusion rate"), len(arms), len(rounds), *_cell_size(table))
    for row, arm in zip(axes, arms, strict=True):
        for ax, number in zip(row, rounds, strict=True):
            part = table[(table["arm"] == arm) & (table["round"] == number)]
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


def _case(decisions: pd.DataFrame) -> pd.DataFrame:
    columns = ["model", "arm", "seed", "item", "round", "agent", "choice", "deviated", "capital", "succeeded", "valid"]
    return tipping.case_study(decisions, CASE).reindex(columns=[*columns, "words"])


@figure_of("collusion", _case)
def case_study(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Figure 5: one episode, agent by agent, the one whose collusion rose most.

    Where agents wrote freely it shows the ends of what `SPEAKERS` of them said (``words``), else all choices.
    None where its game was not played.
    """
    if table.empty:
        return None
    case, first, spoken = table, table.iloc[0], table["words"].notna().any()
    if spoken:
        case = case[case["agent"].isin(sorted(case["agent"].unique())[:SPEAKERS])]
    rounds, agents = case["round"].nunique(), case["agent"].nunique()
    size = (3.7 * rounds + 0.6, 1.15 * agents + 1) if spoken else (max(5.5, 1.5 * rounds + 1), 0.42 * agents + 1)
    figure, [[ax]] = grid(about(decisions, "Case study"), 1, 1, *size)
    title = f"{plots.NAMES[first['arm']]}, seed {first['seed']}\n{first['item']}"
    if spoken:
        plots.spoken(ax, case, title=title, characters=58, lines=6)
    else:
        plots.trace(ax, case, title=title)
    return figure
