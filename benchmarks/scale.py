"""Times what is ours in an evolution, without a model: the loop, the journal, the table and the statistics.

A scripted agent answers at once by a fair coin, so what is left is the cost of the simulation itself. Every size runs
in a process of its own, so that its peak memory is its own. Seconds are of processor time, on one core.

    python benchmarks/scale.py [--factors 1 10 100] [--parts agents seeds role_play]
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import pandas as pd

from atp_utils import resolve
from atp_utils.analysis import stats
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import decisions
from atp_utils.evolution import loop as evolve
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.protocol import Protocol
from atp_utils.scenarios import collusion, role_play
from atp_utils.scenarios.collusion.items import make_grid, read_games
from atp_utils.scenarios.role_play.items import make_items, read_environments
from atp_utils.support.files import write_parquet

CHOOSE = Protocol("choose")


def episodes(part, factor):
    """The grid of the collusion games with ``factor`` times the agents or seeds, or role-play with as many seeds."""
    if part == "role_play":
        _, items = make_items(read_environments())
        given = role_play.Evolution(rounds=6)
        return [role_play.SCENARIO.episode(item, given, CHOOSE, seed) for seed in range(factor) for item in items]
    agents, seeds = (8 * factor, 1) if part == "agents" else (8, factor)
    thresholds = [agents * share // 8 for share in (2, 4, 6, 8)]
    grid = make_grid(read_games(), agents=agents, thresholds=thresholds)
    given = collusion.Evolution(rounds=3, agents=agents)
    return [collusion.SCENARIO.episode(item, given, CHOOSE, seed) for seed in range(seeds) for item in grid]


def measure(part, factor):
    """One row: seconds of each step, the journal's size and the process's peak memory."""
    engine, clock, rows = ScriptedEngine(lambda request: (0.5, 0.5)), Clock(), None
    with tempfile.TemporaryDirectory() as folder:
        with Journal(Path(folder)) as journal:
            clock.lap()
            rows = evolve.run(episodes(part, factor), engine, journal)
            loop = clock.lap()
            size = journal.path.stat().st_size
        with Journal(Path(folder)) as journal:
            reopened = clock.lap()
            evolve.run(episodes(part, factor), engine, journal)
            replayed = clock.lap()
    table = decisions.to_frame(rows, model="scripted", arm="base")
    framed = clock.lap()
    by = ("model", "arm", "round") if part == "role_play" else ("model", "arm", "threshold", "incentive_ratio", "round")
    stats.rate_table(table, by=by)
    summarised = clock.lap()
    return {
        "part": part,
        "times": factor,
        "decisions": len(rows),
        "distinct chats": len(journal.chats),
        "loop and journal, s": round(loop, 2),
        "decisions a second": round(len(rows) / loop),
        "journal, MB": round(size / 1e6, 1),
        "reopen, s": round(reopened, 2),
        "replay, s": round(replayed, 2),
        "table, s": round(framed, 2),
        "statistics, s": round(summarised, 2),
        "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


class Clock:
    """Seconds of this process's own work since the last call: other programs on the machine don't count."""

    def __init__(self):
        self.last = time.process_time()

    def lap(self):
        before, self.last = self.last, time.process_time()
        return self.last - before


def main():
    """Run every size, print and store the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--parts", nargs="+", default=["agents", "seeds", "role_play"])
    options = parser.parse_args()
    rows = []
    for part in options.parts:
        for factor in options.factors:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (part, factor)))
            print(pd.DataFrame(rows).T.to_string(header=False), flush=True)
    write_parquet(resolve("runs/benchmarks/scale.parquet"), pd.DataFrame(rows))


if __name__ == "__main__":
    main()
