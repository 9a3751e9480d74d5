"""The scenarios by name: the modules of this package that have a ``SCENARIO``, and files named from outside.

``ATP_SCENARIOS`` lists such files, with the system's path separator between them; see ``docs/new_scenario.md``.
"""

import importlib
import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from atp_utils import resolve, scenarios
from atp_utils.scenarios.base import Scenario

OUTSIDE = "ATP_SCENARIOS"


def _modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(scenarios.__path__):
        yield importlib.import_module(f"{scenarios.__name__}.{found.name}")
    for name in filter(None, os.environ.get(OUTSIDE, "").split(os.pathsep)):
        path = resolve(name)
        if not path.is_file():
            raise FileNotFoundError(f"the environment variable {OUTSIDE} names {name}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "SCENARIO"):
            raise ValueError(f"{name}: expected a scenario called SCENARIO, see docs/new_scenario.md")
        yield module


def _found() -> dict[str, Scenario]:
    known = [module.SCENARIO for module in _modules() if hasattr(module, "SCENARIO")]
    # In the order of their notebooks; those from outside, as a rule without one, come last.
    known.sort(key=lambda scenario: (scenario.notebook or "~", scenario.name))
    named = {scenario.name: scenario for scenario in known}
    if len(named) < len(known):
        raise ValueError(f"scenarios need distinct names, got {[scenario.name for scenario in known]}")
    return named


SCENARIOS: dict[str, Scenario] = _found()


def source(scenario: Scenario) -> Path:
    """The file that a scenario is written in: its import closure is the scenario's code."""
    return Path(inspect.getfile(type(scenario)))
