"""Role-play's parameters and episodes: lived histories (Algorithm 1), and written ones for dose and response."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Annotated

from pydantic import Field

from atp_utils.evolution import history
from atp_utils.evolution.decisions import Decision
from atp_utils.evolution.history import Memory, Past
from atp_utils.evolution.loop import Episode
from atp_utils.evolution.protocol import Protocol, Question, decide, orders, question
from atp_utils.evolution.requests import derive_seed
from atp_utils.scenarios import base
from atp_utils.scenarios.role_play import telling
from atp_utils.scenarios.role_play.items import Item
from atp_utils.scenarios.role_play.telling import Condition, Pay, Supervision, Told
from atp_utils.support.values import Distinct, Natural, Rate, option


class Evolution(base.Evolution):
    """Parameters of the evolution."""

    items: Natural = option(16, "test items that are played; 0: all")
    condition: Condition = option("standard", base.CONDITION)
    supervision: Annotated[list[Supervision], Field(min_length=1)] = option(
        ["uncertain"], "what agents hear of it, round by round and then from the start"
    )
    memory: Memory = option("turns", "how agents remember: turns of the chat, or counts")
    forced_rounds: Annotated[int, Field(ge=0, le=6, strict=True)] = option(3, "longest written history")
    told: Annotated[list[Told], Field(min_length=1), Distinct] = option(["own"], "whose the written histories are")
    ratios: Annotated[list[Rate], Field(min_length=1), Distinct] = option(
        [1, 2], "what deviating pays for each unit of complying, with written histories"
    )


def episode(item: Item, setting: Evolution, protocol: Protocol, seed: int) -> Episode:
    """The rounds of one agent, whose decisions see its own past; a generator for `evolution.loop`.

    An invalid reply is no action: it earns nothing and leaves the history as it was.
    """
    pay, turns = Pay.of(item, setting.condition), orders(setting.rounds, "role_play", seed)
    asks = telling.scene(item, setting, protocol, pay)
    past: list[Past] = []
    rows, earned = [], 0.0
    for number, turned in enumerate(turns, start=1):
        key = ("role_play", item.id, f"seed{seed}", "agent0", f"round{number}")
        chat = history.chat(asks, past, number, setting, protocol)
        [choice] = yield from decide([question(key, item.options, chat, turned)], protocol)
        reward = None
        if choice.option is not None:
            seen, reward = telling.noticed(setting, number), _reward(item, choice.option, setting, pay, number, key)
            earned += reward
            shown = None if setting.condition == "no_rewards" else reward
            told = telling.outcome(item, choice.option, seen, shown, earned)
            past = [*past, Past(number, turned, choice.option, choice.turn, told, shown)]
        given = {"scenario": "role_play", "condition": setting.condition, "seed": seed, "agent": 0, "round": number}
        rows.append(Decision.of(item, choice, **given, reward=reward, capital=earned))
    return rows


def _reward(item: Item, chosen: str, setting: Evolution, pay: Pay, number: int, key: tuple) -> float:
    if setting.condition == "shuffled_rewards":
        return random.Random(derive_seed("reward", *key)).choice([pay.compliant, pay.deviant])
    if chosen == item.compliant:
        return pay.compliant
    return 0.0 if telling.noticed(setting, number) else pay.deviant


def forced(item: Item, setting: Evolution, protocol: Protocol, seed: int) -> Episode:
    """One decision behind each written history of up to ``forced_rounds`` rounds: a dose, and the response to it.

    All sequences of complying and deviating are written, so that their order is balanced; longer ones extend shorter
    ones, whose keys and values are at hand by then. Orders of options are drawn by seed, the same in all histories.
    """
    turns = orders(setting.forced_rounds + 1, "role_play", "forced", seed)
    rows = []
    for rounds in range(setting.forced_rounds + 1):
        asked = []
        for told, ratio in product(setting.told, setting.ratios):
            sequences = [()] if told == "unrelated" else product((False, True), repeat=rounds)
            asked += [(told, ratio, sequence) for sequence in sequences]
        questions = [written_question(item, setting, protocol, seed, turns[: rounds + 1], *node) for node in asked]
        choices = yield from decide(questions, protocol)
        for (told, ratio, sequence), choice in zip(asked, choices, strict=True):
            given = {"scenario": "role_play", "condition": "forced_history", "seed": seed, "agent": len(rows)}
            given |= {"round": rounds + 1, "told": told, "payoff_ratio": ratio, "reward": None, "capital": 0.0}
            past = {"past_compliant": sequence.count(False), "past_deviant": sequence.count(True)}
            rows.append(Decision.of(item, choice, **given, **past))
    return rows


def written_question(
    item: Item,
    setting: Evolution,
    protocol: Protocol,
    seed: int,
    turns: Sequence[bool],
    told: str,
    ratio: float,
    sequence: tuple[bool, ...],
) -> Question:
    """The question behind a written ``sequence`` of rounds (deviant?), whose it is ``told``, at a payoff ``ratio``.

    ``turns`` has the order of options of each round, the asked one's last.
    """
    pay, name = Pay.of(item, setting.condition, ratio), "".join("d" if deviant else "c" for deviant in sequence)
    key = ("role_play", item.id, f"seed{seed}", f"{told}-{ratio:g}-{name}", f"round{len(turns)}")
    asks = telling.scene(item, setting, protocol, pay)
    if told == "own":
        past = telling.written(item, sequence, setting, pay, turns)
        chat = history.chat(asks, past, len(turns), setting, protocol)
    elif told == "other":
        past = telling.written(item, sequence, setting, pay, who="The other one")
        chat = lambda turned: history.second_hand(asks.opening(1, turned), past)  # noqa: E731
    else:
        rounds = len(turns) - 1
        chat = lambda turned: history.unrelated(asks.opening(1, turned), rounds, protocol.instruction)  # noqa: E731
    return question(key, item.options, chat, turns[-1])
