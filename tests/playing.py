"""Scripted agents for episodes of any scenario: what is decided, and what was asked on the way."""

import re

from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol

CHOOSE = Protocol("choose")


def play(folder, scenario, items, engine, *, seeds=(0,), protocol=CHOOSE, **settings):
    """Decisions and journal of all episodes; ``engine`` is one, or the rule of a scripted one."""
    given = scenario.Evolution(**settings)
    episodes = [scenario.episode(item, given, protocol, seed) for seed in seeds for item in items]
    engine = ScriptedEngine(engine) if callable(engine) else engine
    with Journal(folder) as journal:
        return loop.run(episodes, engine, journal), journal


def drive(episode, rule):
    """(rows, steps) of one episode: what it returns, and the requests of each step in their order.

    A forced choice asks twice: first in the order that enters the history, then the other way round.
    """
    engine, steps, replies = ScriptedEngine(rule), [], None
    try:
        while True:
            steps.append(episode.send(replies))
            answered = dict(engine.answer(steps[-1]))
            replies = [answered[number] for number in range(len(answered))]
    except StopIteration as stop:
        return stop.value, steps


def always(option):
    """A rule that is sure of ``option``."""
    return lambda request: [float(answer == answer_json(option)) for answer in request.options]


def by_round(item, deviating):
    """A rule that is sure to deviate in the rounds whose flag in ``deviating`` is set, and to comply in the others."""

    def rule(request):
        number = int(re.search(r"/round(\d+)", request.key)[1])
        return always(item.deviant if deviating[number - 1] else item.compliant)(request)

    return rule


def by_agent(item, deviating):
    """The same for agents, by their numbers."""

    def rule(request):
        number = int(re.search(r"/agent(\d+)/", request.key)[1])
        return always(item.deviant if deviating[number] else item.compliant)(request)

    return rule


def says(chat):
    """All that a chat says, one message after the other."""
    return "\n".join(message["content"] for message in chat)
