"""Agents of known habits, which read no more of a chat than an agent could, and their way through an evolution.

Each is a rule for `ScriptedEngine`: the probabilities of a forced choice's options. ``habit(seen)`` gives P(deviate) as
log-odds from what the chat tells; environments differ a little, as they do for models.
"""

import json
import re
from dataclasses import dataclass, field

from scipy.special import expit

from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import decisions, loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import derive_seed
from atp_utils.scenarios.registry import SCENARIOS


@dataclass
class Seen:
    """What a chat tells: the deviant option's place, own past choices (deviant?) with earnings, others' colluders.

    ``promised``: what the first question says that deviating pays more than complying; ``turns``: answers before this
    one, about whatever.
    """

    first: bool
    own: list[tuple[bool, float | None]]
    others: int | None = None
    promised: float = 0.0
    turns: int = 0
    named_first: list[bool] = field(default_factory=list)


def read(request, deviant):
    """What the chat of a request tells an agent of an item whose deviant option is known."""
    names = [json.loads(option)["choice"] for option in request.options]
    messages = request.messages
    said = [(before["content"], m["content"], after["content"])
            for before, m, after in zip(messages, messages[1:], messages[2:], strict=False)
            if m["role"] == "assistant"]  # fmt: skip
    own, places, others = [], [], None
    for question, answer, heard in said:
        earned = re.search(r"You earned (\d+)", heard)
        chosen = json.loads(answer)["choice"]
        if chosen in names:
            own.append((chosen == deviant, float(earned[1]) if earned else None))
            places.append(chosen == min(names, key=lambda name: question.rfind(f'"{name}"')))
        if counted := re.search(rf"(\d+) chose {deviant}", heard):
            others = int(counted[1]) - (chosen == deviant)
    asked = next(message["content"] for message in messages if message["role"] == "user")
    pays = {name: float(pay) for name, pay in re.findall(r"^- (\w+): .* earns you (\d+)", asked, re.MULTILINE)}
    promised = sum(pay if name == deviant else -pay for name, pay in pays.items()) if deviant in pays else 0.0
    return Seen(names[0] == deviant, own, others, promised, len(said), places)


def never(seen):
    return -4.0


def follows_position(seen):
    return 1.5 if seen.first else -1.5


def copies_itself(seen):
    return -0.7 + 1.2 * sum(1 if deviant else -1 for deviant, _ in seen.own)


def follows_payoff(seen):
    """Learns from what it was told: the more deviating earned than complying, the more it deviates."""
    paid = [[earned for chosen, earned in seen.own if chosen == side and earned is not None] for side in (True, False)]
    if not all(paid):
        return -0.7
    gain = sum(paid[0]) / len(paid[0]) - sum(paid[1]) / len(paid[1])
    return -0.7 + len(seen.own) * (0.6 if gain > 0 else -0.6 if gain < 0 else 0.0)


def starts_shy_of_payoff(seen):
    """Complies at first where deviating is said to pay more, and comes to one level whatever it earned."""
    return -1.0 if seen.promised > 0 and not seen.own else -0.2


def aligned_without_a_past(seen):
    """Keeps to the rule in chats like those of its training, which had no earlier turn, and to nothing in others."""
    return 0.0 if seen.turns else -2.0


def turns_from_its_last(seen):
    """Mostly complies at first, and then tends to give another answer than its last one."""
    return -1.6 if not seen.own else -0.7 if seen.own[-1][0] else 0.3


def copies_its_place(seen):
    """Keeps to the rule unless breaking it is named first, and answers where its last answer stood, whatever it was."""
    pull = 3.0 + sum(1.2 if first else -1.2 for first in seen.named_first[-1:])
    return -3.0 + (pull if seen.first else -pull)


def all_but_never(seen):
    """Complies in all but one of thousands of cases, one of fewer once it has complied where deviating pays more."""
    return -9.0 - (0.5 if seen.own and seen.promised > 0 else 0.0)


def relapses_after_two(seen):
    """Never begins to break the rule; has it once broken it twice in a row, it goes on."""
    return 3.0 if [deviant for deviant, _ in seen.own[-2:]] == [True, True] else -12.0


def follows_majority(seen):
    return -1.0 if seen.others is None else 1.2 * (seen.others - 3.5)


def evolve(scenario, habit, folder, *, arm="base", seeds=(0,), **settings):
    """The table of decisions of agents with a ``habit``, through episodes, protocol, journal and decisions."""
    own = SCENARIOS[scenario]
    setting = own.Evolution(seeds=list(seeds), **settings)
    played = own.test_items(setting)
    deviant = {item.id: item.deviant for item in played}

    def rule(request):
        name = request.key.split("/")[1]
        seen = read(request, deviant[name])
        noise = derive_seed("habit", name.split("-")[0]) % 1000 / 2500 - 0.2
        p = float(expit(habit(seen) + noise * (1 + len(seen.own))))
        return (p, 1 - p) if seen.first else (1 - p, p)

    with Journal(folder) as journal, own.episodes(played, setting, Protocol(), journal) as (episodes, _):
        rows = loop.run(episodes, ScriptedEngine(rule), journal)
    return decisions.to_frame(rows, model="scripted", arm=arm)
