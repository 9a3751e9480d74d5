"""``python -m atp_utils.rescore RUNS [--parser FILE]``: decisions once more, from raw replies alone.

It needs no weights, no adapter and no sandbox: episodes are played again, and each chat is answered by the reply that
was recorded to it, in published records too. Nothing may change then. FILE is a Python file with another
``parse_choice(text, options)``, which returns the option that a written reply chooses, or None. Where it reads a reply
differently the later rounds of that agent would have had another history: their recorded replies are read all the same,
and listed apart.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from atp_utils import parameters, resolve, shown
from atp_utils.evolution import decisions, journal, loop
from atp_utils.evolution.journal import Facts
from atp_utils.evolution.record import Record, address
from atp_utils.evolution.requests import Reply, Request
from atp_utils.parameters import EVOLVE
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support.files import sha256
from atp_utils.support.text import inert

WHICH = ["seed", "item", "agent", "round"]
READ = ["choice", "deviated", "valid", "p_deviate", "fault"]
Parser = Callable[[str, Sequence[str]], str | None]


@dataclass
class Replay:
    """A ``record`` as the loop's journal, which holds an answer to everything, so that no engine is asked.

    ``strange`` replies, digest -> key, were given to other chats.
    """

    record: Record
    identity: str
    strange: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.by_key = {asked["key"]: self.record.replies[digest] for digest, asked in self.record.asked.items()}

    def result(self, kind: str, asked: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a tool printed then, as `Journal.result`; code that didn't run then is left to ``make``."""
        found = self.record.results.get(address(kind, asked))
        return make() if found is None else found

    def find(self, request: Request, identity: str) -> Reply:
        """The reply to this chat, else that of the same decision behind another history, else an unreadable one."""
        reply = self.record.replies.get(request.digest(identity))
        if reply is None:
            reply = self.by_key.get(request.key, Reply(""))
            self.strange[reply.digest] = request.key
        return reply

    def sync(self) -> None:
        """Nothing is written."""


def no_tool(code: str) -> NoReturn:
    """Stands where the sandbox does: raises ValueError naming the code."""
    raise ValueError(f"the record has no result of this code, and none is run: {code[:300]!r}")


def rescore(run: Path, parser: Parser | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(decisions as they are read now, those of them that differ from the recorded ones) of a finished run.

    ``cause`` of a difference is "reading" where the chat is the recorded one, else "history". Raises ValueError where
    the code's prompts aren't those that the record was asked with, or a tool's result is lacking.
    """
    before, facts = journal.read_table(run), journal.facts_of(run)
    name, *others = before["scenario"].unique()
    if others or name not in SCENARIOS:
        raise ValueError(f"{shown(run)} is of no scenario that is known here ({name!r})")
    given = parameters.check(EVOLVE[name], facts.settings | {"data": str(_data(run, name, facts))})
    replay = Replay(journal.record_of(run), facts.identity)
    scenario, ways = SCENARIOS[name], replace(given.protocol_of(), **({"parse": parser} if parser else {}))
    with scenario.episodes(scenario.test_items(given), given, ways, replay, no_tool) as (episodes, _):
        rows = loop.run(episodes, replay, replay)
    if replay.strange and parser is None:
        raise ValueError(
            f"{shown(run)}: {len(replay.strange)} chats, such as {min(replay.strange.values())}, aren't in the record: "
            f"its prompts are those of commit {facts.commit}"
        )
    now = decisions.to_frame(rows, model=given.model, arm=given.arm, training_seed=given.training_seed)
    return now, _changed(now, before, set(replay.strange))


def _changed(now: pd.DataFrame, before: pd.DataFrame, strange: set[str]) -> pd.DataFrame:
    """The rows that are read otherwise, side by side, with the cause."""
    both = now[[*WHICH, *READ, "replies"]].merge(before[WHICH + READ], on=WHICH, suffixes=("", " before"))
    same = [(both[name] == both[f"{name} before"]) | both[[name, f"{name} before"]].isna().all(axis=1) for name in READ]
    changed = both[~pd.concat(same, axis=1).fillna(False).all(axis=1)]
    rests_on = changed.pop("replies").map(lambda digests: bool(strange.intersection(digests.split(" "))))
    return changed.assign(cause=rests_on.map({True: "history", False: "reading"}))


def _data(run: Path, scenario: str, facts: Facts) -> Path:
    """The folder of the prompts that a run was asked with: the one that has those of its manifest.

    Older manifests don't tell of them: then it is the folder beside the run's evolutions, as it is published, the one
    that its settings name, or one further up. Raises ValueError where no folder has the manifest's.
    """
    named, told = resolve(facts.settings.get("data", "data")), (facts.model_extra or {}).get("prompts")
    beside = [parent.with_name("data") for parent in run.parents if parent.name == "evolution"]
    folders = [*beside, named, *(parent / "data" for parent in run.parents)]
    prompts = {data: path for data in folders if (path := SCENARIOS[scenario].path("test", data)).is_file()}
    if told is None or "test" not in SCENARIOS[scenario].splits:
        return next(iter(prompts), named)
    for data, path in prompts.items():
        if sha256(path) == told:
            return data
    raise ValueError(f"{shown(run)}: no folder has the prompts (SHA-256 {told}) that it was asked with")


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where decisions differ, 2 where they can't be read again."""
    parsed = argparse.ArgumentParser(prog="python -m atp_utils.rescore", description=__doc__.split("\n\n")[0])
    parsed.add_argument("runs", help="a folder of finished runs, e.g. data/results")
    parsed.add_argument("--parser", help="a Python file with a parse_choice(text, options) of its own")
    options, differ = parsed.parse_args(arguments), False
    try:
        parser = runpy.run_path(options.parser)["parse_choice"] if options.parser else None
        for run in journal.complete_runs(resolve(options.runs)):
            now, changed = rescore(run, parser)
            causes = changed["cause"].value_counts()
            counts = f"{causes.get('reading', 0)} read otherwise, {causes.get('history', 0)} behind another history"
            print(f"{shown(run)}: {len(now)} decisions, {counts if len(changed) else 'the same'}")
            if len(changed):
                print(inert(changed.to_string(index=False)))
            differ |= len(changed) > 0
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
