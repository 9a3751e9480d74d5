"""The pipeline: data -> adapters -> evolution -> figures, every step one notebook run by `atp_utils.run`.

A *policy* is what evolves: ``base``, or an arm with the seed of its training, ``dpo-0``. An adapter that is published
in data/adapters with the settings and training prompts that the profile asks for is taken from there, unless
`make reproduce ADAPTERS=train`.

`make reproduce PROFILE=quick` calls it. Results go to runs/PROFILE. A manifest, written last by the notebook,
is each step's output; the executed notebook is its log, so that a failed one is kept for reading.

A job runs again when its inputs, its parameters or its code change. Code is a digest without prose: an edited
markdown cell or docstring reruns no model. A job that does run again replays its journal, or takes its finished
adapter, as far as they still fit.

Threads and resources are for a cluster (docs/cluster.md): runtime in minutes, mem_mb the host's memory, gpu the GPUs of
a job. profiles/slurm can change them; profiles/default gives a model job all cores of one machine.
"""

import json
import re
import shlex

from atp_utils.engines import Servers
from atp_utils.parameters import ALIGN, EVOLVE
from atp_utils.profiles import read_profile, run_folder
from atp_utils.runs import adapters, prompts_marker
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support.code_digest import code_of
from atp_utils.support.files import as_folder

PROFILE = str(config.get("profile", "quick"))
# `make reproduce MODEL=...`: that model alone, with the profile's settings.
MODEL = str(config.get("model") or "")
SETTINGS = read_profile(PROFILE).of_model(MODEL) if MODEL else read_profile(PROFILE)
RUN = run_folder(PROFILE)
MODELS = {as_folder(name): name for name in SETTINGS.models}
PROMPTS = SETTINGS.parameters("01_generate_data")
# `make reproduce SERVERS=...`: what answers all evolutions (docs/servers.md). It is no `params`, so that a finished run
# isn't asked again for having been asked elsewhere.
SERVERS = str(config.get("servers") or "")
Servers.of(SERVERS)
# `make reproduce ADAPTERS=train`: no published adapter is taken.
TRAINS = str(config.get("adapters") or "published")
if TRAINS not in ("published", "train"):
    raise ValueError(f"ADAPTERS={TRAINS}: expected published or train")


# `make reproduce GPUS=8`: so many GPUs of one machine. A training has all of them, evolutions one each, side by side.
GPUS = int(config.get("gpus") or 0)
ONE_GPU = f"--gpus {GPUS}" if GPUS else ""


def given(**values):
    """Options of `atp_utils.run`, quoted for the shell: paths and names may hold anything."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return shlex.join(word for name, text in texts.items() for word in ("-p", name, text))


def code(book, *scenario):
    # What all scenarios share counts for each. That is cheap: a job whose own scenario hasn't changed replays its
    # replies, or finds its adapter.
    return code_of(f"notebooks/{book}.ipynb", *(source(SCENARIOS[name]) for name in scenario))


def prompts(scenario, split):
    """The file of a split that notebook 1 writes; a scenario without it makes its items from its sources."""
    own = SCENARIOS[scenario]
    return [f"{RUN}/data/{scenario}/{split}.jsonl"] if split in own.splits else list(own.sources)


def adapter_folder(scenario, model, policy):
    """The adapter of a policy: published, or trained here."""
    method, _, seed = policy.partition("-")
    settings = SETTINGS.parameters(ALIGN[method], scenario, MODELS[model]).model_dump(mode="json")
    drawn = prompts_marker(SCENARIOS[scenario], PROMPTS)
    ready = adapters.published(MODELS[model], scenario, method, int(seed), settings, drawn)
    return ready if ready and TRAINS != "train" else f"{RUN}/adapters/{scenario}/{model}/{policy}"


def adapter_manifest(wildcards):
    if wildcards.policy == "base":
        return []
    return f"{adapter_folder(wildcards.scenario, wildcards.model, wildcards.policy)}/manifest.json"


def align_given(wildcards):
    out = f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.method}-{wildcards.seed}"
    model, scenario, seed = MODELS[wildcards.model], wildcards.scenario, int(wildcards.seed)
    return given(model=model, scenario=scenario, seed=seed, data=f"{RUN}/data", out=out, overwrite=True)


def evolve_given(wildcards):
    model, policy, condition = MODELS[wildcards.model], wildcards.policy, wildcards.condition
    arm, _, seed = policy.partition("-")
    # Servers hold the adapters themselves.
    served = SERVERS or SETTINGS.given(EVOLVE[wildcards.scenario], None, model).get("servers")
    plain = policy == "base" or served
    adapter = "" if plain else adapter_folder(wildcards.scenario, wildcards.model, policy)
    out = f"{RUN}/evolution/{wildcards.scenario}/{wildcards.model}/{condition}/{policy}"
    which = {"model": model, "arm": arm, "training_seed": int(seed or 0), "condition": condition, "adapter": adapter}
    return given(**which, out=out, data=f"{RUN}/data", overwrite=True)


SERVED = given(servers=SERVERS) if SERVERS else ""


def settings_of(book, part, name):
    return SETTINGS.parameters(book, part, name).model_dump(mode="json", exclude={"servers"})


wildcard_constraints:
    scenario="|".join(SETTINGS.scenarios),
    model="|".join(map(re.escape, MODELS)),
    policy=r"base|(dpo|grpo)-\d+",
    method="dpo|grpo",
    seed=r"\d+",
    condition="|".join({condition for _, condition in SETTINGS.evolutions}),


EVOLUTIONS = [
    f"{RUN}/evolution/{scenario}/{model}/{condition}/{policy}/manifest.json"
    for scenario, condition in SETTINGS.evolutions
    for model in MODELS
    for policy in SETTINGS.policies(scenario)
]
USED = [
    adapter_folder(scenario, model, policy)
    for scenario in SETTINGS.scenarios
    for model in MODELS
    for policy in SETTINGS.policies(scenario)
    if policy != "base"
]
# Where all adapters are published ones, notebooks 2 and 3 still show how they are trained, in their own few steps.
SHOWN = [] if any(folder.startswith(f"{RUN}/") for folder in USED) else [arm for arm in SETTINGS.arms if arm != "base"]


rule all:
    input:
        expand(f"{RUN}/figures/{{book}}.done", book=SETTINGS.figures),
        expand(f"{RUN}/demonstration/{{method}}/manifest.json", method=SHOWN),
    default_target: True


rule data:
    input:
        [path for scenario in SCENARIOS.values() for path in scenario.made_from(PROMPTS)],
    output:
        [f"{RUN}/data/{name}/{split}.jsonl" for name, scenario in SCENARIOS.items() for split in scenario.splits],
    params:
        notebook="notebooks/01_generate_data.ipynb",
        code=code("01_generate_data", *SCENARIOS),
        given=given(out=f"{RUN}/data", overwrite=True),
        settings=settings_of("01_generate_data", None, None),
    log:
        notebook=f"{RUN}/notebooks/01_generate_data.ipynb",
    message:
        "data: {RUN}/data"
    resources:
        mem_mb=8000,
        runtime=120,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} --profile {PROFILE:q} {params.given}"


rule align:
    input:
        f"{RUN}/data/{{scenario}}/train.jsonl",
    output:
        f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}-{{seed}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{ALIGN[w.method]}.ipynb",
        code=lambda w: code(ALIGN[w.method], w.scenario),
        name=lambda w: MODELS[w.model],
        given=align_given,
        settings=lambda w: settings_of(ALIGN[w.method], w.scenario, MODELS[w.model]),
    log:
        notebook=f"{RUN}/notebooks/align-{{scenario}}-{{model}}-{{method}}-{{seed}}.ipynb",
    message:
        "align: {wildcards.method} of {params.name} on {wildcards.scenario}, seed {wildcards.seed}"
    threads: 8
    resources:
        gpu=GPUS or 1,
        mem_mb=128000,
        runtime=1440,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} --profile {PROFILE:q} {params.given}"


rule demonstrate:
    input:
        f"{RUN}/data/role_play/train.jsonl",
    output:
        f"{RUN}/demonstration/{{method}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{ALIGN[w.method]}.ipynb",
        code=lambda w: code(ALIGN[w.method], "role_play"),
        given=lambda w: given(
            model=next(iter(MODELS.values())), data=f"{RUN}/data", out=f"{RUN}/demonstration/{w.method}", overwrite=True
        ),
    log:
        notebook=f"{RUN}/notebooks/demonstrate-{{method}}.ipynb",
    message:
        "demonstrate: {wildcards.method}, a few steps"
    threads: 8
    resources:
        gpu=1,
        mem_mb=64000,
        runtime=120,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} {params.given} {ONE_GPU}"


rule evolve:
    input:
        lambda w: prompts(w.scenario, "test"),
        adapter_manifest,
    output:
        f"{RUN}/evolution/{{scenario}}/{{model}}/{{condition}}/{{policy}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{EVOLVE[w.scenario]}.ipynb",
        code=lambda w: code(EVOLVE[w.scenario], w.scenario),
        name=lambda w: MODELS[w.model],
        given=evolve_given,
        settings=lambda w: settings_of(EVOLVE[w.scenario], w.condition, MODELS[w.model]),
    message:
        "evolve: {wildcards.scenario}, {params.name}, {wildcards.condition}, {wildcards.policy}"
    log:
        notebook=f"{RUN}/notebooks/evolve-{{scenario}}-{{model}}-{{condition}}-{{policy}}.ipynb",
    threads: 8
    resources:
        gpu=1,
        mem_mb=64000,
        runtime=1440,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} --profile {PROFILE:q} {params.given} {SERVED} {ONE_GPU}"


rule figures:
    input:
        "notebooks/{book}.ipynb",
        EVOLUTIONS,
    output:
        touch(f"{RUN}/figures/{{book}}.done"),
    params:
        code=lambda w: code(w.book),
        given=given(results=f"{RUN}/evolution", figures=f"{RUN}/figures", overwrite=True),
    log:
        notebook=f"{RUN}/notebooks/{{book}}.ipynb",
    message:
        "figures: {wildcards.book}"
    resources:
        mem_mb=8000,
        runtime=60,
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook:q} {params.given}"
