"""The benchmark: evolutions and trainings, ours against the plain way and against the machine's own limits.

    python -m benchmarks.bench [--parts choose reason collusion tool_use dpo grpo] [--model smollm2-135m] [--record]

Each part runs in a process of its own and takes turns with what it is compared to (A B A B); the table has medians.
Parts go one by one into ``runs/benchmarks/MODEL.json``, which keeps those of the same machine measured before. With
``--record`` the file is that of the repository, benchmarks/results/MODEL.json, and the README's table is written anew.
"""

import argparse
import multiprocessing
import os
import re
import statistics
from pathlib import Path

import pandas as pd
import torch

from atp_utils import models, resolve, shown
from atp_utils.models import precisions
from atp_utils.support import files
from atp_utils.support.manifest import made_by
from benchmarks import evolution, training

PARTS = (*evolution.CASES, *training.USUAL)
RECORDED, PAGE = Path("benchmarks/results"), "README.md"
# Of a processor's many flags those that decide how fast it multiplies.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
SAME = ("processor", "cores", "threads", "flags", "torch", "precision")
WORDS = {
    "choose": "evolution, `choose`: {items} agents, {rounds} rounds",
    "reason": "evolution, `reason`: {items} agents, {rounds} rounds",
    "collusion": "collusion games, {rounds} rounds of 8 agents",
    "tool_use": "tool use: {agents_per_seed} agents, {rounds} rounds",
    "dpo": "DPO, a step",
    "grpo": "GRPO, a step",
}


def machine(dtype):
    """What the figures depend on besides the code."""
    made = made_by()
    known = Path("/proc/cpuinfo")
    text = known.read_text(encoding="utf-8") if known.is_file() else ""
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return {
        "processor": made["processor"],
        "cores": made["cores"],
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in line.split()],
        "torch": made["packages"]["torch"],
        "precision": precisions.name_of(dtype),
        "commit": made["commit"],
        "finished": made["finished"],
    }


def merged(before, here, part, found):
    """The results with one more ``part``; those ``before`` stay if they are of the same machine."""
    same = before and all(before["machine"][name] == here[name] for name in SAME)
    parts = (before["parts"] if same else {}) | {part: found}
    return {"machine": here, "parts": {name: parts[name] for name in PARTS if name in parts}}


def table(results):
    """One row a way of doing a part: medians, times faster than the first way, share of the machine's limit."""
    rows = []
    for part, found in results["parts"].items():
        kinds = {kind: statistics.median(way["seconds"]) for kind, way in found["kinds"].items()}
        first = next(iter(kinds.values()))
        for kind, seconds in kinds.items():
            memory = found["kinds"][kind].get("memory_gib")
            rows.append(
                {
                    "what": WORDS[part].format(**found["settings"]),
                    "way": kind,
                    "seconds": f"{seconds:.1f}",
                    "times faster": f"{first / seconds:.1f}",
                    "of the limit": f"{found['limits']['least_seconds'] / seconds:.0%}" if kind == "ours" else "",
                    "peak memory, GiB": f"{memory:.1f}" if memory else "",
                }
            )
    return pd.DataFrame(rows)


def calls(results):
    """Seconds for 1,000 new tokens in each of an evolution's rounds, the median of the turns."""
    return {
        part: [round(1000 * statistics.median(call["seconds"]) / call["tokens"], 2) for call in found["calls"]]
        for part, found in results["parts"].items()
        if part in ("choose", "collusion")
    }


def readme(results):
    """The README's table, headed by the machine's name."""
    here, shown_table = results["machine"], table(results)
    name = f"{here['processor']}, {here['cores']} cores, {here['precision']}"
    return shown_table.rename(columns={"what": name}).to_markdown(index=False, disable_numparse=True)


def record(results, page=PAGE):
    """Put the table into the README, in place of the one that is there."""
    text = resolve(page).read_text(encoding="utf-8")
    made, count = re.subn(r"\| [^|\n]+\| way .*?(?=\n\n)", lambda _: readme(results), text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page}: expected one table with the column 'way', found {count}")
    files.write_text(resolve(page), made)


def main(arguments=None):
    """Measure parts, write them and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, help="of each way; its default depends on the part")
    parser.add_argument("--ways", nargs="+", choices=training.WAYS, help="to train")
    parser.add_argument("--record", action="store_true", help="write the repository's results and the README's table")
    options = parser.parse_args(arguments)
    folder = resolve(RECORDED if options.record else "runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{files.as_folder(options.model)}.json"
    here = machine(options.dtype)
    given = {"model": options.model, "dtype": here["precision"]}
    given |= {"turns": options.turns} if options.turns else {}
    for part in options.parts:
        print(f"{part} ...", flush=True)
        if part in training.USUAL:
            found = training.measure(part, **given, ways=options.ways or ())
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(evolution.measure, (part,), given)
        results = merged(files.read_json(path) if path.is_file() else None, here, part, rounded(found))
        files.write_json(path, results)
    print(f"\n{readme(results)}\n\nseconds for 1,000 new tokens, round by round: {calls(results)}\n{shown(path)}")
    if options.record and options.model == models.EMBEDDED:
        record(results)


def rounded(found):
    """``found`` with numbers of four digits, which is more than a repetition has in common."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
