"""``python -m atp_utils.pilot PROFILE``: run the smallest job of each kind, measure it, and say what the whole takes.

Every kind of job (an evolution or a training of a scenario and model) is run on this machine with the profile's own
parameters but for its size: a scenario's ``pilot`` parameters, two items and two steps. Seconds a decision, or a step,
times their number in the whole profile give the hours, and with ``--dollars`` the bill; nothing of the profile itself
is run. Larger batches take less time a decision, long histories more, and a longest reply holds up its batch: expect a
factor of two either way.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from atp_utils import models, parameters, resolve, runs
from atp_utils.evolution.protocol import Protocol
from atp_utils.models import weights_memory
from atp_utils.models.chat_template import render
from atp_utils.parameters import ALIGN, EVOLVE
from atp_utils.profiles import Profile, read_profile
from atp_utils.runs import Run, evolving
from atp_utils.scenarios.base import Scenario
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import folders
from atp_utils.support.files import as_folder
from atp_utils.support.manifest import read_manifest

ITEMS, STEPS = 2, 2


def pilot(profile: Profile, folder: Path) -> pd.DataFrame:
    """One row a kind of job: model, scenario, job, jobs, GPUs, unit, units, seconds and tokens a unit, hours, most GB.

    Runs in ``folder``. An evolution counts as one GPU's job, a training as that of all its launcher's processes.
    ``jobs`` counts the policies and conditions that an evolution is run for (each taken to be as long as the standard
    one), and the seeds of a training; ``units`` and ``hours`` are of all of them, loading the model included.
    """
    data = folder / "data"
    runs.write_data(profile.given(runs.DATA) | {"out": str(data)})
    rows = []
    for model in profile.models:
        for name in profile.scenarios:
            given = {"model": model, "data": str(data), "overwrite": True}
            place = folder / name / as_folder(model)
            jobs = [*_trainings(profile, SCENARIOS[name], given, place)]
            jobs.append(_evolution(profile, SCENARIOS[name], given, place / "evolution"))
            rows += [{"model": model, "scenario": name} | job for job in jobs]
    return pd.DataFrame(rows)


def _evolution(profile: Profile, scenario: Scenario, given: dict[str, Any], out: Path) -> dict[str, Any]:
    asked = profile.given(EVOLVE[scenario.name], None, given["model"]) | given
    whole = parameters.check(EVOLVE[scenario.name], asked)
    conditions = sum(name == scenario.name for name, _ in profile.evolutions)
    jobs = len(profile.policies(scenario.name)) * conditions
    units = scenario.decisions(whole, len(scenario.test_items(whole))) * jobs
    small = evolving.begin(scenario.name, asked | dict(scenario.pilot) | {"arm": "base", "out": str(out)})
    loading, _ = _timed(lambda: getattr(small.engine, "model", None))
    seconds, table = _timed(small.play)
    tokens = (table["prompt_tokens"] + table["completion_tokens"]).mean()
    return {
        "job": "evolution",
        "makes": scenario.paper,
        "jobs": jobs,
        "gpus": 1,
        **_extrapolated("decision", units, seconds / len(table), loading * jobs),
        "tokens": float(tokens),
        "most_gb": weights_memory.most_held() / 1e9,
    }


def _trainings(profile: Profile, scenario: Scenario, given: dict[str, Any], place: Path) -> Iterator[dict[str, Any]]:
    from atp_utils.training import launch, pairs, trainer

    trained = Counter(name.partition("-")[0] for name in profile.policies(scenario.name) if name != "base")
    for method, seeds in trained.items():
        book, out = ALIGN[method], place / method
        asked = profile.given(book, scenario.name, given["model"]) | given | {"scenario": scenario.name}
        asked |= {"min_mass": 0} if method == "dpo" else {}
        whole = parameters.check(book, asked)
        run = Run(book, parameters.check(book, asked | {"max_steps": STEPS, "out": str(out)}), out, scenario)
        items = pairs.training_items(run, method)
        if method == "dpo":
            writing, (rows, _) = _timed(lambda run=run, items=items: pairs.preference_rows(run, items[:ITEMS]))
            rows = rows or longest_rows(run, items[:ITEMS])
            # Bare answers come in both orders of the options, as GRPO's prompts do.
            most = len(items) * (whole.samples_per_problem if whole.pairs == "written" else 2)
            count, writing = min(most, whole.max_pairs), writing / ITEMS * len(items)
        else:
            rows, count, writing = pairs.reward_rows(run, items[:ITEMS]), 2 * len(items), 0.0
        wall, _ = _timed(lambda run=run, rows=rows, method=method: trainer.adapter(run, method, rows))
        facts = read_manifest(out)
        shutil.rmtree(out)  # a whole model takes as much room as its base
        steps, once = trainer.steps(whole, count), writing + max(wall - facts["train_seconds"], 0)
        yield {
            "job": method,
            "makes": f"{method} arm of {scenario.paper}",
            "jobs": seeds,
            "gpus": launch.processes(whole.launcher)[1] if whole.launcher else 1,
            **_extrapolated("step", steps * seeds, facts["train_seconds"] / STEPS, once * seeds),
            "most_gb": facts["most_bytes"] / 1e9,
        }


def longest_rows(run: Run, items: Sequence) -> list[dict[str, str]]:
    """DPO rows of ``items`` where the model wrote none that could be read: replies of the greatest length."""
    tokenizer, given = models.load_tokenizer(run.parameters.model), run.parameters
    chats = [run.scenario.opening(item, Protocol(given.protocol)) for item in items]
    sides = {side: word * given.max_new_tokens for side, word in (("chosen", " yes"), ("rejected", " no"))}
    return [{"prompt": render(tokenizer, chat, given.thinking)} | sides for chat in chats]


def bill(table: pd.DataFrame, dollars: float) -> str:
    """What the jobs of a pilot's ``table`` cost at ``dollars`` a GPU and hour, in words; a job holds its ``gpus``."""
    hours = float((table["hours"] * table["gpus"]).sum())
    return f"{hours:.1f} GPU hours x ${dollars:g} = ${hours * dollars:,.0f}"


def _extrapolated(unit: str, units: int, seconds: float, once: float) -> dict[str, Any]:
    """``units`` of work of so many ``seconds`` each, after what takes time ``once``."""
    return {"unit": unit, "units": units, "seconds": seconds, "hours": (units * seconds + once) / 3600}


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for a profile that isn't one."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.pilot", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", help="name of a profile, or its file")
    parser.add_argument("--model", help="this model in place of the profile's")
    parser.add_argument("--dollars", type=float, help="what a GPU costs an hour")
    options = parser.parse_args(arguments)
    models.quiet()
    try:
        profile = read_profile(options.profile)
        profile = profile.of_model(options.model) if options.model else profile
        base = folders.claim(resolve("runs/pilot"), {"pilot": "scratch"})
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            table = pilot(profile, Path(scratch))
    except (ValueError, FileNotFoundError, FileExistsError, MemoryError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep="–"))
    print(f"{table['jobs'].sum()} jobs, {table['hours'].sum():.1f} hours one after the other on this machine")
    print(f"the largest of these small jobs held {table['most_gb'].max():.1f} GB, in each process")
    if options.dollars is not None:
        print(bill(table, options.dollars))
    print(f"nothing of the profile itself was run; make reproduce PROFILE={options.profile} does that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
