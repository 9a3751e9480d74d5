"""An evolution notebook's run, from its parameters to the finished table of decisions."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from atp_utils import runs, shown
from atp_utils.engines import open_engine
from atp_utils.evolution import decisions, loop
from atp_utils.evolution.journal import Journal, facts_of, remove_derived
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Engine, Reply, Request
from atp_utils.parameters import EVOLVE
from atp_utils.runs import Run
from atp_utils.support import folders, progress
from atp_utils.support.manifest import MANIFEST, now


@dataclass(frozen=True)
class Evolving:
    """An evolution that can start: its ``run``, who answers, how decisions are taken, and the ``items`` it plays."""

    run: Run
    engine: Engine
    protocol: Protocol
    items: list
    paid: set[str] = field(default_factory=set)  # digests of replies that `first_episode` was the first to ask for

    def play(self) -> pd.DataFrame:
        """Run all episodes to the end, or go on where they were stopped; returns the table of decisions.

        Replies are journalled in the run's folder as they arrive; a finished run is replayed. The manifest has the
        seconds that this took, for the replies that weren't there before. Raises FileExistsError where the folder holds
        a finished run of another engine and may not be overwritten.
        """
        run, given, scenario, began = self.run, self.run.parameters, self.run.scenario, time.monotonic()
        started = now()
        # The bar counts replies: of a forced choice, those in both orders.
        total = scenario.decisions(given, len(self.items)) * (2 if given.protocol == "choose" else 1)
        with (
            _journal(run, self.engine.identity, self.paid) as record,
            scenario.episodes(self.items, given, self.protocol, record) as (episodes, facts),
            progress.bar(total, f"{scenario.name} {given.arm}") as bar,
        ):
            rows = loop.run(episodes, self.engine, record, bar)
            table = decisions.to_frame(rows, model=given.model, arm=given.arm, training_seed=given.training_seed)
            facts = {name: fact() if callable(fact) else fact for name, fact in facts.items()}
            facts |= {"started": started, "seconds": round(time.monotonic() - began, 1)}
            # Of servers nothing is known but what they tell, which the identity has.
            facts["made_of"] = getattr(self.engine, "made_of", None)
            facts["prompts"] = scenario.prompts_digest(given)
            record.finish(table, run.settings, self.engine.identity, **facts)
        return table

    def first_episode(self) -> list[tuple[Sequence[Request], Sequence[Reply]]]:
        """The first episode by itself: what it asked in each step, and the replies, which `play` will find."""
        run = self.run
        with (
            _journal(run, self.engine.identity) as record,
            run.scenario.episodes(self.items, run.parameters, self.protocol, record) as (episodes, _),
        ):
            known = set(record.record.replies)
            steps = loop.alone(episodes[0], self.engine, record)
            self.paid.update(record.record.replies.keys() - known)
        return steps


def begin(scenario: str, namespace: Mapping[str, Any]) -> Evolving:
    """The evolution of a scenario whose parameters are in ``namespace``, as its notebook has them.

    The run's folder is claimed. Replies of other parameters stay in it; a finished run of others is replaced only by
    one that may ``overwrite``. Raises what `runs.start`, `folders.claim`, `folders.lock` and `open_engine` raise,
    before any work.
    """
    run = runs.start(EVOLVE[scenario], namespace, "evolution", scenario)
    given, items = run.parameters, run.scenario.test_items(run.parameters)
    if folders.check(run.out, run.marker, overwrite=given.overwrite) != run.marker:
        # In this order: a kill between mustn't leave decisions of other parameters behind this run's marker.
        with folders.lock(run.out):
            remove_derived(run.out)
            folders.claim(run.out, run.marker, overwrite=True, append=True)
    settings = {"dtype": given.dtype, "batch_tokens": given.batch_tokens, "cache_bytes": given.cache_gb * 1e9}
    settings |= {"training_seed": given.training_seed}
    engine = open_engine(given.model, scenario, given.arm, given.adapter, given.servers, run.out, **settings)
    return Evolving(run, engine, given.protocol_of(), items)


def _journal(run: Run, identity: str, paid: Iterable[str] = ()) -> Journal:
    """The journal in the run's folder, of which a finished run has one identity."""
    manifest = run.out / MANIFEST
    before = facts_of(run.out).identity if manifest.is_file() else identity
    if before != identity and not run.parameters.overwrite:
        raise FileExistsError(
            f"{shown(run.out)} holds a finished run of {before!r}, asked was {identity!r}: name another folder by out, "
            "or set overwrite to true"
        )
    record = Journal(run.out, paid)
    if before != identity:
        remove_derived(run.out)
    return record
