"""Figures of what could look like tipping, of dose and response, and of critical mass; notebooks 9 and 10."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from atp_utils.analysis import critical_mass, dose_response, plots, stats, tipping, verdicts
from atp_utils.analysis.drawing import about, arms_of, figure_of, grid

PLACES = {"none": -2.0, "unrelated": -1.0}
RATIO_COLOURS = ("#999999", "#CC79A7", "#0072B2", "#D55E00", "#009E73")
SURVIVAL = {verdicts.STANDARD: ("#0072B2", "-"), verdicts.CONTROL: ("#D55E00", "--")}  # colour and line
PATHS = SURVIVAL | {"unrelated_history": ("#009E73", ":"), "unrelated_second": ("#56B4E9", "-.")}
WRITTEN = ("forced_history",)
REPEATS = 400
SIZES = (8, 100, 10_000, 1_000_000)


@figure_of("role_play", verdicts.conditions, ())
def conditions(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Change of P(deviate) from the first round to the last, a line a condition and a panel an arm.

    Where conditions were not played with the same items, each says how many it had.
    """
    table = table[table["drift"].notna()]
    arms = arms_of(table)
    if not arms:
        return None
    names = list(dict.fromkeys(table["condition"]))
    played = table.groupby("condition")["items"].max()
    labels = [name.replace("_", " ") + f", {played[name]} items" * (played.nunique() > 1) for name in names]
    size = (4.2, 0.34 * len(names) + 1.3)
    figure, axes = grid(about(decisions, "Last round minus first"), 1, len(arms), *size, sharex=True, sharey=True)
    for ax, arm in zip(axes[0], arms, strict=True):
        rows = table[table["arm"] == arm].set_index("condition").reindex(names)
        colour, marker = plots.STYLES[arm]
        points = 100 * rows[["drift", "low", "high"]]
        ax.axvline(0, color="0.6", linewidth=1)
        ax.hlines(range(len(names)), points["low"], points["high"], color=colour, alpha=0.5, linewidth=3)
        ax.plot(points["drift"], range(len(names)), color=colour, marker=marker, linestyle="")
        ax.set(title=plots.NAMES[arm], xlabel="percentage points", ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), labels)
    return figure


def _paths(decisions: pd.DataFrame) -> pd.DataFrame:
    """Rates by condition and round of arms that have several, of those items that an arm has met in all of them."""
    by_arm, by_item = (
        decisions.groupby(by, observed=True)["condition"].transform("nunique") for by in (["arm"], ["arm", "item"])
    )
    met = decisions[(by_arm > 1) & (by_item == by_arm)]
    return stats.rate_table(met, stats.value_of(decisions), ("model", "arm", "condition", "round"))


def _draw_paths(decisions: pd.DataFrame, table: pd.DataFrame, label: str) -> Figure | None:
    arms = arms_of(table)
    if not arms or table["round"].nunique() < 2:
        return None
    known = [name for name in PATHS if name in set(table["condition"])]
    figure, axes = grid(about(decisions, "Choices by what the rounds before paid"), 1, len(arms), 3.6, 3.6, sharey=True)
    for ax, arm in zip(axes[0], arms, strict=True):
        for name in known:
            colour, line = PATHS[name]
            rows = table[(table["arm"] == arm) & (table["condition"] == name)]
            ax.plot(rows["round"], 100 * rows["rate"], line, color=colour, marker="o", label=name.replace("_", " "))
            ax.fill_between(rows["round"], 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.1, linewidth=0)
        ax.set(title=plots.NAMES[arm], xlabel="round", ylim=(-3, 103), xticks=sorted(table["round"].unique()))
    axes[0, 0].set_ylabel(label)
    _legend_below(figure, axes[0, 0].lines, len(known))
    return figure


def _legend_below(figure: Figure, lines: Sequence[Line2D], columns: int) -> None:
    """One legend for all panels, of the labelled ``lines`` of one of them, where it hides nothing that is drawn."""
    figure.legend(handles=[*lines], loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


@figure_of("role_play", _paths, tuple(PATHS))
def role_play_paths(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """P(deviate) by round under the paper's payoffs, under equal ones, and behind rounds about something else.

    A panel an arm that met two of these at least, of the items that it met in all. None without one.
    """
    return _draw_paths(decisions, table, "P(deviate), %")


@figure_of("collusion", _paths, tuple(PATHS))
def collusion_paths(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """P(collude) by round under the paper's payoffs, under equal ones, and behind rounds about something else.

    As `role_play_paths`.
    """
    return _draw_paths(decisions, table, "P(collude), %")


def _survivors(decisions: pd.DataFrame) -> pd.DataFrame:
    table = verdicts.time_to_tip(decisions)
    return table[table["condition"].isin(SURVIVAL)]


@figure_of("role_play", _survivors, tuple(SURVIVAL))
def survival(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Share of the agents that complied in round 1 and never deviated since, by condition, a panel an arm.

    With 95 % intervals from round 2 on: in round 1 all comply by definition.
    """
    arms = arms_of(table)
    if not arms or table["round"].nunique() < 2:
        return None
    figure, axes = grid(about(decisions, "Still compliant"), 1, len(arms), 3.6, 3.3, sharey=True)
    for ax, arm in zip(axes[0], arms, strict=True):
        for name, (colour, line) in SURVIVAL.items():
            rows = table[(table["arm"] == arm) & (table["condition"] == name)]
            # A round is as wide as any other, around its tick; the last needs an end.
            rows = pd.concat([rows, rows.tail(1).assign(round=lambda last: last["round"] + 1)])
            x, label = rows["round"] - 0.5, name.replace("_", " ")
            ax.step(x, 100 * rows["rate"], line, where="post", color=colour, label=label)
            low, high = 100 * rows["low"], 100 * rows["high"]
            ax.fill_between(x, low, high, step="post", color=colour, alpha=0.12, linewidth=0)
        ax.set(title=plots.NAMES[arm], xlabel="round", ylim=(-3, 103), xticks=sorted(table["round"].unique()))
    axes[0, 0].set_ylabel("still compliant, %")
    _legend_below(figure, axes[0, 0].lines, len(SURVIVAL))
    return figure


def _by_dose(decisions: pd.DataFrame) -> pd.DataFrame:
    return dose_response.doses(dose_response.written(decisions))


@figure_of("role_play", _by_dose, WRITTEN)
def dose(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """P(deviate) against deviations in a written history, a line a payoff ratio, a panel an arm; 95 % intervals."""
    rows, arms = dose_response.written(decisions), arms_of(table)
    if not arms:
        return None
    most = int(table["past_deviant"].max())
    figure, axes = grid(about(rows, "Dose and response"), 1, len(arms), 4.6, 3.9, sharey=True)
    for ax, arm in zip(axes[0], arms, strict=True):
        _doses(ax, table[table["arm"] == arm])
        ticks = [*(PLACES[name] for name in PLACES if name in set(table["told"])), *range(most + 1)]
        names = {value: name.replace("unrelated", "un-\nrelated") for name, value in PLACES.items()}
        ax.set_xticks(ticks, [names.get(tick, str(tick)) for tick in ticks])
        ax.set(title=plots.NAMES[arm], xlabel=f"deviations in {most} written rounds", ylim=(-3, 103))
        ax.set_ylabel("P(deviate), %" if arm == arms[0] else "")
    axes[0, -1].legend(title="deviating pays", loc="best", frameon=True, fontsize="small")
    return figure


def _doses(ax: Axes, table: pd.DataFrame) -> None:
    ratios = sorted(table["payoff_ratio"].unique())
    for place, ratio in enumerate(ratios):
        colour = RATIO_COLOURS[place % len(RATIO_COLOURS)]
        shift = 0.06 * (place - (len(ratios) - 1) / 2)
        for told, rows in table[table["payoff_ratio"] == ratio].groupby("told"):
            x = rows["past_deviant"].astype(float) + PLACES.get(told, 0.0) + shift
            ends = 100 * rows["low"], 100 * rows["high"]
            style = {"own": "-", "other": "--"}.get(told, "")
            label = f"{ratio:g} times as much{', told of another' if told == 'other' else ''}"
            ax.vlines(x, *ends, color=colour, alpha=0.4)
            ax.plot(
                x, 100 * rows["rate"], color=colour, marker="o" if told != "other" else "s", linestyle=style,
                label=label if told in ("own", "other") else None,
            )  # fmt: skip


def _responses(decisions: pd.DataFrame) -> pd.DataFrame:
    """The response table at the incentive ratio nearest to 1."""
    rows = dose_response.written(decisions, "collusion")
    if rows.empty:
        return pd.DataFrame(columns=[*critical_mass.KEYS, "own", "others", "rate"])
    return critical_mass.response(tipping.at_ratio_one(rows))


@figure_of("collusion", _responses, WRITTEN)
def response(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """P(collude) by how many others did, for agents that had colluded or not; the map of shares and its fixed points.

    A row an arm, a column a threshold, at the incentive ratio nearest to 1.
    """
    arms, thresholds = arms_of(table), sorted(table["threshold"].unique())
    if not arms:
        return None
    title = about(decisions, "Response to others")
    figure, axes = grid(title, len(arms), len(thresholds), 3.4, 3.2, sharex=True, sharey=True)
    for row, arm in zip(axes, arms, strict=True):
        for ax, threshold in zip(row, thresholds, strict=True):
            own = table[(table["arm"] == arm) & (table["threshold"] == threshold)]
            if len(own):
                _response(ax, own)
            ax.set(title=f"{plots.NAMES[arm]}, k = {threshold}", xlim=(-0.02, 1.02), ylim=(-3, 103))
    for ax in axes[-1]:
        ax.set_xlabel("share that colluded")
    for ax in axes[:, 0]:
        ax.set_ylabel("P(collude), %")
    axes[0, 0].legend(loc="best", frameon=True, fontsize="small")
    return figure


def _response(ax: Axes, own: pd.DataFrame) -> None:
    for name, colour, marker in (("abstained", "#0072B2", "o"), ("colluded", "#D55E00", "s")):
        rows = own[own["own"] == name].sort_values("others")
        x = rows["others"] / max(rows["others"].max(), 1)
        ax.plot(x, 100 * rows["rate"], color=colour, marker=marker, markersize=4, label=f"had {name}")
        ax.fill_between(x, 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.12, linewidth=0)
    _, abstained, colluded = critical_mass.curves(own)
    x, f = critical_mass.mean_map(abstained, colluded)
    ax.plot(x, 100 * f, color="0.2", linewidth=2, label="share next")
    ax.plot([0, 1], [0, 100], color="0.6", linewidth=1, linestyle=":")
    for share, stable in critical_mass.fixed_points(x, f):
        ax.plot(
            share, 100 * share, "o", markersize=9, markeredgecolor="0.2", markerfacecolor="0.2" if stable else "white"
        )


def _played(decisions: pd.DataFrame) -> pd.DataFrame:
    table = _responses(decisions)
    return critical_mass.beside(table, stats.standard(decisions)) if len(table) else table


@figure_of("collusion", _played, (verdicts.STANDARD, *WRITTEN))
def chain(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """The Markov chain's prediction of each round (line) beside the rounds that were played (points, 95 %)."""
    arms, thresholds = arms_of(table), sorted(table["threshold"].unique())
    if not arms:
        return None
    figure, axes = grid(about(decisions, "Played and predicted"), 1, len(thresholds), 3.4, 3.2, sharey=True)
    for ax, threshold in zip(axes[0], thresholds, strict=True):
        for place, arm in enumerate(arms):
            rows = table[(table["threshold"] == threshold) & (table["arm"] == arm)]
            colour, marker = plots.STYLES[arm]
            x = rows["round"].astype(float) + 0.06 * (place - (len(arms) - 1) / 2)
            ax.plot(x, 100 * rows["predicted"], color=colour, label=f"{plots.NAMES[arm]}, predicted")
            ax.vlines(x, 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.4)
            ax.plot(
                x, 100 * rows["played"], color=colour, marker=marker, linestyle="", label=f"{plots.NAMES[arm]}, played"
            )
        ax.set(title=f"k = {threshold}", xlabel="round", ylim=(-3, 103), xticks=sorted(table["round"].unique()))
    axes[0, 0].set_ylabel("collusion, %")
    lines = axes[0, -1].lines
    _legend_below(figure, [*lines[::2], *lines[1::2]], 2)  # a column predicted, a column played
    return figure


def _ends(decisions: pd.DataFrame) -> pd.DataFrame:
    """Where groups of `SIZES` end (means of `REPEATS`), by arm and share at the start, at the lowest threshold."""
    table, rows = _responses(decisions), []
    starts = np.linspace(0, 1, 21)
    for arm in arms_of(table):
        own = table[(table["arm"] == arm) & (table["threshold"] == table["threshold"].min())]
        _, *both = critical_mass.curves(own)
        for size in SIZES:
            ends = critical_mass.simulate(*both, size, np.tile(starts, (REPEATS, 1))).mean(axis=0)
            known = arm, own["threshold"].iloc[0], size
            rows += [(*known, start, end) for start, end in zip(starts, ends, strict=True)]
    return pd.DataFrame(rows, columns=["arm", "threshold", "agents", "start", "end"])


@figure_of("collusion", _ends, WRITTEN)
def group_size(decisions: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Where groups of 8 to a million agents end, against the share that they begin with; a panel an arm.

    At the lowest threshold that was measured. Agents are taken to see shares as those of the measured group did.
    """
    arms = arms_of(table)
    if not arms:
        return None
    title = about(decisions, f"Where groups end, k = {table['threshold'].iloc[0]} of 8")
    figure, axes = grid(title, 1, len(arms), 3.6, 3.3, sharey=True)
    for ax, arm in zip(axes[0], arms, strict=True):
        for place, (size, rows) in enumerate(table[table["arm"] == arm].groupby("agents")):
            ax.plot(rows["start"], 100 * rows["end"], color=RATIO_COLOURS[place], label=f"N = {size:,}")
        ax.set(title=plots.NAMES[arm], xlabel="share at the start", ylim=(-3, 103))
    axes[0, 0].set_ylabel("share after 50 rounds, %")
    axes[0, -1].legend(loc="best", frameon=True, fontsize="small")
    return figure
