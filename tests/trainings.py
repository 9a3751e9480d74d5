"""A notebook's training run with some of its parameters set, as notebooks 2 and 3 have it."""

from pathlib import Path
from typing import Any

from atp_utils import parameters
from atp_utils.runs import Run

BOOKS = {"dpo": "02_align_dpo", "grpo": "03_align_grpo"}


def a_run(method: str, model: str, out: Path, **changes: Any) -> Run:
    defaults = parameters.defaults_of(BOOKS[method])
    assert changes.keys() <= defaults.keys()
    return Run(BOOKS[method], dict(defaults) | changes | {"model": model, "out": str(out)}, out)
