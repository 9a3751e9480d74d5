"""Which recorded runs may stand in one table or figure: those that agree in all that isn't compared."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

# Where a run takes place, whose it is, and how much of it there is: tables show these, or take them in.
FREE = {"out", "data", "overwrite", "servers", "batch_tokens", "cache_gb", "dtype"}
FREE |= {"model", "arm", "training_seed", "adapter", "condition", "seeds", "items"}
# What a condition has for itself: its arms must agree in it, and other conditions may have another.
OWN = {"forced_rounds", "told", "ratios", "thresholds", "payoffs", "both_names", "fixed_colluders", "prompts"}


def fixed_by(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's manifest must agree with others of its scenario and model, by name.

    The parameters besides `FREE`, and the hashes of weights, chat template and prompts, as far as it has them: older
    manifests lack the last.
    """
    identity = str(facts.get("identity", "")).split("|")
    told = dict(facts.get("settings", {}))
    # An identity of this process: name, weights, precision, template, and more (`models.identity`).
    if len(identity) > 3 and "=" not in identity[1]:
        told |= {"weights": identity[1], "chat template": identity[3]}
    if facts.get("prompts"):
        told["prompts"] = facts["prompts"]
    return {name: value for name, value in told.items() if name not in FREE}


def check(runs: Iterable[tuple[str, tuple[str, str], str, Mapping[str, Any]]]) -> None:
    """Raise ValueError where two runs disagree; each is (its name, (scenario, model), condition, its manifest)."""
    first: dict[tuple, tuple[str, Any]] = {}
    for name, kind, condition, facts in runs:
        for setting, value in fixed_by(facts).items():
            place = (*kind, condition if setting in OWN else "", setting)
            other, before = first.setdefault(place, (name, value))
            if json.dumps(before, sort_keys=True) != json.dumps(value, sort_keys=True):
                raise ValueError(
                    f"{other} and {name} can't stand in one figure: {setting} is {before!r} in the one and {value!r} "
                    "in the other; name a folder of runs that agree (results), or run one of them anew"
                )
