"""A run of a notebook: all of its parameters, checked, and the folder that it alone writes to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atp_utils import parameters, resolve
from atp_utils.scenarios.base import Scenario
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support import files, folders
from atp_utils.support.code_digest import code_of

DATA = "01_generate_data"
# Where a run takes place and what is asked of its result, and not which one it is.
PLACE = {"out", "overwrite", "figures", "servers", "launcher", "batch_tokens", "cache_gb", "min_mass"}


@dataclass(frozen=True)
class Run:
    """``parameters`` are all of the notebook's (`parameters.MODELS`); ``out`` is absolute and ours."""

    notebook: str
    parameters: Any
    out: Path
    scenario: Scenario | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All parameters, as they go into the manifest."""
        return self.parameters.model_dump(mode="json")

    @property
    def marker(self) -> dict[str, Any]:
        """What the folder holds: the notebook and the parameters that its results depend on."""
        what = {name: value for name, value in self.settings.items() if name not in PLACE}
        return {"notebook": self.notebook, "parameters": what}

    def beside(self, name: str) -> Path:
        """A folder of ours beside ``out``, ``OUT-NAME``, for replies that outlive a change of the parameters."""
        folder = self.out.with_name(f"{self.out.name}-{name}")
        return folders.claim(folder, {"notebook": self.notebook, "replies": name})


def start(notebook: str, namespace: Mapping[str, Any], kind: str, scenario: str, method: str = "") -> Run:
    """The run of ``notebooks/<notebook>.ipynb`` with the values that its parameters have in ``namespace``.

    An empty ``out`` becomes ``runs/demo/KIND/SCENARIO/MODEL/METHOD-DIGEST``, whose digest is that of parameters and
    code: runs that differ have different folders. ``method`` is that of a training, else the run's arm. Raises
    ValueError for a wrong value, FileExistsError for a folder that isn't ours.
    """
    values = _values(notebook, namespace)
    run = Run(notebook, values, Path(), SCENARIOS[scenario])
    folder = resolve(values.out or _default_folder(run, kind, method or values.arm))
    folders.holds(folder)
    return replace(run, out=folder)


def _values(notebook: str, namespace: Mapping[str, Any]) -> Any:
    names = parameters.model_of(notebook).model_fields
    return parameters.check(notebook, {name: namespace[name] for name in names if name in namespace})


def _default_folder(run: Run, kind: str, method: str) -> str:
    # A scenario from outside may have no notebook.
    books = [book for book in [f"notebooks/{run.notebook}.ipynb"] if resolve(book).is_file()]
    code = code_of(*books, source(run.scenario))
    digest = hashlib.sha256(json.dumps([run.marker, code]).encode()).hexdigest()[:8]
    place = "/".join(map(files.as_folder, (kind, run.scenario.name, run.parameters.model, method)))
    return f"runs/demo/{place}-{digest}"


def write_data(namespace: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """Make and write the prompts of every scenario, as notebook 1 does; scenario -> split -> items.

    The scenarios' folders are marked one by one: in the repository ``data`` holds other things too. Raises ValueError
    for a wrong value in ``namespace`` and what `folders.claim` raises, before anything is written.
    """
    values = _values(DATA, namespace)
    out, overwrite = resolve(values.out), values.overwrite
    markers = {name: prompts_marker(scenario, values) for name, scenario in SCENARIOS.items()}
    for name, marker in markers.items():
        folders.check(out / name, marker, overwrite=overwrite)
    made = {name: scenario.make_items(values) for name, scenario in SCENARIOS.items()}
    for name, splits in made.items():
        folders.claim(out / name, markers[name], overwrite=overwrite, append=True)
        for split, items in splits.items():
            files.write_jsonl(SCENARIOS[name].path(split, out), items)
    return made


def prompts_marker(scenario: Scenario, values: Any) -> dict[str, Any]:
    """What a scenario's folder of prompts holds, given all parameters of notebook 1."""
    return {"notebook": DATA, **scenario.origin(values)}
