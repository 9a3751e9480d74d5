"""Times the evolution of role-play against a plain loop, in one process and on the same chats.

The plain loop is what one would write first: one chat at a time, the whole history read anew in every round.
Both take the same decisions (a chat's history is fixed by the engine's run), so the ratio is pure engine.
The plain loop answers a random sample of the chats and its time is scaled to all of them.

    python benchmarks/evolution.py [--items 64] [--rounds 6] [--tokens 64]
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import pandas as pd

from atp_utils import models, resolve
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Sampling
from atp_utils.scenarios import role_play
from atp_utils.scenarios.role_play.items import make_items, read_environments
from atp_utils.support.files import write_parquet


class Recording:
    """An engine that also keeps the requests it was asked, to be answered again by the plain loop."""

    def __init__(self, engine):
        self.engine, self.identity, self.requests = engine, engine.identity, []

    def answer(self, requests):
        self.requests += requests
        return self.engine.answer(requests)


def evolution(items, rounds, protocol):
    """(seconds, requests, tokens that the model read or wrote) of a batched run with kept caches."""
    engine = Recording(TransformersEngine(models.EMBEDDED))
    engine.engine.model  # noqa: B018  loading is not what is timed
    given = role_play.Evolution(rounds=rounds)
    episodes = [role_play.SCENARIO.episode(item, given, protocol, 0) for item in items]
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        start = time.perf_counter()
        loop.run(episodes, engine, journal)
        return time.perf_counter() - start, engine.requests, engine.engine.forward_tokens


def plain(requests, sample):
    """Seconds for answering ``requests`` one by one without a cache, from a random ``sample`` of them."""
    engine = TransformersEngine(models.EMBEDDED, cache_bytes=0, batch_tokens=1)
    engine.model  # noqa: B018
    some = random.Random(0).sample(requests, min(sample, len(requests)))
    start = time.perf_counter()
    for request in some:
        list(engine.answer([request]))
    return (time.perf_counter() - start) * len(requests) / len(some)


def main():
    """Run both protocols and print and store one row each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a `reason` reply at most")
    parser.add_argument("--sample", type=int, default=96, help="chats that the plain loop really answers")
    options = parser.parse_args()
    _, test = make_items(read_environments())
    rows = []
    for name in ("choose", "reason"):
        protocol = Protocol(name, max_attempts=1, sampling=Sampling(max_new_tokens=options.tokens))
        seconds, requests, tokens = evolution(test[: options.items], options.rounds, protocol)
        one_by_one = plain(requests, options.sample)
        rows.append(
            {
                "protocol": name,
                "replies": len(requests),
                "seconds": round(seconds, 1),
                "seconds per reply": round(seconds / len(requests), 4),
                "tokens a second": round(tokens / seconds),
                "plain loop, seconds": round(one_by_one, 1),
                "times faster": round(one_by_one / seconds, 1),
            }
        )
        print(pd.DataFrame(rows).T.to_string(header=False), flush=True)
    write_parquet(resolve("runs/benchmarks/evolution.parquet"), pd.DataFrame(rows))


if __name__ == "__main__":
    main()
