"""``python -m atp_utils.inspect_log LOG OUT``: a log of Inspect AI as a run that the notebooks read.

The log is one of a task in `inspect_task`. Nothing is decided anew: the decisions are those that were played, and OUT
gets the raw replies beside them, so that `atp_utils.rescore` can hold them against each other.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from inspect_ai.log import EvalLog, EvalSample, read_eval_log

from atp_utils import resolve, shown
from atp_utils.evolution.decisions import Decision, to_frame
from atp_utils.evolution.journal import REPLIES, Journal
from atp_utils.inspect_task import IDENTITY, as_asked
from atp_utils.parameters import EVOLVE
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files, folders

# What of a log's header says how it came about; addresses and keys stay there.
FACTS = {"eval_id": True, "created": True, "packages": True, "revision": {"commit", "dirty"}}
SECRET = {"extra_headers", "extra_body"}


def read_inspect(log: str | Path | EvalLog) -> pd.DataFrame:
    """The decisions of a log, or of its file: the table of `evolution.decisions`.

    Samples that ended with an error or at a limit, as far as the evaluation tolerated them, have none. Raises
    FileNotFoundError, and ValueError for a log that isn't whole, or of another task.
    """
    log = _log(log)
    given = _parameters(log)
    rows = [Decision(**row) for sample in _played(log) for row in sample.store["decisions"]]
    return to_frame(rows, model=given.model, arm=given.arm, training_seed=given.training_seed)


def write_run(log: str | Path | EvalLog, out: str | Path) -> Path:
    """The folder ``out`` with a log's decisions, replies and parameters, as a finished run has them.

    Raises what `read_inspect` raises, and FileExistsError for a folder that holds anything else.
    """
    log = _log(log)
    decisions, samples, given = read_inspect(log), _played(log), _parameters(log)
    scenario = log.eval.metadata["scenario"]
    run = Run(EVOLVE[scenario], given, resolve(out), SCENARIOS[scenario])
    folders.claim(run.out, run.marker | {"log": log.eval.eval_id})
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for sample in samples for line in sample.store["journal"]]
    files.write_text(run.out / REPLIES, "".join(lines))
    facts = log.eval.model_dump(mode="json", include=FACTS)
    facts |= {"options": log.plan.config.model_dump(mode="json", exclude_none=True, exclude=SECRET)}
    facts |= {"samples": len(samples), "samples without decisions": len(log.samples) - len(samples)}
    identity = IDENTITY.format(log.eval.model)
    with Journal(run.out) as record:
        for digest in record.record.replies:
            record.find(record.record.request(digest), identity)
        record.finish(decisions, run.settings, identity, inspect=facts)
    return run.out


def _log(log: str | Path | EvalLog) -> EvalLog:
    if isinstance(log, EvalLog):
        read = log
    else:
        read = read_eval_log(str(log) if "://" in str(log) else str(resolve(log)))
    if read.status != "success":
        raise ValueError(f"{read.location}: status {read.status!r}; `inspect eval-retry` asks for what is missing")
    if (read.eval.metadata or {}).get("scenario") not in SCENARIOS or not _played(read):
        raise ValueError(f"{read.location}: no episode of ours that was played to its end")
    return read


def _parameters(log: EvalLog) -> Any:
    told = log.eval.metadata
    return as_asked(told["scenario"], told["settings"] | {"model": log.eval.model}, log.plan.config)


def _played(log: EvalLog) -> list[EvalSample]:
    """The samples whose episode came to its end, in their order."""
    whole = (sample for sample in log.samples or [] if sample.error is None and "decisions" in sample.store)
    return sorted(whole, key=lambda sample: sample.metadata["place"])


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 where nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.inspect_log", description=__doc__.split("\n\n")[0])
    parser.add_argument("log", help="a log of `inspect eval`, e.g. logs/NAME.eval")
    parser.add_argument("out", help="the run's folder, e.g. runs/inspect/NAME")
    options = parser.parse_args(arguments)
    try:
        out = write_run(options.log, options.out)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
