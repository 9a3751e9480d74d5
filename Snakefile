"""The pipeline: data -> adapters -> evolution -> figures, every step one notebook run by `atp_utils.run`.

`make reproduce PROFILE=quick` calls it. Results go to runs/PROFILE. A manifest, written last by the notebook,
is each step's output; the executed notebook is its log, so that a failed one is kept for reading.
"""

import json
import shlex
from pathlib import Path

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
    "data": ["files", "role_play", "collusion", "tool_items", "problems", "problem_families", "problem_templates"],
    "tool_use": ["answers", "sandbox", "tool_calls", "tool_items"],
    "align": ["align", "train", "models", "protocol", "engine"],
    "evolve": ["decisions", "engine", "engines", "evolve", "journal", "models", "protocol", "transformers_engine"]
    + ["openai_engine", "openai_wire"],
    "figures": ["plots", "stats", "tables", "tipping", "tool_tables"],
}


def modules(step):
    return [f"atp_utils/{name}.py" for name in MODULES[step]]


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
        "notebooks/01_generate_data.ipynb",
        modules("data"),
        "data/environments/role_play.yaml",
        "data/environments/collusion.yaml",
    output:
        f"{RUN}/data/role_play/train.jsonl",
        f"{RUN}/data/role_play/test.jsonl",
        f"{RUN}/data/collusion/train.jsonl",
        f"{RUN}/data/tool_use/train.jsonl",
        f"{RUN}/data/tool_use/test.jsonl",
    params:
        settings=SETTINGS.parameters("01_generate_data"),
    log:
        notebook=f"{RUN}/notebooks/01_generate_data.ipynb",
    message:
        "data: {RUN}/data"
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook} --profile {PROFILE} -p out {RUN}/data"


rule align:
    input:
        lambda w: f"notebooks/{ALIGN[w.method]}.ipynb",
        f"{RUN}/data/{{scenario}}/train.jsonl",
        "atp_utils/{scenario}.py",
        lambda w: [*modules("tool_use"), "atp_utils/tool_pairs.py"] if w.scenario == "tool_use" else [],
        modules("align"),
    output:
        f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}/manifest.json",
    params:
        name=lambda w: MODELS[w.model],
        settings=lambda w: SETTINGS.parameters(ALIGN[w.method], w.scenario, MODELS[w.model]),
        out=f"{RUN}/adapters/{{scenario}}/{{model}}/{{method}}",
    log:
        notebook=f"{RUN}/notebooks/align-{{scenario}}-{{model}}-{{method}}.ipynb",
    message:
        "align: {wildcards.method} of {params.name} on {wildcards.scenario}"
    # One model at a time: two of them on the same cores or GPU are slower than one after the other.
    threads: workflow.cores or 1
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook} --profile {PROFILE} -p model {params.name}"
        " -p scenario {wildcards.scenario} -p data {RUN}/data -p out {params.out}"


rule evolve:
    input:
        lambda w: f"notebooks/{EVOLVE[w.scenario]}.ipynb",
        lambda w: PROMPTS[w.scenario],
        "atp_utils/{scenario}.py",
        lambda w: modules("tool_use") if w.scenario == "tool_use" else [],
        adapter_manifest,
        modules("evolve"),
    output:
        f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}/manifest.json",
    params:
        name=lambda w: MODELS[w.model],
        settings=lambda w: SETTINGS.parameters(EVOLVE[w.scenario], None, MODELS[w.model]),
        adapter=adapter,
        data=lambda w: f"-p data {RUN}/data" if w.scenario != "collusion" else "",
        out=f"{RUN}/evolution/{{scenario}}/{{model}}/{{arm}}",
    message:
        "evolve: {wildcards.scenario}, {params.name}, {wildcards.arm}"
    log:
        notebook=f"{RUN}/notebooks/evolve-{{scenario}}-{{model}}-{{arm}}.ipynb",
    threads: workflow.cores or 1
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook} --profile {PROFILE} -p model {params.name}"
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
    shell:
        "python -m atp_utils.run {input[0]} {log.notebook} -p results {RUN}/evolution -p figures {RUN}/figures"
