"""A run of a notebook: all of its parameters, checked, and the folder that it alone writes to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_utils import folders, parameters, resolve
from atp_utils.code_digest import code_of

# Where a run takes place, and not which one it is.
PLACE = {"out", "overwrite", "figures", "urls", "key_variable", "concurrency", "launcher"}


@dataclass(frozen=True)
class Run:
    """``parameters`` are all of the notebook's, as they go into the manifest; ``out`` is absolute and ours."""

    notebook: str
    parameters: dict[str, Any]
    out: Path

    @property
    def marker(self) -> dict[str, Any]:
        """What the folder holds: the notebook and the parameters that its results depend on."""
        return {"notebook": self.notebook, "parameters": _what(self.parameters)}

    def beside(self, name: str) -> Path:
        """A folder of ours beside ``out``, ``OUT-NAME``, for replies that outlive a change of the parameters."""
        folder = self.out.with_name(f"{self.out.name}-{name}")
        return folders.claim(folder, {"notebook": self.notebook, "replies": name})


def start(notebook: str, namespace: Mapping[str, Any], *place: str) -> Run:
    """The run of ``notebooks/<notebook>.ipynb`` with the values that its parameters have in ``namespace``.

    An empty ``out`` becomes ``runs/demo/PLACE...-DIGEST``, whose digest is that of parameters and code: runs that
    differ have different folders. Raises ValueError for a wrong value, FileExistsError for a folder that isn't ours.
    """
    values = _values(notebook, namespace)
    folder = resolve(values["out"] or default_folder(notebook, values, *place))
    folders.holds(folder)
    return Run(notebook, values, folder)


def data_folders(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of prompts, one a scenario below ``out``, claimed for the parameters in ``namespace``.

    They are marked one by one: in the repository ``data`` holds other things too. Raises as `start`, `folders.claim`.
    """
    values = _values(notebook, namespace)
    what = {"notebook": notebook, "parameters": _what(values)}
    asked = {name: resolve(values["out"] or "data") / name for name in parameters.EVOLVE}
    for folder in asked.values():
        folders.check(folder, what, overwrite=values["overwrite"])
    return {name: folders.claim(folder, what, overwrite=True, append=True) for name, folder in asked.items()}


def _values(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    return parameters.check(notebook, {name: namespace[name] for name in parameters.defaults_of(notebook)})


def default_folder(notebook: str, values: Mapping[str, Any], *place: str) -> str:
    """Where a run with ``values`` is kept if ``out`` is empty."""
    code = code_of(f"notebooks/{notebook}.ipynb")
    digest = hashlib.sha256(json.dumps([notebook, _what(values), code]).encode()).hexdigest()[:8]
    return f"runs/demo/{'/'.join(map(parameters.as_folder, place))}-{digest}"


def _what(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in PLACE}
