"""Times a step of DPO or GRPO as this repository trains it against TRL's own trainer, on the same rows.

"TRL" is its trainer with its defaults (activations computed again), but for its autocast to bfloat16, which is as in
ours: off on a CPU. "TRL, our settings" has this repository's configuration, "ours" also computes a prompt once.
Each trains in a process of its own, so that its peak memory is its own, and they take turns: a step of one, a step of
the next. DPO's steps see no row twice and read the reference for each, but for "ours, rows again", which has read it
before.

    python benchmarks/training.py [--model smollm2-135m] [--method dpo] [--scenario role_play] [--steps 5]
"""

import argparse
import contextlib
import itertools
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import yaml
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer

from atp_utils import models, parameters, resolve
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support.files import write_parquet
from atp_utils.support.manifest import processor
from atp_utils.training import exact_trainers, pairs, trainer

KINDS = ("TRL", "TRL, our settings", "ours", "ours, rows again")
# What TRL is told too: how much a step is, and what it is to learn.
SAME = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "use_cpu", "bf16", "seed",
    "report_to", "disable_tqdm", "learning_rate", "beta", "num_generations", "max_completion_length", "temperature",
)  # fmt: skip


class TheirDPO(DPOTrainer):
    """TRL's trainer on our tokens."""

    _prepare_dataset = exact_trainers.ExactDPOTrainer._prepare_dataset


class Turns(TrainerCallback):
    """Begins a step when told to, and tells how long it took: seconds, and seconds of all processors."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **_):
        self.pipe.recv()
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.pipe.send((*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def train(kind, dtype, options, pipe):
    """Train by the quick profile's parameters, in a process of its own."""
    models.quiet()
    method, scenario = options.method, SCENARIOS[options.scenario]
    profile = yaml.safe_load(resolve("profiles/quick.yaml").read_text())["notebooks"]
    book = profile[f"{parameters.ALIGN[method]}/{scenario.name}"]
    changes = {"model": options.model, "dtype": dtype, "scenario": scenario.name, "warmup_ratio": 0}
    changes["accumulation"] = options.batches
    given = parameters.check(parameters.ALIGN[method], book | changes | {"max_steps": options.steps + 1})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = Run(parameters.ALIGN[method], given, Path(folder), scenario)
        items = pairs.training_items(run, method)
        rows = pairs.preference_rows(run, items)[0] if method == "dpo" else pairs.reward_rows(run, items)
        rows = rows[: given.batch_size] if "again" in kind else rows
        arguments = trainer.trl_arguments(Path(folder), rows, given)
        if kind == "TRL":
            same = {name: getattr(arguments, name) for name in SAME if hasattr(arguments, name)}
            arguments = type(arguments)(save_strategy="no", **same)
        if "TRL" in kind:
            for name in ("score_answers", "share_prefill"):
                stack.enter_context(mock.patch.object(exact_trainers, name, lambda *_, **__: None))
        parts = {"args": arguments, **trainer._parts(rows, given)}
        if method == "grpo":
            rewards = stack.enter_context(scenario.reward(given.group_size))
            training = exact_trainers.ExactGRPOTrainer(reward_funcs=rewards, **parts)
        else:
            training = (TheirDPO if kind == "TRL" else exact_trainers.ExactDPOTrainer)(**parts)
        training.remove_callback(PrinterCallback)
        training.add_callback(Turns(pipe))
        training.train()


def main():
    """Print and store one row for each way to train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--method", default="dpo", choices=["dpo", "grpo"])
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--scenario", default="role_play")
    parser.add_argument("--steps", type=int, default=5, help="that are timed; one before them is not")
    parser.add_argument("--batches", type=int, default=2, help="of a step")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS[:3]), choices=KINDS)
    options = parser.parse_args()
    spawn, pipes, workers = multiprocessing.get_context("spawn"), {}, []
    for case in itertools.product(options.kinds, options.dtype):
        pipes[case], there = spawn.Pipe()
        workers.append(spawn.Process(target=train, args=(*case, options, there)))
        workers[-1].start()
    found = []
    for step in range(options.steps + 1):
        for case, pipe in pipes.items():
            pipe.send("go")
            found.append((*case, step, *pipe.recv()))
            print(*found[-1], flush=True)
    for worker in workers:
        worker.join()
    names = ["trainer", "weights", "step", "seconds a step", "processor seconds a step", "peak memory, GiB"]
    steps = pd.DataFrame(found, columns=names)
    table = steps[steps["step"] > 0].groupby(names[:2], sort=False)[names[3:]].median()
    table[names[5]] = steps.groupby(names[:2])[names[5]].max()
    table["times faster"] = table[names[3]].iloc[0] / table[names[3]]
    print(f"{options.method}, {options.model}, {options.scenario}, {options.batches} batches a step, {processor()}\n")
    print(table.round(2).reset_index().to_markdown(index=False))
    folder = resolve("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "training.parquet", steps)


if __name__ == "__main__":
    main()
