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

from atp_utils.code_digest import code_of
from atp_utils.parameters import ALIGN, EVOLVE, as_folder, check, read_profile, run_folder

PROFILE = str(config.get("profile", "quick"))
SETTINGS = read_profile(PROFILE)
RUN = run_folder(PROFILE)
MODELS = {as_folder(name): name for name in SETTINGS.models}
# `make reproduce URLS=...`: servers that answer all evolutions (docs/servers.md). They are no `params`, so that a
# finished run isn't asked again for having been asked elsewhere.
URLS, KEY = str(config.get("urls") or ""), str(config.get("key_variable") or "")
# What an evolution reads: prompts that were written, or a grid that it makes itself.
PROMPTS = {name: f"{RUN}/data/{name}/test.jsonl" for name in ("role_play", "tool_use")}
PROMPTS |= {"collusion": "data/environments/collusion.yaml"}


def given(**values):
    """Options of `atp_utils.run`, quoted for the shell: paths and names may hold anything."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return shlex.join(word for name, text in texts.items() for word in ("-p", name, text))


SERVED = check("04_evolve_role_play", {"urls": URLS.split(","), "key_variable": KEY} if URLS else {})
SERVED = given(adapter="", **SERVED) if URLS else ""


def code(book):
    # What all scenarios share counts for each. That is cheap: a job whose own scenario hasn't changed replays its
    # replies, or finds its adapter.
    return code_of(f"notebooks/{book}.ipynb")


def adapter_manifest(wildcards):
    if wildcards.arm == "base":
        return []
    return f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.arm}/manifest.json"


def align_given(wildcards):
    out = f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.method}"
    model, scenario = MODELS[wildcards.model], wildcards.scenario
    return given(model=model, scenario=scenario, data=f"{RUN}/data", out=out, overwrite=True)


def evolve_given(wildcards):
    model, arm = MODELS[wildcards.model], wildcards.arm
    # Servers that the profile names hold the adapters themselves.
    served = SETTINGS.parameters(EVOLVE[wildcards.scenario], None, model).get("urls")
    adapter = "" if arm == "base" or served else adapter_manifest(wildcards).removesuffix("/manifest.json")
    data = {"data": f"{RUN}/data"} if wildcards.scenario != "collusion" else {}
    out = f"{RUN}/evolution/{wildcards.scenario}/{wildcards.model}/{arm}"
    return given(model=model, arm=arm, adapter=adapter, out=out, **data, overwrite=True)


wildcard_constraints:
    scenario="|".join(SETTINGS.scenarios),
    model="|".join(map(re.escape, MODELS)),
    arm="base|dpo|grpo",
    method="dpo|grpo",


rule all:
    input:
        expand(f"{RUN}/figures/{{book}}.done", book=SETTINGS.figures),
    default_target: True


rule data:
    input:
        "data/environments/role_play.yaml",
        "data/environments/collusion.yaml",
    output:
        f"{RUN}/data/role_play/train.jsonl",
        f"{RUN}/data/role_play/test.jsonl",
        f"{RUN}/data/collusion/train.jsonl",
        f"{RUN}/data/tool_use/train.jsonl",
        f"{RUN}/data/tool_use/test.jsonl",
    params:
        notebook="notebooks/01_generate_data.ipynb",
        code=code("01_generate_data"),
        given=given(out=f"{RUN}/data", overwrite=True),
        settings=SETTINGS.parameters("01_generate_data"),
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
        code=lambda w: code(ALIGN[w.method]),
        name=lambda w: MODELS[w.model],
        given=align_given,
        settings=lambda w: SETTINGS.parameters(ALIGN[w.method], w.scenario, MODELS[w.model]),
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
        lambda w: PROMPTS[w.scenario],
        adapter_manifest,
    output:
        f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{EVOLVE[w.scenario]}.ipynb",
        code=lambda w: code(EVOLVE[w.scenario]),
        name=lambda w: MODELS[w.model],
        given=evolve_given,
        settings=lambda w: SETTINGS.parameters(EVOLVE[w.scenario], None, MODELS[w.model]),
    message:
        "evolve: {wildcards.scenario}, {params.name}, {wildcards.arm}"
    log:
        notebook=f"{RUN}/notebooks/evolve-{{scenario}}-{{model}}-{{arm}}.ipynb",
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
        expand(
            f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}/manifest.json",
            scenario=SETTINGS.scenarios,
            model=MODELS,
            arm=SETTINGS.arms,
        ),
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
