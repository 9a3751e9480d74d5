"""Times a step of DPO as this repository trains it against TRL's own trainer, on the same rows.

"TRL" is its trainer with all of its defaults (activations computed again, autocast to bfloat16), "TRL, our settings"
the same trainer with this repository's configuration, "ours" also reads a pair as one row. Each trains in a process of
its own, so that its peak memory is its own, and they take turns: a step of one, a step of the next. The steps see no
row twice, so the reference is read in each of them.

    python benchmarks/training.py [--model smollm2-135m] [--dtype auto] [--scenario role_play] [--steps 5]
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import yaml
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from atp_utils import models, parameters, resolve
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support.files import write_parquet
from atp_utils.training import exact_trainers, pairs, trainer

KINDS = ("TRL", "TRL, our settings", "ours")


class Theirs(DPOTrainer):
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


def train(kind, options, pipe):
    """Train by the profile's parameters, in a process of its own."""
    models.quiet()
    book = yaml.safe_load(resolve("profiles/quick.yaml").read_text())["notebooks"][f"02_align_dpo/{options.scenario}"]
    changes = {"model": options.model, "dtype": options.dtype, "scenario": options.scenario, "warmup_ratio": 0}
    given = parameters.check(parameters.ALIGN["dpo"], book | changes | {"max_steps": options.steps + 1})
    with tempfile.TemporaryDirectory() as folder:
        run = Run(parameters.ALIGN["dpo"], given, Path(folder), SCENARIOS[given.scenario])
        rows, _ = pairs.preference_rows(run, pairs.training_items(run, "dpo"))
        arguments, known = trainer.trl_arguments(Path(folder), rows, given), exact_trainers.can_pack
        if kind == "TRL":
            same = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "use_cpu")
            same += ("seed", "report_to", "disable_tqdm", "learning_rate")
            arguments = DPOConfig(save_strategy="no", **{name: getattr(arguments, name) for name in same})
        made = Theirs if kind == "TRL" else exact_trainers.ExactDPOTrainer
        with mock.patch.object(exact_trainers, "can_pack", lambda config: kind == "ours" and known(config)):
            training = made(args=arguments, **trainer._parts(rows, given))
        training.remove_callback(PrinterCallback)
        training.add_callback(Turns(pipe))
        training.train()


def processor():
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main():
    """Print and store one row for each way to train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenario", default="role_play")
    parser.add_argument("--steps", type=int, default=5, help="that are timed; one before them is not")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    spawn, pipes, workers = multiprocessing.get_context("spawn"), [], []
    for kind in options.kinds:
        here, there = spawn.Pipe()
        workers.append(spawn.Process(target=train, args=(kind, options, there)))
        pipes.append(here)
        workers[-1].start()
    found = []
    for step in range(options.steps + 1):
        for kind, pipe in zip(options.kinds, pipes, strict=True):
            pipe.send("go")
            found.append((kind, step, *pipe.recv()))
    for worker in workers:
        worker.join()
    columns = ["trainer", "step", "seconds a step", "processor seconds a step", "peak memory, GiB"]
    steps = pd.DataFrame(found, columns=columns)
    table = steps[steps["step"] > 0].groupby("trainer", sort=False)[columns[2:]].median()
    table[columns[4]] = steps.groupby("trainer")[columns[4]].max()
    table["times faster than the first"] = table[columns[2]].iloc[0] / table[columns[2]]
    dtype = str(models.precision(options.dtype)).removeprefix("torch.")
    print(f"{options.model}, {dtype}, {options.scenario}, median of {options.steps} steps, {processor()}\n")
    print(table.round(2).to_markdown())
    folder = resolve("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "training.parquet", steps)


if __name__ == "__main__":
    main()
