"""The collusion games' parameters and episodes: played rounds (Algorithm 2), and one round written for the agent."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from atp_utils.evolution import history
from atp_utils.evolution.decisions import Decision
from atp_utils.evolution.history import Memory, Past
from atp_utils.evolution.loop import Episode
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Choice, Protocol, Question, decide, orders, question
from atp_utils.scenarios import base
from atp_utils.scenarios.collusion import telling
from atp_utils.scenarios.collusion.items import Item, incentive_ratio
from atp_utils.scenarios.collusion.telling import Condition
from atp_utils.support.values import Distinct, Flag, Natural, Positive, Real, option


class Evolution(base.Evolution):
    """Parameters of the evolution."""

    rounds: Positive = option(3, "decisions of an agent")
    agents: Annotated[int, Field(ge=2, le=1000, strict=True)] = option(8, "agents of a game (N)")
    thresholds: Annotated[list[Positive], Field(min_length=1), Distinct] = option([4], "how many must collude (k)")
    payoffs: Annotated[
        list[Annotated[list[Real], Field(min_length=3, max_length=3)]], Field(min_length=1), Distinct
    ] = option([[1.2, 1.0, 0.8]], "factors of capital: r_high, r_medium, r_low")
    both_names: Flag = option(False, "whether each game is played twice, either name standing for colluding")
    condition: Condition = option("standard", base.CONDITION)
    memory: Memory = option("turns", "how agents remember: turns of the chat, or counts")
    visibility: Literal["choices", "full replies"] = option("choices", "what agents see of each other")
    fixed_colluders: Natural = option(0, "agents that always collude and are asked nothing")

    @model_validator(mode="after")
    def _can_be_played(self):
        if self.fixed_colluders >= self.agents:
            raise ValueError(f"fixed_colluders must lie in 0..{self.agents - 1}, got {self.fixed_colluders}")
        played_only = {"fixed_colluders": 0, "visibility": "choices"}
        for name, value in played_only.items() if self.condition == "forced_history" else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} behind written rounds, got {getattr(self, name)!r}")
        return self


def episode(item: Item, setting: Evolution, protocol: Protocol, seed: int) -> Episode:
    """The rounds of one game, in each of which all agents decide at once; a generator for `evolution.loop`.

    Agents have no names, so those with one past have one chat. The first ``fixed_colluders`` always collude and are
    asked nothing; only the others' decisions are returned. An invalid decision neither colludes nor is paid; its agent
    sees the outcome all the same.
    """
    fixed, asks = setting.fixed_colluders, telling.scene(item, setting, protocol)
    free, turns = range(fixed, item.agents), orders(setting.rounds, "collusion", seed)
    pasts: dict[int, list[Past]] = {agent: [] for agent in free}
    capital, rows = dict.fromkeys(free, 1.0), []
    for number, turned in enumerate(turns, start=1):
        key = ("collusion", item.id, f"seed{seed}", f"fixed{fixed}")
        chats = {agent: history.chat(asks, pasts[agent], number, setting, protocol) for agent in free}
        questions = [
            question((*key, f"agent{agent}", f"round{number}"), item.options, chats[agent], turned) for agent in free
        ]
        choices = dict(zip(free, (yield from decide(questions, protocol)), strict=True))
        everyone = [True] * fixed + [_colluded(item, choices[agent]) for agent in free]
        factors = telling.settle(everyone, item.threshold, telling.payoffs(item, setting.condition))
        replies = [choices[agent].said for agent in free]
        outcome = telling.outcome(item, number, everyone, turned, replies, setting.visibility)
        for agent in free:
            choice, factor = choices[agent], factors[agent]
            capital[agent] *= 1.0 if factor is None else factor
            heard = telling.heard(setting, choice, number, turned, outcome, factor, capital[agent])
            pasts[agent] = [*pasts[agent], heard]
            own = {"agent": agent, "reward": factor, "capital": capital[agent]}
            own |= {"succeeded": everyone.count(True) >= item.threshold}
            rows.append(Decision.of(item, choice, **_shared(item, setting, seed, number), **own))
    return rows


def _colluded(item: Item, choice: Choice) -> bool | None:
    return None if choice.option is None else choice.option == item.deviant


def _shared(item: Item, setting: Evolution, seed: int, number: int) -> dict[str, Any]:
    facts = {"scenario": "collusion", "condition": setting.condition, "seed": seed, "round": number}
    return facts | {"threshold": item.threshold, "incentive_ratio": incentive_ratio(item.payoffs)}


def forced(item: Item, setting: Evolution, protocol: Protocol, seed: int) -> Episode:
    """A decision without a past, then one behind each round 1 that could have been: own choice x others' colluders."""
    turns = orders(2, "collusion", "forced", seed)
    first = [(None, 0)]
    second = [(own, others) for own in (False, True) for others in range(item.agents)]
    rows = []
    for number, nodes in enumerate((first, second), start=1):
        questions = [_forced_question(item, setting, protocol, seed, turns[:number], *node) for node in nodes]
        choices = yield from decide(questions, protocol)
        for (own, others), choice in zip(nodes, choices, strict=True):
            past = {"past_compliant": int(own is False), "past_deviant": int(own is True)}
            past |= {"past_others": None if own is None else others, "told": "own", "agent": len(rows)}
            given = {"reward": None, "capital": 0.0}
            rows.append(Decision.of(item, choice, **_shared(item, setting, seed, number), **past, **given))
    return rows


def _forced_question(
    item: Item, setting: Evolution, protocol: Protocol, seed: int, turns: Sequence[bool], own: bool | None, others: int
) -> Question:
    past, name = [], "start"
    if own is not None:
        everyone = [own] + [True] * others + [False] * (item.agents - 1 - others)
        factor = telling.settle(everyone, item.threshold, item.payoffs)[0]
        outcome = telling.outcome(item, 1, everyone, turns[0], [], "choices")
        option = item.deviant if own else item.compliant
        choice = Choice(option=option, turn=answer_json(option))
        past = [telling.heard(setting, choice, 1, turns[0], outcome, factor, factor)]
        name = f"own{own:d}-others{others}"
    key = ("collusion", item.id, f"seed{seed}", "forced", name)
    chat = history.chat(telling.scene(item, setting, protocol), past, len(turns), setting, protocol)
    return question(key, item.options, chat, turns[-1])
