"""When a training ends before its last step, and when what it leaves is no answer any more.

DPO raises one answer against the other, and nothing holds both of them up: trained on, a model can come to give the two
together next to no probability. A forced choice between them then compares two numbers that say nothing about it. The
log's ``mass`` shows it: the probability of both answers, given what they begin with alike.
"""

from typing import Any

import pandas as pd

LAST = 3  # steps whose mean counts


def low(log: pd.DataFrame, given: Any) -> bool:
    """Whether the mean mass of the last steps is below ``min_mass``; false where no mass is measured."""
    return "mass" in log and log["mass"].tail(LAST).mean() < given.min_mass


def ended(log: pd.DataFrame, given: Any, total: int) -> bool:
    """Whether a training of ``total`` steps has ended with this log.

    Before its last step it does where the last pairs were all told apart, by a margin above ``stop_margin``, or where
    the mass is low and has halved since the beginning: batches differ, and a small mass may rise.
    """
    if not log.empty and log["step"].iloc[-1] >= total:
        return True
    if "margin" not in log:
        return False
    last = log.tail(LAST)
    apart = (last["accuracy"] == 1).all() and (last["margin"] > given.stop_margin).all()
    if given.stop_margin and len(log) >= LAST and apart:
        return True
    return low(log, given) and last["mass"].mean() < log["mass"].head(LAST).mean() / 2


def refusal(log: pd.DataFrame, given: Any) -> str:
    """What is wrong with a training whose mass is low, and what to do about it."""
    first, last = log["mass"].head(LAST).mean(), log["mass"].tail(LAST).mean()
    if first < given.min_mass:
        advice = "It was small from the start: the model seldom answers in this form. Take another model, train longer"
    else:
        advice = "The training took it away: lower learning_rate, max_steps or epochs, raise beta, set stop_margin"
    return (
        f"after {log['step'].iloc[-1]} steps the model gives the two answers together a probability of {last:.2g} "
        f"(at first {first:.2g}), below min_mass {given.min_mass:g}; a choice between them would say nothing about it. "
        f"{advice}, or set min_mass to 0 to take this adapter all the same"
    )
