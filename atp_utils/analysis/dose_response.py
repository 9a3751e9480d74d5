"""Dose and response: P(deviate) behind written histories, against how often they deviated and what that paid.

What an agent does after its own experience mixes what it experienced with why it did so. Written histories break that
link: every agent gets every history. They tell apart copying (deviations raise P(deviate) whatever they pay), learning
from payoff (the more, the better they paid), and format (a history about something else does the same).
"""

import warnings

import numpy as np
import pandas as pd
from scipy.stats import t
from statsmodels.genmod import families
from statsmodels.genmod.cov_struct import Independence
from statsmodels.genmod.generalized_estimating_equations import GEE

from atp_utils.analysis import stats

KEYS = ["model", "arm"]
TERMS = {
    "complied": "past_compliant",
    "deviated": "past_deviant",
    "log payoff ratio": "log_ratio",
    "deviated x log payoff ratio": "paid",
}


def written(decisions: pd.DataFrame, scenario: str = "role_play") -> pd.DataFrame:
    """The decisions behind written histories."""
    return decisions[(decisions["scenario"] == scenario) & (decisions["condition"] == "forced_history")]


def doses(decisions: pd.DataFrame) -> pd.DataFrame:
    """Mean P(deviate) by model, arm, whose history it is (``told``), payoff ratio and number of deviations in it.

    Of the longest histories, which all have as many rounds: with shorter ones a dose would stand for a length. Those
    without any round are told "none". Columns: these, n, rate, low, high.
    """
    longest = decisions.groupby([*KEYS, "told"], observed=True)["round"].transform("max")
    kept = decisions[(decisions["round"] == longest) & (decisions["round"] > 1)]
    none = decisions[(decisions["round"] == 1) & (decisions["told"] == "own")].assign(told="none")
    by = (*KEYS, "told", "payoff_ratio", "past_deviant")
    rows = pd.concat([kept, none], ignore_index=True)
    return stats.rate_table(rows, stats.value_of(rows), by).drop(columns="invalid")


def slopes(decisions: pd.DataFrame) -> pd.DataFrame:
    """Logistic slopes of P(deviate) on a written history, by generalised estimating equations over environments.

    Per model, arm and ``told`` (own or other): the change of log-odds for each compliant round, each deviant round,
    each unit of log payoff ratio, and how much more a deviant round does for each unit of it. Columns: these, term,
    slope, low, high (95 %, t with bias-reduced robust errors). Empty where ratios or histories don't vary.
    """
    rows = []
    value = stats.value_of(decisions)
    own = decisions[decisions["told"].isin(["own", "other"]) & decisions["valid"]]
    for key, group in own.groupby([*KEYS, "told"], sort=True, observed=True):
        ratio = np.log(group["payoff_ratio"].astype(float))
        data = group.assign(log_ratio=ratio, paid=ratio * group["past_deviant"].astype(float))
        names = {term: column for term, column in TERMS.items() if data[column].astype(float).nunique() > 1}
        clusters = data["environment"].nunique()
        if not names or clusters < 3:
            continue
        design = data[list(names.values())].astype(float).assign(one=1.0)
        # Probabilities, not counts: the logit link's mean model holds, and robust errors ask no more.
        chances = np.clip(data[value].astype(float), 1e-6, 1 - 1e-6)
        codes = pd.factorize(data["environment"])[0]
        model = GEE(chances, design, groups=codes, family=families.Binomial(), cov_struct=Independence())
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore")  # what a scripted agent does is fitted to the last digit
            fit = model.fit(cov_type="bias_reduced")
            # Where environments don't differ at all there is nothing to take an error from.
            errors = fit.bse.where(fit.bse > 1e-9)
        for term, column in names.items():
            slope, error = float(fit.params[column]), float(errors[column])
            half = t.ppf(0.5 + stats.LEVEL / 2, clusters - 1) * error
            rows.append((*key, term, slope, slope - half, slope + half))
    return pd.DataFrame(rows, columns=[*KEYS, "told", "term", "slope", "low", "high"])
