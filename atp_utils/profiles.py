"""Profiles: which models, arms, scenarios and conditions a run of the pipeline has, and every notebook's parameters."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from atp_utils import resolve
from atp_utils.parameters import ALIGN, EVOLVE, ScenarioName, check, model_of
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files
from atp_utils.support.files import as_folder, named_file
from atp_utils.support.values import Arm, Distinct, Natural, Text

PROFILES = Path("profiles")
# What the pipeline gives each job; a profile's value would be ignored.
GIVEN = {"adapter", "data", "out", "results", "figures", "overwrite"}
GIVEN |= {"model", "scenario", "arm", "training_seed", "condition"}


def _models(models: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that no folder can have, two names of one model or one folder, and settings for all models."""
    for alike in (as_folder, resolve):
        seen: dict[Any, str] = {}
        for name in models:
            if (other := seen.setdefault(alike(name), name)) != name:
                raise ValueError(f"{other!r} and {name!r} are the same model, or would share a folder of results")
    for key in (key for settings in models.values() for key in settings):
        if "model" not in model_of(key.partition("/")[0]).model_fields:
            raise ValueError(f"{key} runs for all models at once: its settings belong under notebooks")
    return models


def _settings(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Refuse what no run would look for, and values that its notebook refuses."""
    for key, values in settings.items():
        book, slash, part = key.partition("/")
        try:
            names = model_of(book).model_fields
            if slash and "scenario" in names and part not in SCENARIOS:
                raise ValueError(f"no scenario {part!r} (there are: {', '.join(SCENARIOS)})")
            if slash and "condition" in names:
                check(book, {"condition": part})
            elif slash and "scenario" not in names:
                raise ValueError(f"{book} takes no scenario and no condition")
            if book in ALIGN.values() and "seed" in values:
                raise ValueError("seed is set by training_seeds, or by -p")
            if given := sorted(GIVEN.intersection(values)):
                raise ValueError(f"{given[0]} is set by the pipeline, or by -p; no profile can set it")
            check(book, values)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return settings


Settings = Annotated[dict[str, dict[str, Any]], AfterValidator(_settings)]


Conditions = dict[ScenarioName, Annotated[list[Text], Field(min_length=1), Distinct]]


def _conditions(named: Conditions) -> Conditions:
    for scenario, conditions in named.items():
        for condition in conditions:
            check(EVOLVE[scenario], {"condition": condition})
    return named


class Profile(BaseModel):
    """One file of ``profiles/``: which models, arms, scenarios and conditions, and the parameters of every notebook.

    ``notebooks`` maps a notebook to its parameters; those of ``notebook/part`` are for one scenario (training) or one
    condition (evolution) that is run. ``models`` maps each model to what it has otherwise, in the same form. A scenario
    that ``conditions`` doesn't name has the standard one; one that ``training_seeds`` doesn't name one training an arm,
    one with an empty list its base arm alone. A file that is ``like`` another profile has what it doesn't say from
    there, notebook by notebook; null takes one away.
    """

    model_config = ConfigDict(extra="forbid")
    models: Annotated[dict[Text, Settings], Field(min_length=1), AfterValidator(_models)]
    arms: Annotated[list[Arm], Field(min_length=1), Distinct]
    scenarios: Annotated[list[ScenarioName], Field(min_length=1), Distinct]
    conditions: Annotated[Conditions, AfterValidator(_conditions)] = {}
    training_seeds: dict[ScenarioName, Annotated[list[Natural], Distinct]] = {}
    notebooks: Settings

    @model_validator(mode="before")
    @classmethod
    def _laid_over(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "like" not in given:
            return given
        own = dict(given)
        under = files.read_yaml(named_file("profile", PROFILES, str(own.pop("like"))), dict[str, Any])
        if "like" in under:
            raise ValueError(f"like: {given['like']} is itself like another profile: name that one")
        if isinstance(books := own.get("notebooks"), dict):
            before = under.get("notebooks", {})
            alike = {key for key, values in books.items() if isinstance(values, dict)} & before.keys()
            merged = before | books | {key: before[key] | books[key] for key in alike}
            own["notebooks"] = {key: each for key, each in merged.items() if each is not None or key not in before}
        return under | own

    @model_validator(mode="after")
    def _evolutions_can_be_run(self):
        for scenario, notebook in EVOLVE.items():
            listed = [f"{notebook}/{condition}" for condition in self.conditions.get(scenario, ["standard"])]
            for key in (key for settings in (self.notebooks, *self.models.values()) for key in settings):
                if key.startswith(f"{notebook}/") and key not in listed:
                    raise ValueError(f"{key}: conditions doesn't list it for {scenario}, so nothing would look for it")
        if idle := [scenario for scenario in self.scenarios if not self.policies(scenario)]:
            raise ValueError(f"training_seeds.{idle[0]}: no seed, and arms has no base: nothing would evolve")
        for scenario, condition in self.evolutions:
            for model in self.models:
                check(EVOLVE[scenario], self.given(EVOLVE[scenario], condition, model) | {"condition": condition})
        return self

    @property
    def evolutions(self) -> list[tuple[str, str]]:
        """(scenario, condition) of all evolutions."""
        return [(name, condition) for name in self.scenarios for condition in self.conditions.get(name, ["standard"])]

    def policies(self, scenario: str) -> list[str]:
        """What evolves in a scenario: ``base``, and each aligned arm with each seed of its training, ``dpo-0``."""
        seeds = self.training_seeds.get(scenario, [0])
        return [name for arm in self.arms for name in ([arm] if arm == "base" else [f"{arm}-{seed}" for seed in seeds])]

    @property
    def figures(self) -> list[str]:
        """The notebooks that draw what the evolutions give."""
        played = {
            "07_heatmaps": ("collusion", "standard"),
            "09_dose_response": ("role_play", "forced_history"),
            "10_critical_mass": ("collusion", "forced_history"),
        }
        return ["08_figures", *(book for book, evolution in played.items() if evolution in self.evolutions)]

    def given(self, notebook: str, part: str | None = None, model: str | None = None) -> dict[str, Any]:
        """What the profile says of one run: the notebook's, its ``part``'s, the model's; later ones win."""
        merged: dict[str, Any] = {}
        for source in (self.notebooks, self._own(model) if model else {}):
            for key in (notebook, f"{notebook}/{part}"):
                merged |= source.get(key, {})
        return merged

    def parameters(self, notebook: str, part: str | None = None, model: str | None = None) -> Any:
        """All parameters of one run, checked."""
        return check(notebook, self.given(notebook, part, model))

    def of_model(self, name: str) -> "Profile":
        """The profile for the model ``name`` alone: with what it has of its own if it is one of the profile's."""
        return Profile.model_validate(self.model_dump() | {"models": {name: self._own(name)}})

    def _own(self, model: str) -> dict[str, dict[str, Any]]:
        # A shell may have made another path of it: ~/m.
        return next((own for name, own in self.models.items() if resolve(name) == resolve(model)), {})


def run_folder(profile: str) -> str:
    """Where the results of a profile, a name or a file, go: ``runs/NAME``."""
    return f"runs/{as_folder(Path(profile).name.removesuffix('.yaml'))}"


def read_profile(name: str) -> Profile:
    """The profile ``profiles/<name>.yaml``, or the file ``name`` if it ends in .yaml, every parameter checked.

    Raises FileNotFoundError, or ValueError naming file, key and what was expected.
    """
    return files.read_yaml(named_file("profile", PROFILES, name), Profile)
