"""The pipeline: data -> adapters -> evolution -> figures, every step one notebook run by `atp_utils.run`.

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
from atp_utils.parameters import ALIGN, EVOLVE, read_profile, run_folder
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support.code_digest import code_of
from atp_utils.support.files import as_folder

PROFILE = str(config.get("profile", "quick"))
# `make reproduce MODEL=...`: that model alone, with the profile's settings.
MODEL = str(config.get("model") or "")
SETTINGS = read_profile(PROFILE).of_model(MODEL) if MODEL else read_profile(PROFILE)
RUN = run_folder(PROFILE)
MODELS = {as_folder(name): name for name in SETTINGS.models}
# `make reproduce SERVERS=...`: what answers all evolutions (docs/servers.md). It is no `params`, so that a finished run
# isn't asked again for having been asked elsewhere.
SERVERS = str(config.get("servers") or "")
Servers.of(SERVERS)


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


def adapter_manifest(wildcards):
    if wildcards.arm == "base":
        return []
    return f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.arm}/manifest.json"


def align_given(wildcards):
    out = f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.method}"
    model, scenario = MODELS[wildcards.model], wildcards.scenario
    return given(model=model, scenario=scenario, data=f"{RUN}/data", out=out, overwrite=True)


def evolve_given(wildcards):
    model, arm, condition = MODELS[wildcards.model], wildcards.arm, wildcards.condition
    # Servers hold the adapters themselves.
    served = SERVERS or SETTINGS.given(EVOLVE[wildcards.scenario], None, model).get("servers")
    adapter = "" if arm == "base" or served else adapter_manifest(wildcards).removesuffix("/manifest.json")
    out = f"{RUN}/evolution/{wildcards.scenario}/{wildcards.model}/{condition}/{arm}"
    place = {"out": out, "data": f"{RUN}/data", "overwrite": True}
    return given(model=model, arm=arm, condition=condition, adapter=adapter, **place)


SERVED = given(servers=SERVERS) if SERVERS else ""


def settings_of(book, part, name):
    return SETTINGS.parameters(book, part, name).model_dump(mode="json", exclude={"servers"})


wildcard_constraints:
    scenario="|".join(SETTINGS.scenarios),
    model="|".join(map(re.escape, MODELS)),
    arm="base|dpo|grpo",
    method="dpo|grpo",
    condition="|".join({condition for _, condition in SETTINGS.evolutions}),


rule all:
    input:
        expand(f"{RUN}/figures/{{book}}.done", book=SETTINGS.figures),
    default_target: True


rule data:
    input:
        [path for scenario in SCENARIOS.values() for path in scenario.sources],
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
        f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{ALIGN[w.method]}.ipynb",
        code=lambda w: code(ALIGN[w.method], w.scenario),
        name=lambda w: MODELS[w.model],
        given=align_given,
        settings=lambda w: settings_of(ALIGN[w.method], w.scenario, MODELS[w.model]),
    log:
        notebook=f"{RUN}/notebooks/align-{{scenario}}-{{model}}-{{method}}.ipynb",
    message:
        "align: {wildcards.method} of {params.name} on {wildcards.scenario}"
    threads: 8
    resources:
        gpu=1,
        mem_mb=64000,
        runtime=1440,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} --profile {PROFILE:q} {params.given}"


rule evolve:
    input:
        lambda w: prompts(w.scenario, "test"),
        adapter_manifest,
    output:
        f"{RUN}/evolution/{{scenario}}/{{model}}/{{condition}}/{{arm}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{EVOLVE[w.scenario]}.ipynb",
        code=lambda w: code(EVOLVE[w.scenario], w.scenario),
        name=lambda w: MODELS[w.model],
        given=evolve_given,
        settings=lambda w: settings_of(EVOLVE[w.scenario], w.condition, MODELS[w.model]),
    message:
        "evolve: {wildcards.scenario}, {params.name}, {wildcards.condition}, {wildcards.arm}"
    log:
        notebook=f"{RUN}/notebooks/evolve-{{scenario}}-{{model}}-{{condition}}-{{arm}}.ipynb",
    threads: 8
    resources:
        gpu=1,
        mem_mb=64000,
        runtime=1440,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook:q} --profile {PROFILE:q} {params.given} {SERVED}"


rule figures:
    input:
        "notebooks/{book}.ipynb",
        [
            f"{RUN}/evolution/{scenario}/{model}/{condition}/{arm}/manifest.json"
            for scenario, condition in SETTINGS.evolutions
            for model in MODELS
            for arm in SETTINGS.arms
        ],
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
