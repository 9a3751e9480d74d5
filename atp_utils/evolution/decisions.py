"""A decision, and the tidy table of decisions that every scenario shares."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args

import pandas as pd

from atp_utils.evolution.protocol import Choice


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One agent's decision in one round. Fields that a scenario has no use for stay None.

    ``reward`` is in the environment's own unit (role-play), a payoff factor (collusion) or minus the cost (tool use);
    ``capital`` is its running sum (collusion: product); ``succeeded`` is the round's collective outcome (collusion);
    ``p_deviate`` is the probability that the engine gave the deviant option, without sampling noise: the mean of
    ``p_first`` and ``p_second``, where the question names it first and second. ``deviant_first`` says which of the two
    stands in the agent's history. ``mass`` is the probability of both options together, on which the others condition
    (`Protocol.opened`). ``condition`` is what was manipulated; of a history that was written for the agent ``told``
    says whose it is, ``past_compliant`` and ``past_deviant`` how often the agent (or that other) chose what,
    ``past_others`` how many of the others deviated last (collusion), and ``payoff_ratio`` what deviating pays for each
    unit that complying does. ``reply`` is the journal's key of the raw
    reply that holds the choice, ``replies`` those of all replies that the row rests on, in their order, with spaces
    between; ``fault`` says why an invalid decision is one (`protocol.FAULTS`).
    """

    scenario: str
    seed: int
    item: str
    environment: str
    agent: int
    round: int
    choice: str | None
    deviated: bool | None
    p_deviate: float | None = None
    p_first: float | None = None
    p_second: float | None = None
    deviant_first: bool | None = None
    mass: float | None = None
    valid: bool
    attempts: int
    reward: float | None
    capital: float
    threshold: int | None = None
    incentive_ratio: float | None = None
    succeeded: bool | None = None
    tool_used: bool | None = None
    correct: bool | None = None
    condition: str = "standard"
    told: str | None = None
    past_compliant: int | None = None
    past_deviant: int | None = None
    past_others: int | None = None
    payoff_ratio: float | None = None
    prompt_tokens: int
    completion_tokens: int
    reply: str
    replies: str
    fault: str | None = None

    @classmethod
    def of(cls, item: Any, choice: Choice, **given: Any) -> "Decision":
        """The row of a ``choice`` on an ``item`` (`scenarios.Item`); ``given`` are the other fields, and wins."""
        deviant = choice.options.index(item.deviant) if choice.options else None
        first, second = choice.by_place[deviant] if choice.by_place else (None, None)
        known = {
            "item": item.id,
            "environment": item.environment,
            "choice": choice.option,
            "deviated": None if choice.option is None else choice.option == item.deviant,
            "p_deviate": choice.probabilities[deviant] if choice.probabilities else None,
            "p_first": first,
            "p_second": second,
            "deviant_first": None if deviant is None else deviant == 0,
            "mass": choice.mass,
            "valid": choice.option is not None,
            "attempts": choice.attempts,
            "prompt_tokens": choice.prompt_tokens,
            "completion_tokens": choice.completion_tokens,
            "reply": choice.decided,
            "replies": " ".join(choice.replies),
            "fault": choice.fault,
        }
        return cls(**known | given)


_DTYPES = {str: "string", int: "Int64", float: "Float64", bool: "boolean"}


def to_frame(decisions: Iterable[Decision], *, model: str, arm: str, training_seed: int = 0) -> pd.DataFrame:
    """The tidy table: one row a decision, `Decision`'s columns behind ``model``, ``arm`` and ``training_seed``.

    Nullable dtypes keep a missing value distinct from False and 0.
    """
    dtypes = {field.name: _DTYPES[(get_args(field.type) or (field.type,))[0]] for field in fields(Decision)}
    frame = pd.DataFrame([vars(decision) for decision in decisions], columns=list(dtypes)).astype(dtypes)
    frame.insert(0, "training_seed", pd.Series(training_seed, index=frame.index, dtype="Int64"))
    frame.insert(0, "arm", pd.Series(arm, index=frame.index, dtype="string"))
    frame.insert(0, "model", pd.Series(model, index=frame.index, dtype="string"))
    return frame
