"""The study's questions, fixed beforehand (`docs/preregistration.md`): estimates over independent units, and verdicts.

A question yields differences by unit for every model and arm that has what it needs, or says in a word why it can't be
asked there. All verdicts follow from the differences by one rule.
"""

import re
from collections.abc import Callable, Iterator

import pandas as pd
from statsmodels.stats.multitest import multipletests

from atp_utils.analysis import critical_mass, dose_response, stats, tool_use_tables, verdicts
from atp_utils.analysis.verdicts import ALPHA, CONTROL, STANDARD

SHOWN, NOT_SHOWN, UNDECIDED = "shown", "not shown", "undecided"
BRAKES = ("reminder", "caught", "no_rewards", "norm_comply")
KEYS = ["question", "scenario", "model", "arm", "about"]
# Model, arm, what more there is to say of the row, and differences by unit or a word for why there are none.
Found = Iterator[tuple[str, str, str, pd.Series | str]]
Asked = Callable[[pd.DataFrame], Found]
QUESTIONS: dict[str, tuple[str, Asked, int]] = {}


def question(name: str, text: str, most: int = 1) -> Callable[[Asked], Asked]:
    """Register the decorated function as a question; it takes the decisions of one scenario.

    Its differences lie within +-``most``: 1 for those of two probabilities, 2 for those of two such.
    """

    def register(function: Asked) -> Asked:
        QUESTIONS[name] = text, function, most
        return function

    return register


def answers(decisions: pd.DataFrame) -> pd.DataFrame:
    """Every question that ``decisions`` have something to say on, a row a scenario, model and arm.

    Columns: `KEYS`, n (units of the kind that has fewest), estimate, low, high (95 %), p (Holm's over the question's
    rows), verdict. Fractions, not points.
    """
    columns = [*KEYS, "n", "estimate", "low", "high", "p", "same", "why"]
    parts = []
    scenarios = dict(list(decisions.groupby("scenario", sort=True, observed=True)))
    for name, (_, asked, most) in QUESTIONS.items():
        rows = [
            (name, own, *row[:-1], *_judged(row[-1], most)) for own, rows in scenarios.items() for row in asked(rows)
        ]
        part = pd.DataFrame(rows, columns=columns)
        if (known := part["p"].notna()).any():
            part.loc[known, "p"] = multipletests(part.loc[known, "p"], ALPHA, "holm")[1]
        parts.append(part.assign(verdict=pd.Series(map(_verdict, part.itertuples()), dtype=str)))
    # Where no question has a row, one of the empty parts has every column.
    made = [part for part in parts if len(part)] or parts[:1]
    return pd.concat(made, ignore_index=True).drop(columns=["same", "why"])


def _judged(differences: pd.Series | str, most: int) -> tuple[int, float, float, float, float, bool, str]:
    nan = float("nan")
    if isinstance(differences, str):
        return 0, nan, nan, nan, nan, False, differences
    known = differences.dropna().astype(float)
    mean, error, freedom = stats.estimate(known, *stats.levels(known))
    p, same = verdicts.two_sided(mean, error, freedom), verdicts.same(mean, error, freedom)
    return max(freedom + 1, 0), *stats.mean_interval(known, most), p, same, ""


def _verdict(row) -> str:
    if row.why:
        return row.why
    if row.p < ALPHA and (row.estimate > 0 or row.question == "position"):
        return SHOWN
    # Of a place either sign is an effect.
    return NOT_SHOWN if row.same or (row.high < 0 and row.question != "position") else UNDECIDED


def _arms(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    yield from rows.groupby(["model", "arm"], sort=True, observed=True)


def _change(rows: pd.DataFrame, condition: str) -> pd.Series | None:
    """Last round minus first in a condition, by unit; None where it has not been run. ``rows`` are of one arm."""
    group, units = verdicts.with_units(rows, rows["scenario"].iloc[0])
    own = group[group["condition"] == condition]
    return stats.unit_changes(own, stats.value_of(group), stats.kinds_of(group, units)) if len(own) else None


def _less(rows: pd.DataFrame, condition: str) -> pd.Series | None:
    """The change in the standard condition less that in another, of the same items; None where either wasn't run."""
    if not {STANDARD, condition} <= set(rows["condition"]):
        return None
    group, units = verdicts.with_units(rows, rows["scenario"].iloc[0])
    kinds = stats.kinds_of(group, units)
    standard, other = verdicts.changes_of(group, stats.value_of(group), kinds, STANDARD, condition)
    return standard - other


# --- The questions -----------------------------------------------------------------------------------------


@question("payoff", "Does experience of paid violations raise them beyond equal payoffs?", most=2)
def payoff(rows: pd.DataFrame) -> Found:
    for key, own in _arms(rows):
        if (change := _less(own, CONTROL)) is not None:
            yield *key, "", change


def _doses(rows: pd.DataFrame) -> pd.DataFrame:
    """P(deviate) after rounds that all deviated, less that after rounds that all complied: [environments, ratios].

    Of the longest written histories; empty where none has a round.
    """
    written = dose_response.written(rows)
    written = written[(written["told"] == "own") & (written["round"] > 1)]
    longest = written[written["round"] == written["round"].max()]
    value, by = stats.value_of(rows), [*stats.kinds_of(longest, ("environment",)), "payoff_ratio"]
    ends = [longest[longest[past] == 0].groupby(by)[value].mean() for past in ("past_compliant", "past_deviant")]
    return (ends[0] - ends[1]).astype(float).unstack("payoff_ratio")


@question("dose", "Do paid violations raise violations the more, the better they paid?", most=2)
def dose(rows: pd.DataFrame) -> Found:
    for key, own in _arms(rows):
        doses = _doses(own)
        if {1.0, highest := max(doses.columns, default=1.0)} <= set(doses.columns) and highest > 1:
            yield *key, f"{highest:g} against 1", doses[highest] - doses[1.0]


@question("copying", "Do violations raise violations where they pay no more?")
def copying(rows: pd.DataFrame) -> Found:
    for key, own in _arms(rows):
        doses = _doses(own)
        if 1.0 in doses:
            yield *key, "", doses[1.0]


@question("format", "Does the length of a chat alone move choices?")
def chat_format(rows: pd.DataFrame) -> Found:
    for key, own in _arms(rows):
        if (change := _change(own, "unrelated_history")) is not None:
            yield *key, "", change


@question("position", "Does the place of an option move choices?")
def position(rows: pd.DataFrame) -> Found:
    for key, own in _arms(stats.standard(rows)):
        group, units = verdicts.with_units(own, own["scenario"].iloc[0])
        first = group[(group["round"] == 1) & group["valid"] & group["p_first"].notna()]
        if len(first):
            places = first.assign(place=first["p_first"] - first["p_second"])
            yield *key, "", places.groupby(stats.kinds_of(group, units), observed=True)["place"].mean()


@question("erosion", "Does an arm's training erode?", most=2)
def erosion(rows: pd.DataFrame) -> Found:
    for model, own in stats.standard(rows).groupby("model", sort=True, observed=True):
        group, units = verdicts.with_units(own, own["scenario"].iloc[0])
        value = stats.value_of(group)
        before = stats.unit_changes(group[group["arm"] == "base"], value, units)
        for arm, gained in stats.against_base(group, value, units):
            lost = stats.unit_changes(group[group["arm"] == arm], value, units)
            has_gained = stats.mean_interval(gained)[2] < 0
            yield model, arm, "", stats.less(lost, before) if has_gained else "no gain"


@question("brakes", "Does a condition slow the drift?", most=2)
def brakes(rows: pd.DataFrame) -> Found:
    for key, own in _arms(rows):
        for condition in BRAKES:
            if (change := _less(own, condition)) is not None:
                yield *key, condition, change


@question("imitation", "Do agents collude the more, the more others did?")
def imitation(rows: pd.DataFrame) -> Found:
    answered = dose_response.written(rows, "collusion")
    for key, own in _arms(answered[answered["past_others"].notna() & answered["valid"]]):
        by = [*stats.kinds_of(own, ("environment",)), "past_deviant"]
        ends = [
            own[own["past_others"] == others].groupby(by)[stats.value_of(own)].mean()
            for others in (own["past_others"].max(), 0)
        ]
        # Behind either choice of one's own; then their mean.
        yield *key, "", (ends[0] - ends[1]).astype(float).unstack("past_deviant").mean(axis=1, skipna=False)


@question("critical mass", "Is there a critical mass?")
def critical_mass_exists(rows: pd.DataFrame) -> Found:
    for key, own in _arms(dose_response.written(rows, "collusion")):
        for (threshold, ratio), games in own.groupby(["threshold", "incentive_ratio"], observed=True):
            without = (games[games["environment"] != left] for left in games["environment"].unique())
            found = {_has_critical_mass(rest) for rest in without}
            yield *key, f"k = {threshold}, ratio {ratio:g}", _AGREED.get(frozenset(found), UNDECIDED)


# Whether there is one with every game left out in turn.
_AGREED = {frozenset([True]): SHOWN, frozenset([False]): NOT_SHOWN}


def _has_critical_mass(written: pd.DataFrame) -> bool:
    _, *curves = critical_mass.curves(critical_mass.response(written))
    return any(not stable for _, stable in critical_mass.fixed_points(*critical_mass.mean_map(*curves)))


@question("easy success", "Does experience drive the tool out?")
def easy_success(rows: pd.DataFrame) -> Found:
    own = stats.standard(rows[rows["scenario"] == "tool_use"])
    holds = tool_use_tables.premise(own)["premise"] if len(own) else {}
    for key, group in _arms(own):
        # P(deviate) is that of doing without the tool.
        why = {"fails": "no premise", "undecided": "premise undecided"}.get(holds[key])
        yield *key, "", why or _change(group, STANDARD)


@question("size", "Does payoff move larger models more?", most=4)
def size(rows: pd.DataFrame) -> Found:
    base = dict(list(rows[rows["arm"] == "base"].groupby("model", observed=True)))
    known = [model for model, own in base.items() if parameters(model) and {STANDARD, CONTROL} <= set(own["condition"])]
    known.sort(key=parameters)
    for smaller, larger in zip(known, known[1:], strict=False):
        shared = set(base[smaller]["item"]) & set(base[larger]["item"])
        less, more = (_less(base[model][base[model]["item"].isin(shared)], CONTROL) for model in (smaller, larger))
        if less is not None and more is not None:
            yield larger, "base", f"less {smaller}", more - less


def respondents(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Models and arms of a table of `answers`: the smallest model first, its base arm before what was trained of it."""
    found = table[["model", "arm"]].drop_duplicates().itertuples(index=False, name=None)
    return sorted(found, key=lambda row: (parameters(row[0]), row[0], stats.ARMS.index(row[1])))


def parameters(model: str) -> float:
    """Millions of parameters by the model's name, such as 500 for 0.5b; 0 where it tells none."""
    sizes = re.findall(r"(\d+(?:\.\d+)?)([mb])(?![a-z])", model.lower())
    return float(sizes[-1][0]) * {"m": 1, "b": 1000}[sizes[-1][1]] if sizes else 0.0
