"""``python -m atp_utils.pilot PROFILE``: run the smallest job of each kind, measure it, and say what the whole takes.

Every kind of job (an evolution or a training of a scenario and model) is run on this machine with the profile's own
parameters but for its size: a scenario's ``pilot`` parameters, two items and two steps. Seconds a decision, or a step,
times their number in the whole profile give the hours. Larger batches take less time a decision, long histories more,
and a longest reply holds up its round: expect a factor of two either way.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from atp_utils import models, parameters, resolve, runs
from atp_utils.parameters import ALIGN, EVOLVE, Profile, read_profile
from atp_utils.runs import Run, evolving
from atp_utils.scenarios.base import Scenario
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import folders
from atp_utils.support.files import as_folder

ITEMS, STEPS = 2, 2


def pilot(profile: Profile, folder: Path) -> pd.DataFrame:
    """One row a kind of job: model, scenario, job, jobs, unit, units, seconds and tokens a unit, hours.

    Runs in ``folder``. ``jobs`` counts the arms and conditions that an evolution is run for (each
    taken to be as long as the standard one); ``units`` and ``hours`` are of all of
    them, loading the model included.
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
    units = scenario.decisions(whole, len(scenario.test_items(whole))) * len(profile.arms) * conditions
    small = evolving.begin(scenario.name, asked | dict(scenario.pilot) | {"arm": "base", "out": str(out)})
    loading, _ = _timed(lambda: getattr(small.engine, "model", None))
    seconds, table = _timed(small.play)
    tokens = (table["prompt_tokens"] + table["completion_tokens"]).mean()
    return {
        "job": "evolution",
        "makes": scenario.paper,
        "jobs": len(profile.arms) * conditions,
        **_extrapolated("decision", units, seconds / len(table), loading * len(profile.arms) * conditions),
        "tokens": float(tokens),
    }


def _trainings(profile: Profile, scenario: Scenario, given: dict[str, Any], place: Path) -> Iterator[dict[str, Any]]:
    from atp_utils.training import pairs, trainer

    for method in (arm for arm in profile.arms if arm != "base"):
        book, out = ALIGN[method], place / method
        asked = profile.given(book, scenario.name, given["model"]) | given | {"scenario": scenario.name}
        asked |= {"min_mass": 0} if method == "dpo" else {}
        whole = parameters.check(book, asked)
        run = Run(book, parameters.check(book, asked | {"max_steps": STEPS, "out": str(out)}), out, scenario)
        items = pairs.training_items(run, method)
        if method == "dpo":
            writing, (rows, _) = _timed(lambda run=run, items=items: pairs.preference_rows(run, items[:ITEMS]))
            # Bare answers come in both orders of the options, as GRPO's prompts do.
            most = len(items) * (whole.samples_per_problem if whole.pairs == "written" else 2)
            count, writing = min(most, whole.max_pairs), writing / ITEMS * len(items)
        else:
            rows, count, writing = pairs.reward_rows(run, items[:ITEMS]), 2 * len(items), 0.0
        seconds, _ = _timed(lambda run=run, rows=rows, method=method: trainer.adapter(run, method, rows))
        yield {
            "job": method,
            "makes": f"{method} arm of {scenario.paper}",
            "jobs": 1,
            **_extrapolated("step", trainer.steps(whole, count), seconds / STEPS, writing),
        }


def _extrapolated(unit: str, units: int, seconds: float, once: float) -> dict[str, Any]:
    """``units`` of work of so many ``seconds`` each, after what takes time ``once``."""
    return {"unit": unit, "units": units, "seconds": seconds, "hours": (units * seconds + once) / 3600}


def _most_memory() -> int:
    """Most bytes that this process has held: of the GPU's memory, or else of the machine's (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for a profile that isn't one."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.pilot", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", help="name of a profile, or its file")
    parser.add_argument("--model", help="this model in place of the profile's")
    options = parser.parse_args(arguments)
    models.quiet()
    try:
        profile = read_profile(options.profile)
        profile = profile.of_model(options.model) if options.model else profile
        base = folders.claim(resolve("runs/pilot"), {"pilot": "scratch"})
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            table = pilot(profile, Path(scratch))
    except (ValueError, FileNotFoundError, FileExistsError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep="–"))
    print(f"{table['jobs'].sum()} jobs, {table['hours'].sum():.1f} hours one after the other on this machine")
    print(f"the largest of these small jobs held {_most_memory() / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
