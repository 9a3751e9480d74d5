"""Rates and their intervals. The independent units are environments (and agents with a history), not rows.

Decisions within an environment share a persona, a rule and often a history; intervals over rows would treat them as
independent and be too narrow. `benchmarks/coverage.py` simulates how often the intervals hold the truth.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import binomtest, t

ARMS = ("base", "dpo", "grpo")
LEVEL = 0.95
CUT = "cut"  # the fault (`evolution.protocol.FAULTS`) of a reply that the token limit ended before its answer
# A forced choice between answers that are less probable together says little of what a model would write.
LEAST_MASS = 0.5


def interval(
    values: Sequence[float], *units: Sequence[Any], weights: Sequence[float] | None = None, proportion: bool = True
) -> tuple[float, float]:
    """95 % interval of ``sum(values) / sum(weights)``; rows with one unit in common depend on each other.

    ``units`` are sequences that name each row's unit of a kind, such as its environment and its agent. The variance is
    that of the units' sums of residuals (of several kinds: that of each, less that of each two's crossing, and so on;
    never less than one kind's alone), and t has one degree of freedom less than the fewest units. A ``proportion``'s
    interval is taken on the logit scale, so that it stays within (0, 1); where all values are 0, or all are 1, it is
    the exact (Clopper-Pearson) interval with units as trials. No interval, (nan, nan), for fewer than two units of a
    kind, and where nothing varies.
    """
    rate, error, freedom = estimate(values, *units, weights=weights)
    y = np.asarray(values, dtype=float)
    if freedom < 1:
        return float("nan"), float("nan")
    if proportion and ((none := np.allclose(y, 0)) or np.allclose(y, 1 if weights is None else weights)):
        exact = binomtest(0 if none else freedom + 1, freedom + 1).proportion_ci(LEVEL)
        return float(exact.low), float(exact.high)
    if error == 0:
        return float("nan"), float("nan")
    half = t.ppf(0.5 + LEVEL / 2, freedom) * error
    if not proportion:
        return rate - half, rate + half
    middle, half = logit(rate), half / (rate * (1 - rate))
    return float(expit(middle - half)), float(expit(middle + half))


def estimate(
    values: Sequence[float], *units: Sequence[Any], weights: Sequence[float] | None = None
) -> tuple[float, float, int]:
    """``sum(values) / sum(weights)``, its standard error over ``units`` (`interval`), and its degrees of freedom.

    Where nothing varies the error is 0; where there are fewer than two units of a kind it is NaN, and freedom below 1.
    """
    y = np.asarray(values, dtype=float)
    x = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    codes = [pd.factorize(pd.Series(list(kind), dtype=object))[0] for kind in units]
    fewest = min((len(set(kind)) for kind in codes), default=0)
    rate = float(y.sum() / x.sum()) if x.any() else float("nan")
    if fewest < 2 or not x.any():
        return rate, float("nan"), fewest - 1
    residuals = (y - rate * x) / x.sum()
    each = [_variance(kind, residuals) for kind in codes]
    crossed = [
        (-1) ** (count + 1) * _variance(pd.factorize(pd.MultiIndex.from_arrays(kinds))[0], residuals)
        for count in range(2, len(codes) + 1)
        for kinds in combinations(codes, count)
    ]
    variance = max(sum(each) + sum(crossed), *each, 0.0)
    return rate, 0.0 if np.isclose(variance, 0, atol=1e-18) else float(np.sqrt(variance)), fewest - 1


def _variance(codes: np.ndarray, residuals: np.ndarray) -> float:
    sums = np.bincount(codes, residuals)
    return len(sums) / max(len(sums) - 1, 1) * float((sums**2).sum())


def kinds_of(decisions: pd.DataFrame, units: Sequence[str]) -> list[str]:
    """``units``, and the seeds of the arm's training where there are several: then they are units too."""
    several = "training_seed" in decisions and decisions["training_seed"].nunique() > 1
    return list(dict.fromkeys([*units, *(["training_seed"] if several else [])]))


def repetitions(decisions: pd.DataFrame) -> list[str]:
    """The columns that tell the repetitions of an item apart: the seeds of its arm's training and of its draws."""
    return [name for name in ("training_seed", "seed") if name in decisions]


def rate_table(
    decisions: pd.DataFrame,
    value: str = "deviated",
    by: Sequence[str] = ("model", "arm", "round"),
    units: Sequence[str] = ("environment",),
    proportion: bool = True,
) -> pd.DataFrame:
    """Mean of ``value`` by group, with what is needed to judge it.

    Columns: ``by``, then n (valid decisions with a value), invalid (share of all decisions), rate, low, high
    (95 %, `interval` over `kinds_of` units). Invalid decisions are in no rate's numerator or denominator. What is no
    ``proportion`` lies in [-1, 1], and so does its interval. Where replies were cut, ``cut`` is the share of decisions
    that are invalid because the token limit ended the reply before its answer.
    """
    cut = CUT in set(decisions.get("fault", ()))
    rows = []
    for key, group in decisions.groupby(list(by), sort=True, observed=True):
        valid = group[group["valid"] & group[value].notna()]
        values = valid[value].astype(float)
        ends = interval(values, *(valid[unit] for unit in kinds_of(group, units)), proportion=proportion)
        facts = [len(valid), float((~group["valid"]).mean()), float(values.mean()), *np.clip(ends, -1, 1)]
        rows.append((*key, *facts, *([(group["fault"] == CUT).fillna(False).mean()] if cut else [])))
    return pd.DataFrame(rows, columns=[*by, "n", "invalid", "rate", "low", "high", *(["cut"] if cut else [])])


def standard(decisions: pd.DataFrame) -> pd.DataFrame:
    """The decisions of the paper's own condition."""
    return decisions[decisions["condition"] == "standard"]


def lived(decisions: pd.DataFrame) -> pd.DataFrame:
    """Decisions behind histories that the agents made themselves, in whatever condition."""
    return decisions[decisions["condition"] != "forced_history"]


def value_of(decisions: pd.DataFrame) -> str:
    """P(deviate) where it was recorded, which has no sampling noise, else the sampled decision."""
    return "p_deviate" if decisions["p_deviate"].notna().any() else "deviated"


def low_mass(decisions: pd.DataFrame) -> str:
    """Where P(deviate) rests on answers with a mean probability below `LEAST_MASS`, or "".

    Arms and rounds, each other condition than the standard one by its name.
    """
    means = decisions.groupby(["condition", "arm", "round"], observed=True)["mass"].mean().astype(float)
    low = means[means < LEAST_MASS].reset_index()
    parts = [
        f"{arm}{'' if condition == 'standard' else f' in {condition}'} r={', '.join(map(str, rows['round']))}"
        for (condition, arm), rows in low.groupby(["condition", "arm"])
    ]
    return f"both answers together below {LEAST_MASS:.0%}: {'; '.join(parts)}" if parts else ""


def drift_table(
    decisions: pd.DataFrame, value: str = "deviated", units: Sequence[str] = ("environment",)
) -> pd.DataFrame:
    """Last round's rate minus the first's by model and arm, with a 95 % interval paired by ``units``.

    This is the change that the paper reads off Table 1: positive means more violations after experience than before
    it. Columns: model, arm, drift, low, high; NaN where an arm has one round only or no unit with both.
    """
    keys = ["model", "arm"]
    rows = [
        (*key, *mean_interval(unit_changes(group, value, units)))
        for key, group in decisions.groupby(keys, sort=True, observed=True)
    ]
    return pd.DataFrame(rows, columns=[*keys, "drift", "low", "high"])


def unit_changes(decisions: pd.DataFrame, value: str, units: Sequence[str] = ("environment",)) -> pd.Series:
    """Last round's mean minus the first's of each unit (`kinds_of`) that has both; empty with one round only."""
    ends = unit_ends(decisions, value, units)
    return ends["last"] - ends["first"]


def unit_ends(decisions: pd.DataFrame, value: str, units: Sequence[str] = ("environment",)) -> pd.DataFrame:
    """Means of the first and the last round of each unit (`kinds_of`) that has both; empty with one round only."""
    means = _means(decisions, value, [*kinds_of(decisions, units), "round"]).unstack("round")
    ends = [decisions["round"].min(), decisions["round"].max()]
    known = len(decisions) > 0 and ends[0] < ends[1] and set(ends) <= set(means.columns)
    means = means[ends] if known else means.iloc[:0].reindex(columns=[0, 1])
    return means.set_axis(["first", "last"], axis=1).dropna()


def benefit_table(
    decisions: pd.DataFrame, value: str = "deviated", units: Sequence[str] = ("environment",)
) -> pd.DataFrame:
    """Round-1 rate of each aligned arm minus the base's, with a 95 % interval paired by ``units``.

    Negative means that training made the agent keep the rule more often. Columns: model, arm, benefit, low, high; NaN
    where no unit has both. A model without a base arm has no rows.
    """
    rows = [
        (model, arm, *mean_interval(changes))
        for model, group in decisions.groupby("model", observed=True)
        for arm, changes in against_base(group, value, units)
    ]
    return pd.DataFrame(rows, columns=["model", "arm", "benefit", "low", "high"])


def against_base(
    decisions: pd.DataFrame, value: str, units: Sequence[str] = ("environment",)
) -> Iterator[tuple[str, pd.Series]]:
    """Each aligned arm, and its first round's means by unit (`kinds_of`) less those of the base arm; none without one.

    The base has no training: each of an arm's is compared with the same.
    """
    arms = dict(list(decisions[decisions["round"] == decisions["round"].min()].groupby("arm", observed=True)))
    base = arms.pop("base", None)
    for arm, own in arms.items() if base is not None else []:
        yield arm, less(_means(own, value, kinds_of(own, units)), _means(base, value, units))


def less(values: pd.Series, base: pd.Series) -> pd.Series:
    """``values`` by unit, each less that unit's of ``base``, whose units have no seed of a training."""
    alike = values.index.droplevel([name for name in values.index.names if name not in base.index.names])
    return values - base.reindex(alike).to_numpy()


def _means(decisions: pd.DataFrame, value: str, by: Sequence[str]) -> pd.Series:
    """Means of the valid decisions."""
    return decisions[decisions["valid"]].groupby(list(by), observed=True)[value].mean().astype(float)


def mean_interval(changes: pd.Series, most: float = 1) -> tuple[float, float, float]:
    """Mean of the changes that are known, and its interval over the units that index them, within +-``most``."""
    known = changes.dropna()
    ends = interval(known, *levels(known), proportion=False)
    return float(known.mean()), *np.clip(ends, -most, most).tolist()


def levels(changes: pd.Series) -> list[pd.Index]:
    """The kinds of units that index ``changes``: trainings where there are several (`kinds_of`)."""
    kinds = [changes.index.get_level_values(level) for level in range(changes.index.nlevels)]
    return [kind for kind in kinds if kind.name != "training_seed" or kind.nunique() > 1]


def percent(rate: float, low: float | None = None, high: float | None = None) -> str:
    """``42.2`` or ``42.2 [33.1, 51.6]`` from fractions, without a sign at 0; an en dash where there is no value."""
    if pd.isna(rate):
        return "–"
    if low is None or pd.isna(low):
        return f"{100 * rate:z.1f}"
    form = form_of(rate, low, high)
    return f"{100 * rate:{form}}{ends(low, high, form)}"


def form_of(rate: float, low: float, high: float) -> str:
    """How an estimate and its interval are written, as percents: with tenths.

    What would be ``0.0 [0.0, 0.0]`` has thousandths, and what would be ``0.000 [0.000, 0.000]`` powers of ten: it may
    leave 0 out. Ends that aren't there (NaN) don't count.
    """
    most = np.nanmax(np.abs([rate, low, high]))
    if most == 0 or most >= 5e-4:
        return "z.1f"
    return "z.3f" if most >= 5e-6 else ".0e"


def ends(low: float, high: float, form: str = "z.1f") -> str:
    """An interval as it stands behind its estimate, from fractions: `` [33.1, 51.6]``; "" where there is none."""
    return "" if pd.isna(low) else f" [{100 * low:{form}}, {100 * high:{form}}]"


def cells(table: pd.DataFrame, *columns: str, shown: Callable[..., str] = percent) -> pd.Series:
    """Each row's ``columns``, a value or a value and its two ends, as ``shown``; by default rate, low and high."""
    rows = table[list(columns or ("rate", "low", "high"))].itertuples(index=False)
    return pd.Series([shown(*row) for row in rows], table.index)


def judged(table: pd.DataFrame, word: str) -> pd.Series:
    """Each row's estimate, low and high in percent, its units, and the ``word`` that follows, alone where n is 0."""
    texts = cells(table, "estimate", "low", "high") + " n=" + table["n"].astype(str) + " "
    return texts.where(table["n"] > 0, "") + table[word]


def by_round(table: pd.DataFrame, index: Sequence[str], values: str = "cell") -> pd.DataFrame:
    """One row an ``index``, one column ``r=N`` a round in the rounds' order; an en dash where a round has no value."""
    wide = table.pivot(index=list(index), columns="round", values=values)
    wide = wide.rename(columns="r={}".format).rename_axis(columns=None)
    return wide.astype(object).where(wide.notna(), "–") if wide.isna().to_numpy().any() else wide


def round_columns(table: pd.DataFrame, by: Sequence[str] = ("model", "arm")) -> pd.DataFrame:
    """A `rate_table` in the paper's layout: one row a ``by``, ``rate [low, high]`` a round, in percent."""
    wide = by_round(table.assign(cell=cells(table)), by)
    facts = table.groupby(list(by)).agg(n=("n", "min"), invalid=("invalid", "mean"))
    wide.insert(0, "n a round", facts["n"])
    wide.insert(1, "invalid %", (100 * facts["invalid"].astype(float)).round(1))
    if "cut" in table:
        wide.insert(2, "cut %", (100 * table.groupby(list(by))["cut"].mean().astype(float)).round(1))
    return wide
