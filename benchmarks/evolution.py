"""Times evolutions against a plain loop, on the same chats; `bench` calls it.

The plain loop is what one would write first: one chat at a time, the whole history read anew in every round. Both take
the same decisions (a chat's history is fixed by the engine's run), so the ratio is pure engine. The plain loop answers
a random sample of the chats and its time is scaled to all of them. The two take turns.
"""

import random
import tempfile
import time
from pathlib import Path

from atp_utils import parameters
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.models import weights_memory
from atp_utils.scenarios.registry import SCENARIOS
from benchmarks import limits

# What is played, how many turns are taken, and how many chats the plain loop answers in each.
CASES = {
    "choose": ("role_play", {"items": 16, "rounds": 6}, 3, 8),
    "reason": ("role_play", {"items": 64, "rounds": 2, "protocol": "reason", "max_attempts": 1}, 2, 8),
    "collusion": ("collusion", {"rounds": 3, "thresholds": [4], "payoffs": [[1.2, 1.0, 0.8]]}, 3, 16),
    "tool_use": ("tool_use", {"agents_per_seed": 2, "rounds": 2}, 2, 8),
}


class Recording:
    """An engine that also keeps the requests it was asked, and of each call its new tokens and seconds."""

    def __init__(self, engine):
        self.engine, self.identity, self.requests, self.calls = engine, engine.identity, [], []

    def answer(self, requests):
        self.requests += requests
        before, start = self.engine.forward_tokens, time.perf_counter()
        yield from self.engine.answer(requests)
        limits.wait(self.engine.model.device)
        self.calls.append((self.engine.forward_tokens - before, time.perf_counter() - start))


def settings(case, **changes):
    """Scenario, its parameters and the items that it plays."""
    name, given, *_ = CASES[case]
    given = parameters.check(parameters.EVOLVE[name], given | changes)
    return SCENARIOS[name], given, SCENARIOS[name].test_items(given)


def ours(engine, scenario, given, items):
    """An evolution with kept keys and values; returns seconds, number of passes, requests, and its engine's calls."""
    recording, passes = Recording(engine), []
    hook = engine.model.register_forward_hook(lambda *_: passes.append(1))  # loads the model, which isn't timed
    protocol = given.protocol_of()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Journal(Path(folder)) as journal,
            scenario.episodes(items, given, protocol, journal) as (episodes, _),
        ):
            start = time.perf_counter()
            loop.run(episodes, recording, journal)
            return time.perf_counter() - start, len(passes), recording.requests, recording.calls
    finally:
        hook.remove()


def plain(engine, requests, sample):
    """Seconds for answering ``requests`` one by one, from a random ``sample`` of them."""
    engine.model  # noqa: B018  loading is not what is timed
    some = random.Random(0).sample(requests, min(sample, len(requests)))
    start = time.perf_counter()
    for request in some:
        list(engine.answer([request]))
    limits.wait(engine.model.device)
    return (time.perf_counter() - start) * len(requests) / len(some)


def measure(case, model, dtype, turns=None, **changes):
    """One part of the benchmark, with what each turn took; by `bench` in a process of its own."""
    scenario, given, items = settings(case, **changes)
    *_, usual, sample = CASES[case]
    taken, slow, calls, best = [], [], [], None
    for turn in range(turns or usual):
        engine = TransformersEngine(model, dtype=dtype)
        seconds, passes, requests, called = ours(engine, scenario, given, items)
        taken.append(seconds)
        calls.append(called)
        if not turn:
            memory = weights_memory.most_held() / weights_memory.GIB
        best = limits.measure(engine.model, best)
        tokens = engine.forward_tokens
        del engine  # with the keys and values that it keeps
        one = TransformersEngine(model, dtype=dtype, cache_bytes=0, batch_tokens=1)
        slow.append(plain(one, requests, sample))
    return {
        "settings": given.model_dump(include=set(CASES[case][1]) | set(changes)),
        "replies": len(requests),
        "tokens": tokens,
        "kinds": {"plain loop": {"seconds": slow}, "ours": {"seconds": taken, "memory_gib": memory}},
        "limits": best | {"least_seconds": limits.least(best, tokens, passes)},
        # Of every call of the engine, which is a round but for tool use: new tokens, and the seconds of each turn.
        "calls": [{"tokens": one[0][0], "seconds": [call[1] for call in one]} for one in zip(*calls, strict=False)],
    }
