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
import shlex
from pathlib import Path

from atp_utils.code_digest import code_digest
from atp_utils.parameters import ALIGN, EVOLVE, check, read_profile

PROFILE = config.get("profile", "quick")
SETTINGS = read_profile(PROFILE)
RUN = f"runs/{Path(PROFILE).stem}"
# Hub ids hold a slash, file names can't.
MODELS = {name.replace("/", "--"): name for name in SETTINGS.models}
# `make reproduce URLS=...`: servers that answer all evolutions (docs/servers.md). They are no `params`, so that a
# finished run isn't asked again for having been asked elsewhere.
URLS, KEY = str(config.get("urls") or ""), str(config.get("key_variable") or "")
SERVED = check("04_evolve_role_play", {"adapter": "", "urls": URLS.split(","), "key_variable": KEY} if URLS else {})
SERVED = " ".join(f"-p {name} {shlex.quote(json.dumps(value))}" for name, value in SERVED.items())
# What an evolution reads: prompts that were written, or a grid that it makes itself.
PROMPTS = {name: f"{RUN}/data/{name}/test.jsonl" for name in ("role_play", "tool_use")}
PROMPTS |= {"collusion": "data/environments/collusion.yaml"}
MODULES = {
    "data": ["files", "role_play", "collusion", "tool_items", "problems", "problem_filters", "problem_templates"]
    + ["problem_families", "problem_families_algebra", "problem_registry"],
    "tool_use": ["answers", "sandbox", "tool_calls", "tool_items"],
    "align": ["align", "train", "launch", "memory", "models", "protocol", "engine"],
    "evolve": ["decisions", "engine", "engines", "evolve", "journal", "models", "protocol", "transformers_engine"]
    + ["kv_cache", "openai_engine", "openai_wire"],
    "figures": ["plots", "stats", "tables", "tipping", "tool_tables"],
}


def modules(step):
    return [f"atp_utils/{name}.py" for name in MODULES[step]]


def align_code(wildcards):
    pairs = [*modules("tool_use"), "atp_utils/tool_pairs.py"] if wildcards.scenario == "tool_use" else []
    book = f"notebooks/{ALIGN[wildcards.method]}.ipynb"
    return code_digest(book, f"atp_utils/{wildcards.scenario}.py", *pairs, *modules("align"))


def evolve_code(wildcards):
    tools = modules("tool_use") if wildcards.scenario == "tool_use" else []
    book = f"notebooks/{EVOLVE[wildcards.scenario]}.ipynb"
    return code_digest(book, f"atp_utils/{wildcards.scenario}.py", *tools, *modules("evolve"))


def adapter_manifest(wildcards):
    if wildcards.arm == "base":
        return []
    return f"{RUN}/adapters/{wildcards.scenario}/{wildcards.model}/{wildcards.arm}/manifest.json"


def adapter(wildcards):
    # Servers that the profile names hold the adapters themselves.
    served = SETTINGS.parameters(EVOLVE[wildcards.scenario], None, MODELS[wildcards.model]).get("urls")
    return "" if wildcards.arm == "base" or served else adapter_manifest(wildcards).removesuffix("/manifest.json")


wildcard_constraints:
    scenario="|".join(SETTINGS.scenarios),
    model="|".join(MODELS),
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
        code=code_digest("notebooks/01_generate_data.ipynb", *modules("data")),
        settings=SETTINGS.parameters("01_generate_data"),
    log:
        notebook=f"{RUN}/notebooks/01_generate_data.ipynb",
    message:
        "data: {RUN}/data"
    resources:
        mem_mb=8000,
        runtime=120,
    shell:
        "python -m atp_utils.run {params.notebook} {log.notebook} --profile {PROFILE} -p out {RUN}/data"


rule align:
    input:
        f"{RUN}/data/{{scenario}}/train.jsonl",
    output:
        f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{ALIGN[w.method]}.ipynb",
        code=align_code,
        name=lambda w: MODELS[w.model],
        settings=lambda w: SETTINGS.parameters(ALIGN[w.method], w.scenario, MODELS[w.model]),
        out=f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}",
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
        "python -m atp_utils.run {params.notebook} {log.notebook} --profile {PROFILE} -p model {params.name}"
        " -p scenario {wildcards.scenario} -p data {RUN}/data -p out {params.out}"


rule evolve:
    input:
        lambda w: PROMPTS[w.scenario],
        adapter_manifest,
    output:
        f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}/manifest.json",
    params:
        notebook=lambda w: f"notebooks/{EVOLVE[w.scenario]}.ipynb",
        code=evolve_code,
        name=lambda w: MODELS[w.model],
        settings=lambda w: SETTINGS.parameters(EVOLVE[w.scenario], None, MODELS[w.model]),
        adapter=adapter,
        data=lambda w: f"-p data {RUN}/data" if w.scenario != "collusion" else "",
        out=f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}",
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
        "python -m atp_utils.run {params.notebook} {log.notebook} --profile {PROFILE} -p model {params.name}"
        " -p arm {wildcards.arm} -p adapter '{params.adapter}' -p out {params.out} {params.data} {SERVED}"


rule figures:
    input:
        "notebooks/{book}.ipynb",
        expand(
            f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}/manifest.json",
            scenario=SETTINGS.scenarios,
            model=MODELS,
            arm=SETTINGS.arms,
        ),
        modules("figures"),
    output:
        touch(f"{RUN}/figures/{{book}}.done"),
    log:
        notebook=f"{RUN}/notebooks/{{book}}.ipynb",
    message:
        "figures: {wildcards.book}"
    resources:
        mem_mb=8000,
        runtime=60,
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook} -p results {RUN}/evolution -p figures {RUN}/figures"
