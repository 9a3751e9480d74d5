"""Names and types of the notebooks' parameters, and the profiles that hold their values.

A name means the same in every notebook. A notebook's own parameters are those of its one cell tagged
``parameters``; papermill only warns of an unknown name and runs with the default, so names and values are
checked here, before anything starts.
"""

import contextlib
import json
import re
from ast import literal_eval
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    # What Python or a quoting hand wrote: '1e-5'.
    return float(value) if isinstance(value, str) else value


def _distinct(values: list) -> list:
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]!r} stands twice")
    return values


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Rate = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Distinct = AfterValidator(_distinct)
Text = Annotated[str, Field(min_length=1)]
# Where a key may be put by mistake: no error repeats what stands there. Few keys look like a variable's name.
DISCREET = {"urls", "key_variable"}
# What the pipeline gives each job; a profile's value would be ignored.
GIVEN = {"model", "scenario", "arm", "adapter", "data", "out", "results", "figures", "overwrite"}
# Bytes of a model's or a profile's name: file names hold 255, and the names of notebooks have more in them.
LONGEST = 200

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
    "out": str,
    "results": Text,
    "figures": Text,
    "overwrite": Flag,
    "seed": Natural,
    "seeds": Annotated[list[Natural], Field(min_length=1), Distinct],
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
    "thresholds": Annotated[list[Positive], Field(min_length=1), Distinct],
    "payoffs": Annotated[list[Annotated[list[Real], Field(min_length=3, max_length=3)]], Field(min_length=1), Distinct],
    "visibility": Visibility,
    "fixed_colluders": Natural,
    "agents_per_seed": Positive,
    "simple_per_round": Positive,
    "complex_per_round": Positive,
    "tool_cost": Rate,
    "direct_cost": Rate,
    "max_calls": Positive,
    "tool_seconds": Annotated[Real, Field(ge=0.01, le=3600)],
    "items": Natural,
    "protocol": Literal["choose", "reason"],
    "max_attempts": Positive,
    "max_new_tokens": Positive,
    "temperature": Annotated[Real, Field(ge=0, le=10)],
    "top_p": Annotated[Real, Field(gt=0, le=1)],
    "top_k": Natural,
    "thinking": Flag,
    "keep_thinking": Flag,
    "pairs": Literal["answers", "elicited", "solutions"],
    "samples_per_problem": Positive,
    "max_pairs": Positive,
    "learning_rate": Rate,
    "epochs": Rate,
    "max_steps": Natural,
    "batch_size": Positive,
    "accumulation": Positive,
    "group_size": Annotated[int, Field(ge=2, strict=True)],
    "beta": Annotated[Real, Field(ge=0)],
    "lora_rank": Positive,
    "warmup_ratio": Share,
    "save_steps": Positive,
    "prefill": str,
    "checkpoint_activations": Flag,
    "use_vllm": Flag,
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


def from_text(name: str, text: str) -> Any:
    """A command line's value of the parameter ``name``: the text itself where one is taken, else what it is as JSON."""
    kind = TypeAdapter(TYPES.get(name, str))
    with contextlib.suppress(ValidationError):
        if isinstance(kind.validate_python(text), str):
            return text
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def as_folder(name: str) -> str:
    """What a model is called in file names, which can't hold a slash; raises ValueError for what no file can be."""
    folder = name.replace("/", "--")
    # Snakemake reads braces as a wildcard, and a command line a dash as an option.
    if not folder.isprintable() or folder != folder.strip() or not name.strip(".") or re.search(r"^-|[{}]", name):
        raise ValueError(
            f"{name!r} can't name a folder of results: no dash in front, no braces, no control characters, "
            "no space around it, not only dots"
        )
    if len(folder.encode()) > LONGEST:
        raise ValueError(f"{name!r} can't name a folder of results: longer than {LONGEST} bytes; take a shorter path")
    return folder


def run_folder(profile: str) -> str:
    """Where the results of a profile, a name or a file, go: ``runs/NAME``."""
    return f"runs/{as_folder(Path(profile).name.removesuffix('.yaml'))}"


def _models(settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that no folder can have, and two names of one model or one folder."""
    for alike in (as_folder, resolve):
        seen: dict[Any, str] = {}
        for name in settings:
            if (other := seen.setdefault(alike(name), name)) != name:
                raise ValueError(f"{other!r} and {name!r} are the same model, or would share a folder of results")
    return settings


class Profile(BaseModel):
    """One file of ``profiles/``: which models, arms and scenarios, and the parameters of every notebook.

    ``notebooks`` maps a notebook, or ``notebook/scenario`` where one notebook serves several, to its
    parameters. ``models`` maps each model to what it has otherwise, in the same form.
    """

    model_config = ConfigDict(extra="forbid")
    models: Annotated[dict[Text, dict[str, dict[str, Any]]], Field(min_length=1), AfterValidator(_models)]
    arms: Annotated[list[Arm], Field(min_length=1), Distinct]
    scenarios: Annotated[list[Scenario], Field(min_length=1), Distinct]
    notebooks: dict[str, dict[str, Any]]

    @property
    def figures(self) -> list[str]:
        """The notebooks that draw what the scenarios give."""
        return ["08_figures"] + (["07_heatmaps"] if "collusion" in self.scenarios else [])

    def parameters(self, notebook: str, scenario: str | None = None, model: str | None = None) -> dict[str, Any]:
        """Checked parameters of one run: the notebook's, the scenario's, the model's; later ones win."""
        merged: dict[str, Any] = {}
        for source in (self.notebooks, self._own(model) if model else {}):
            for key in (notebook, f"{notebook}/{scenario}"):
                merged |= source.get(key, {})
        return check(notebook, merged)

    def _own(self, model: str) -> dict[str, dict[str, Any]]:
        # A shell may have made another path of it: ~/m.
        return next((own for name, own in self.models.items() if resolve(name) == resolve(model)), {})


def read_profile(name: str) -> Profile:
    """The profile ``profiles/<name>.yaml``, or the file ``name`` if it ends in .yaml, every parameter checked.

    Raises FileNotFoundError, or ValueError naming file, line, key and what was expected.
    """
    path = resolve(name if name.endswith(".yaml") else PROFILES / f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in resolve(PROFILES).glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r} (there are: {known})")
    profile = files.read_yaml(path, Profile)
    places = [("notebooks",), *(("models", model) for model in profile.models)]
    for place, settings in zip(places, (profile.notebooks, *profile.models.values()), strict=True):
        for key, values in settings.items():
            keys = [*place, key]
            try:
                book = _checked_book(key, place[0])
                for name, value in values.items():
                    keys = [*place, key, name]
                    if name in GIVEN:
                        raise ValueError(f"{name} is set by the pipeline, or by -p; no profile can set it")
                    check(book, {name: value})
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{shown(path)}, line {files.line_of(path, keys)}, {key}: {error}") from None
    return profile


def _checked_book(key: str, section: str) -> str:
    """The notebook of a profile's ``key``; raises ValueError where no run would look for the key."""
    book, slash, scenario = key.partition("/")
    names = defaults_of(book)
    if slash and "scenario" not in names:
        raise ValueError(f"{book} takes no scenario: the key is {book!r} alone")
    if slash and scenario not in get_args(Scenario):
        raise ValueError(f"no scenario {scenario!r} (there are: {', '.join(get_args(Scenario))})")
    if section == "models" and "model" not in names:
        raise ValueError(f"{book} runs for all models at once: its settings belong under notebooks")
    return book
