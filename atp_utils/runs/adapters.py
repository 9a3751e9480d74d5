"""Adapters that are published with the repository: taken where their settings are those asked for, and written.

Below `PUBLISHED` each has a folder MODEL/SCENARIO/ARM/SEED: weights and configuration as PEFT reads them, manifest and
log of the training, and a model card.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from atp_utils import parameters, resolve, shown
from atp_utils.parameters import ALIGN, EVOLVE
from atp_utils.runs import PLACE
from atp_utils.support import files, folders
from atp_utils.support.files import as_folder
from atp_utils.support.manifest import MANIFEST, read_manifest

PUBLISHED = Path("data/adapters")
WEIGHTS, CONFIG, LOG, CARD = "adapter_model.safetensors", "adapter_config.json", "training_log.csv", "README.md"
LARGEST = 2 << 20  # bytes of weights; what is larger belongs on a model hub
# What doesn't tell one training from another, what its place below `PUBLISHED` tells, and where its prompts lay.
ANY = PLACE | {"data", "model", "scenario", "seed"}


def folder(model: str, scenario: str, arm: str, seed: int, root: Path = PUBLISHED) -> Path:
    """The folder of an adapter below ``root``."""
    return root.joinpath(*map(as_folder, (model, scenario, arm, str(seed))))


def published(
    model: str,
    scenario: str,
    arm: str,
    seed: int,
    settings: Mapping[str, Any],
    prompts: Mapping[str, Any],
    root: Path = PUBLISHED,
) -> str:
    """The folder of the published adapter that was trained with ``settings``, a training's parameters; else "".

    Its training ``prompts`` must be those asked for too (`runs.prompts_marker`): others may hold what is tested here.
    Parameters that are newer than the adapter count as having had their defaults.
    """
    place = folder(model, scenario, arm, seed, root)
    manifest = resolve(place) / MANIFEST
    if not manifest.is_file() or not (resolve(place) / WEIGHTS).is_file():
        return ""
    facts = read_manifest(resolve(place))
    before = parameters.model_of(ALIGN[arm])().model_dump(mode="json") | facts.get("settings", {})
    same = _deciding(before) == _deciding(settings) and facts.get("prompts") == prompts
    return str(place) if same else ""


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ANY}


def publish(run: Path, root: Path = PUBLISHED) -> list[Path]:
    """Publish the complete adapters below ``run/adapters`` that are small enough; returns their folders.

    Whole models are not published. An adapter that was published before takes the new one's place, or leaves it. Raises
    FileExistsError for a folder that isn't ours.
    """
    done = []
    for manifest in folders.below(run / "adapters", MANIFEST):
        trained, facts = manifest.parent, read_manifest(manifest.parent)
        if not (trained / WEIGHTS).is_file() or (trained / WEIGHTS).stat().st_size > LARGEST:
            continue
        given, method = facts["settings"], facts["training"]["method"]
        target = resolve(folder(given["model"], given["scenario"], method, given["seed"], root))
        folders.holds(target, "adapters")
        with folders.rebuilding(target, {"adapter": facts["sha256"]}) as built:
            for name in (WEIGHTS, CONFIG, LOG, MANIFEST):
                shutil.copyfile(trained / name, built / name)
            files.write_text(built / CARD, card(facts, pd.read_csv(trained / LOG), shown(target)))
        done.append(target)
    return done


def card(facts: Mapping[str, Any], log: pd.DataFrame, place: str) -> str:
    """The model card of an adapter: what it is, how it was made, how it is used, and what it isn't."""
    given, last, arm = facts["settings"], log.iloc[-1], facts["training"]["method"]
    scenario, model = given["scenario"], given["model"]
    ends = ", ".join(f"{name} {last[name]:.3g}" for name in log.columns if name != "step")
    shape = f"rank {given['lora_rank']}, alpha {given['lora_alpha']:g}, {given['lora_targets']}"
    # Parameters that a manifest doesn't know had their defaults.
    past = f"behind {before} compliant rounds" if (before := given.get("history_pairs")) else "without any history"
    past += f" and without quarter {left_out} of the environments" if (left_out := given.get("held_out")) else ""
    return f"""---
base_model: {model}
library_name: peft
license: apache-2.0
---

# {scenario}, {arm.upper()}, seed {given["seed"]}, of {model}

A LoRA adapter ({shape}) that was trained to keep to the rules of {scenario}'s training prompts, {past}:
{facts["steps"]} steps on {facts["rows"]} rows. The last step's log: {ends} (`{LOG}`). `{MANIFEST}` has all parameters,
packages and the commit. SHA-256 of the weights: `{facts["sha256"]}`.

    python -m atp_utils.run notebooks/{EVOLVE[scenario]}.ipynb out.ipynb -p model {model} -p arm {arm} \\
        -p adapter {place}

Made for measuring how such training erodes: it makes no model safe.
"""
