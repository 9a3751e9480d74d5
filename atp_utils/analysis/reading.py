"""Figures read back in sentences: what is seen and how sure it is, computed from the numbers that the figure shows.

Notebooks put them below their figures as Markdown, so that no sentence can go stale. Words of judgement are those of
`study` and `scoreboard`; of any other interval it is said only on which side of 0 it lies.
"""

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from atp_utils.analysis import scoreboard, stats, study, tables, tool_use_tables, verdicts
from atp_utils.analysis.critical_mass import curves, fixed_points, mean_map
from atp_utils.analysis.drawing import TABLES, arms_of, drawn_by
from atp_utils.analysis.plots import NAMES

NOTHING = "The record has nothing to show here yet."
# One model's decisions and the figure's numbers of these -> sentences.
Reads = Callable[[pd.DataFrame, pd.DataFrame], Iterator[str]]
READINGS: dict[str, Reads] = {}


def reading_of(figure: str) -> Callable[[Reads], Reads]:
    """Register the decorated function as the reading of a figure of `drawing.FIGURES`."""

    def register(function: Reads) -> Reads:
        READINGS[figure] = function
        return function

    return register


def read(decisions: pd.DataFrame, figure: str) -> str:
    """What ``figure`` shows of ``decisions``, in Markdown: a list for every model that `gallery.draw` draws.

    A figure without a reading of its own, such as an added scenario's, is read as `of_rounds`.
    """
    reads, parts = READINGS.get(figure, of_rounds), []
    for model, rows in drawn_by(figure, decisions).groupby("model", observed=True):
        if lines := list(reads(rows, TABLES[figure](rows))):
            warning = stats.low_mass(rows)
            parts.append(_listed(f"**{model}**", lines + ([f"Careful, {warning}."] if warning else [])))
    return "\n\n".join(["**What we see.**", *parts]) if parts else NOTHING


def answered(answers: pd.DataFrame, *questions: str, scenario: str = "") -> str:
    """The verdicts of ``answers`` on questions of `study.QUESTIONS`, in Markdown.

    ``answers`` are `study.answers` of all decisions, also where a ``scenario`` is named: Holm's p is over all rows.
    """
    parts = []
    for name in questions:
        rows = answers[answers["question"] == name]
        rows = rows[rows["scenario"] == scenario] if scenario else rows
        lines = [
            f"{row.model}, {NAMES[row.arm]}{f' ({row.about})' if row.about else ''}: "
            + (f"{points(row.estimate, row.low, row.high)}, **{row.verdict}**" if row.n else f"**{row.verdict}**")
            for row in rows.itertuples()
        ]
        parts.append(_listed(f"*{study.QUESTIONS[name][0]}*", lines or ["what it needs has not been run"]))
    return "\n\n".join(parts)


def claimed(scores: pd.DataFrame, item: str) -> str:
    """The paper's claims of an ``item``, such as "Table 1", beside ours (`scoreboard.scores`), in Markdown."""
    own = scores[scores["item"] == item]
    run = own[own["status"] != scoreboard.NOT_RUN]
    lines = []
    for row, limit in zip(run.itertuples(), scoreboard.limits(run), strict=True):
        paper = " and ".join(f"{100 * number:+.1f}" for number in row.paper)
        theirs = f" (the paper's: {paper})" if paper else ""
        ours = points(row.estimate, row.low, row.high)
        lines.append(f"{row.model}, {row.claim}: {ours}{theirs}, **{row.status}**{limit}")
    return _listed(f"*{item}*: {len(run)} of {len(own)} claims were run.", lines)


def verdicts_in_short(answers: pd.DataFrame) -> str:
    """How often each question of `study.answers` got which verdict, in Markdown."""
    lines = []
    for name, rows in answers.groupby("question", sort=False):
        counts = rows["verdict"].value_counts(sort=False)
        lines.append(f"*{study.QUESTIONS[name][0]}* {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}")
    return _listed(f"{len(answers)} answers to {len(lines)} questions:", lines) if lines else NOTHING


def points(value: float, low: float, high: float) -> str:
    """``+5.4 points [-7.8, 18.7]``, from fractions; without an interval it is said that there is none."""
    if pd.isna(value):
        return "no estimate"
    form = stats.form_of(value, low, high)
    return f"{100 * value:+{form}} points{stats.ends(low, high, form) or ' without an interval'}"


def placed(value: float, low: float, high: float) -> str:
    """`points`, and on which side of 0 the interval lies, in words."""
    where = "too few units" if pd.isna(low) else "above 0" if low > 0 else "below 0" if high < 0 else "holds 0"
    return f"{points(value, low, high)}, {where}"


def changes(
    decisions: pd.DataFrame, value: str = "", what: str = "", units: Sequence[str] = ("environment",)
) -> Iterator[str]:
    """First round, last round and the change between them of each arm, and on which side of 0 its interval lies.

    ``value`` is a column, by default `stats.value_of`; ``what`` is its name, ``units`` are those of the interval.
    """
    for arm in arms_of(decisions):
        own = decisions[decisions["arm"] == arm]
        column = value or stats.value_of(own)
        name = what or {"p_deviate": "P(deviate)"}.get(column, "the deviation rate")
        rates = stats.rate_table(own, column, ["round"], units).dropna(subset="rate")
        if rates.empty:
            yield f"{NAMES[arm]}: no valid decision"
            continue
        first, last = rates.iloc[0], rates.iloc[-1]
        said = f"{NAMES[arm]}: {name} is {_percent(first)} in round {first['round']:.0f}"
        if len(rates) > 1:
            change, *ends = stats.mean_interval(stats.unit_changes(own, column, units))
            said += f" and {_percent(last)} in round {last['round']:.0f}: {placed(change, *ends)}"
        yield said


def listed(title: str, lines: Iterator[str]) -> str:
    """``lines`` as a Markdown list below a ``title``; `NOTHING` where there are none."""
    return _listed(title, found) if (found := list(lines)) else NOTHING


def training(log: pd.DataFrame) -> Iterator[str]:
    """First and last step of each measure of a training's log."""
    first, last = log.iloc[0], log.iloc[-1]
    for column in log.columns.drop("step"):
        ends = f"{first[column]:.3g} at step {first['step']:.0f}, {last[column]:.3g} at step {last['step']:.0f}"
        yield f"{column.replace('_', ' ')}: {ends}"


def episode(rows: pd.DataFrame) -> Iterator[str]:
    """One collusion episode that was played: how many colluded in each round, and whether that was enough."""
    for number, own in rows[rows["succeeded"].notna()].groupby("round", sort=True):
        count, valid = int(own["deviated"].fillna(False).sum()), int(own["valid"].sum())
        met, capital = "enough" if own["succeeded"].iloc[0] else "not enough", own["capital"].mean()
        yield f"round {number}: {count} of {valid} valid choices collude, {met}; mean capital {capital:.2f}"


@reading_of("tool_use")
def of_tools(decisions: pd.DataFrame, _: pd.DataFrame | None = None) -> Iterator[str]:
    """Changes of tool usage and accuracy on complex problems, and of P(tool) where a forced choice recorded it."""
    names = ["tool usage", "accuracy"] + ["P(tool)"] * bool(decisions["p_deviate"].notna().any())
    for name in names:
        yield from changes(tool_use_tables.measured(decisions, name), "value", name, tool_use_tables.UNITS)


# --- What each figure shows --------------------------------------------------------------------------------


@reading_of("rounds")
@reading_of("role_play")
def of_rounds(decisions: pd.DataFrame, _: pd.DataFrame) -> Iterator[str]:
    yield from changes(decisions)


@reading_of("role_play_environments")
def of_environments(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for arm in arms_of(table):
        wide = table[table["arm"] == arm].pivot(index="environment", columns="round", values="p_deviate").astype(float)
        change = (wide.iloc[:, -1] - wide.iloc[:, 0]).dropna()
        if wide.shape[1] > 1 and len(change):
            most, least = change.idxmax(), change.idxmin()
            yield (
                f"{NAMES[arm]}: P(deviate) rose in {(change > 0).sum()} of {len(change)} environments; between "
                f"{100 * change[least]:+.1f} points ({least}) and {100 * change[most]:+.1f} ({most})"
            )


@reading_of("collusion")
def of_thresholds(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, threshold), rows in table.dropna(subset="rate").groupby(["arm", "threshold"], observed=True):
        first, last = rows.iloc[0], rows.iloc[-1]
        yield (
            f"{NAMES[arm]}, k = {threshold}: {_percent(first)} collude in round {first['round']}, {_percent(last)} in "
            f"round {last['round']}"
        )


@reading_of("recollusion")
def of_recollusion(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for arm in arms_of(table):
        own = table[table["arm"] == arm]
        known = own[own["n"] > 0]
        said = f"{NAMES[arm]}: a first round succeeded in {len(known)} of {len(own)} settings"
        if len(known):
            mean = (known["rate"] * known["n"]).sum() / known["n"].sum()
            said += (
                f"; behind it {100 * mean:.1f} % of {known['n'].sum()} decisions collude, between "
                f"{100 * known['rate'].min():.1f} % and {100 * known['rate'].max():.1f} % by setting; more than "
                f"{scoreboard.OFTEN:.0%} in {(known['rate'] > scoreboard.OFTEN).sum()} of them"
            )
        yield said


@reading_of("collusion_grid")
def of_grid(decisions: pd.DataFrame, _: pd.DataFrame) -> Iterator[str]:
    for (_, arm, number), row in tables.largest_differences(decisions).iterrows():
        own = decisions[decisions["arm"] == arm]
        lies = [
            f"over {count} {name} rates lie {row[column]:.1f} points apart" if count > 1 else f"there is one {one} only"
            for column, name, one in (
                ("threshold", "thresholds", "threshold"),
                ("incentive_ratio", "incentives", "incentive"),
            )
            for count in [own[column].nunique()]
        ]
        yield f"{NAMES[arm]}, round {number}: {'; '.join(lies)}"


@reading_of("case_study")
def of_case(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    if len(table):
        yield f"{NAMES[table['arm'].iloc[0]]}, {table['item'].iloc[0]}, seed {table['seed'].iloc[0]}"
        yield from episode(table)


@reading_of("conditions")
def of_conditions(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for arm in arms_of(table):
        own = table[(table["arm"] == arm) & table["drift"].notna()].set_index("condition")
        if verdicts.STANDARD in own.index:
            row = own.loc[verdicts.STANDARD]
            yield f"{NAMES[arm]}, standard: {placed(*row[['drift', 'low', 'high']])}"
        for name, row in own[own["against"].notna()].iterrows():
            less = placed(*row[["against", "against_low", "against_high"]])
            yield f"{NAMES[arm]}, {name.replace('_', ' ')} less standard: {less}"


@reading_of("role_play_paths")
@reading_of("collusion_paths")
def of_paths(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, name), rows in table.groupby(["arm", "condition"], observed=True):
        ends = " and ".join(f"{_percent(row)} in round {row['round']}" for _, row in rows.iloc[[0, -1]].iterrows())
        yield f"{NAMES[arm]}, {name.replace('_', ' ')}: {ends}"


@reading_of("survival")
def of_survival(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, name), rows in table.groupby(["arm", "condition"], observed=True):
        last = rows.loc[rows["round"].idxmax()]
        yield (
            f"{NAMES[arm]}, {name.replace('_', ' ')}: of {rows['n'].iloc[0]} agents that kept the rule in round 1, "
            f"{_percent(last)} kept it up to round {last['round']}"
        )


@reading_of("dose")
def of_doses(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, told, ratio), rows in table.groupby(["arm", "told", "payoff_ratio"], observed=True):
        rows = rows.sort_values("past_deviant")
        first, last = rows.iloc[0], rows.iloc[-1]
        if told in ("own", "other") and len(rows) > 1:
            yield (
                f"{NAMES[arm]}, {told} history, deviating pays {ratio:g} times: P(deviate) is {_percent(first)} behind "
                f"{first['past_deviant']} deviations and {_percent(last)} behind {last['past_deviant']}"
            )


@reading_of("response")
def of_response(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, threshold), own in table.groupby(["arm", "threshold"], observed=True):
        for name in ("abstained", "colluded"):
            rows = own[own["own"] == name].sort_values("others")
            first, last = rows.iloc[0], rows.iloc[-1]
            yield (
                f"{NAMES[arm]}, k = {threshold}, had {name}: {_percent(first)} collude where {first['others']} others "
                f"did, {_percent(last)} where {last['others']} did"
            )
        found = fixed_points(*mean_map(*curves(own)[1:]))
        settles, critical = ([f"{share:.2f}" for share, stable in found if stable == kind] for kind in (True, False))
        mass = f"critical masses at {', '.join(critical)}" if critical else "no critical mass"
        yield f"{NAMES[arm]}, k = {threshold}: the mean share settles at {', '.join(settles) or 'none'}; {mass}"


@reading_of("chain")
def of_chain(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, threshold), rows in table.groupby(["arm", "threshold"], observed=True):
        known = rows[rows["low"].notna()]
        held = ((known["low"] <= known["predicted"]) & (known["predicted"] <= known["high"])).sum()
        far = rows.loc[(rows["predicted"] - rows["played"]).abs().idxmax()]
        yield (
            f"{NAMES[arm]}, k = {threshold}: the prediction lies in {held} of {len(known)} intervals of the rounds "
            f"played; farthest off in round {far['round']}, {100 * far['predicted']:.1f} % against "
            f"{_percent(far, 'played')}"
        )


@reading_of("group_size")
def of_sizes(_: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    for (arm, size), rows in table.groupby(["arm", "agents"], observed=True):
        ends = rows.sort_values("start")["end"]
        yield (
            f"{NAMES[arm]}, {size:,} agents: begun with nobody they end at {100 * ends.iloc[0]:.1f} %, with all at "
            f"{100 * ends.iloc[-1]:.1f} %"
        )


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, "", *(f"- {line}" for line in lines)])


def _percent(row: pd.Series, name: str = "rate") -> str:
    return f"{100 * row[name]:.1f} %{stats.ends(row['low'], row['high'])}"
