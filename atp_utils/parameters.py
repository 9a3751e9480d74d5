"""Names and types of the notebooks' parameters, and the profiles that hold their values.

A name means the same in every notebook. A notebook's own parameters are those of its one cell tagged
``parameters``; papermill only warns of an unknown name and runs with the default, so names and values are
checked here, before anything starts.
"""

import json
from ast import literal_eval
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import papermill
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from atp_utils import files, resolve, shown
from atp_utils.collusion import Visibility
from atp_utils.openai_wire import checked_url

NOTEBOOKS = Path("notebooks")
PROFILES = Path("profiles")

# Which notebook aligns by which method, and which lets which scenario evolve: the pipeline's and the plan's one list.
ALIGN = {"dpo": "02_align_dpo", "grpo": "03_align_grpo"}
EVOLVE = {"role_play": "04_evolve_role_play", "tool_use": "05_evolve_tool_use", "collusion": "06_evolve_collusion"}

Scenario = Literal["role_play", "tool_use", "collusion"]
Arm = Literal["base", "dpo", "grpo"]
Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Even = Annotated[int, Field(ge=2, multiple_of=2, strict=True)]
# YAML 1.1 reads 1e-5 as text; a person who writes it means the number.
Number = BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)
Rate = Annotated[float, Number, Field(gt=0)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
# Where a key may be put by mistake: no error repeats what stands there. Few keys look like a variable's name.
DISCREET = {"urls", "key_variable"}

TYPES: dict[str, Any] = {
    "model": Text,
    "scenario": Scenario,
    "arm": Arm,
    "adapter": str,
    "urls": list[Annotated[str, AfterValidator(checked_url)]],
    "served_name": str,
    "tokenizer": str,
    "key_variable": Annotated[str, Field(pattern=r"^([A-Z_][A-Z0-9_]*)?$")],
    "concurrency": Positive,
    "data": Text,
    "out": Text,
    "results": Text,
    "figures": Text,
    "seed": Natural,
    "seeds": Annotated[list[Natural], Field(min_length=1)],
    "train_per_environment": Even,
    "test_per_environment": Even,
    "instances_per_game": Even,
    "simple_problems": Positive,
    "complex_problems": Positive,
    "simple_test": Positive,
    "complex_test": Positive,
    "problem_source": Text,
    "rounds": Positive,
    "agents": Annotated[int, Field(ge=2, le=1000, strict=True)],
    "thresholds": Annotated[list[Positive], Field(min_length=1)],
    "payoffs": Annotated[list[Annotated[list[float], Field(min_length=3, max_length=3)]], Field(min_length=1)],
    "visibility": Visibility,
    "fixed_colluders": Natural,
    "agents_per_seed": Positive,
    "simple_per_round": Positive,
    "complex_per_round": Positive,
    "tool_cost": Rate,
    "direct_cost": Rate,
    "max_calls": Positive,
    "tool_seconds": Annotated[float, Number, Field(ge=0.01, le=3600)],
    "items": Natural,
    "protocol": Literal["choose", "reason"],
    "max_attempts": Positive,
    "max_new_tokens": Positive,
    "temperature": Annotated[float, Number, Field(ge=0, le=10)],
    "top_p": Annotated[float, Number, Field(gt=0, le=1)],
    "top_k": Natural,
    "thinking": bool,
    "keep_thinking": bool,
    "pairs": Literal["answers", "elicited", "solutions"],
    "samples_per_problem": Positive,
    "max_pairs": Positive,
    "learning_rate": Rate,
    "epochs": Rate,
    "max_steps": Natural,
    "batch_size": Positive,
    "accumulation": Positive,
    "group_size": Annotated[int, Field(ge=2, strict=True)],
    "beta": Annotated[float, Number, Field(ge=0)],
    "lora_rank": Positive,
    "warmup_ratio": Share,
    "save_steps": Positive,
    "prefill": str,
    "checkpoint_activations": bool,
    "use_vllm": bool,
    "launcher": str,
}


@cache
def defaults_of(notebook: str) -> Mapping[str, Any]:
    """Parameters of ``notebooks/<notebook>.ipynb`` and their values there, in the order of its tagged cell."""
    path = resolve(NOTEBOOKS / f"{notebook}.ipynb")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in resolve(NOTEBOOKS).glob("*.ipynb")))
        raise FileNotFoundError(f"no notebook {notebook!r} in {NOTEBOOKS} (there are: {known})")
    return {name: literal_eval(found["default"]) for name, found in papermill.inspect_notebook(str(path)).items()}


def check(notebook: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as the notebook takes them; raises ValueError for an unknown name or a wrong value."""
    names, checked = defaults_of(notebook), {}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{notebook} has no parameter {name!r} (it has: {', '.join(names)})")
        try:
            checked[name] = TypeAdapter(TYPES[name]).validate_python(value)
        except ValidationError as error:
            explained = files.explain(error, quoted=name not in DISCREET)
            raise ValueError(f"{notebook}, parameter {name}: {explained}") from None
    return checked


def from_text(text: str) -> Any:
    """A command line's value: JSON where it is JSON (numbers, lists, true), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class Profile(BaseModel):
    """One file of ``profiles/``: which models, arms and scenarios, and the parameters of every notebook.

    ``notebooks`` maps a notebook, or ``notebook/scenario`` where one notebook serves several, to its
    parameters. ``models`` maps each model to what it has otherwise, in the same form.
    """

    model_config = ConfigDict(extra="forbid")
    models: dict[Text, dict[str, dict[str, Any]]] = Field(min_length=1)
    arms: list[Arm] = Field(min_length=1)
    scenarios: list[Scenario] = Field(min_length=1)
    notebooks: dict[str, dict[str, Any]]

    @property
    def figures(self) -> list[str]:
        """The notebooks that draw what the scenarios give."""
        return ["08_figures"] + (["07_heatmaps"] if "collusion" in self.scenarios else [])

    def parameters(self, notebook: str, scenario: str | None = None, model: str | None = None) -> dict[str, Any]:
        """Checked parameters of one run: the notebook's, the scenario's, the model's; later ones win."""
        merged: dict[str, Any] = {}
        for source in (self.notebooks, self.models.get(model, {}) if model else {}):
            for key in (notebook, f"{notebook}/{scenario}"):
                merged |= source.get(key, {})
        return check(notebook, merged)


def read_profile(name: str) -> Profile:
    """The profile ``profiles/<name>.yaml``, or the file ``name`` if it ends in .yaml, every parameter checked.

    Raises FileNotFoundError, or ValueError naming file, key and what was expected.
    """
    path = resolve(name if name.endswith(".yaml") else PROFILES / f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in resolve(PROFILES).glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r} (there are: {known})")
    profile = files.read_yaml(path, Profile)
    for source in (profile.notebooks, *profile.models.values()):
        for key, values in source.items():
            try:
                check(key.partition("/")[0], values)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{shown(path)}, {key}: {error}") from None
    return profile
