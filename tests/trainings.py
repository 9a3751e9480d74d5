"""A notebook's training run with some of its parameters set, as notebooks 2 and 3 have it, and rows to train on."""

from pathlib import Path
from typing import Any

from atp_utils import parameters
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.training import pairs


def a_run(method: str, model: str, out: Path, **changes: Any) -> Run:
    book = parameters.ALIGN[method]
    given = parameters.check(book, changes | {"model": model, "out": str(out)})
    return Run(book, given, out, SCENARIOS[given.scenario])


def rows_of(run: Run, items: list) -> list[dict]:
    """What notebook 2 or 3 makes of training ``items``."""
    return pairs.preference_rows(run, items)[0] if hasattr(run.parameters, "pairs") else pairs.reward_rows(run, items)
