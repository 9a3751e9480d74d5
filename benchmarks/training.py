"""Times steps of DPO and GRPO, this repository's against TRL's own trainer, on the same rows; `bench` calls it.

"TRL" is its trainer with its defaults (activations computed again), but for its autocast to bfloat16, which is as in
ours: off on a CPU. "TRL, our settings" has this repository's configuration, "ours" also computes a prompt once. Each
trains in a process of its own, so that its peak memory is its own, and they take turns: a step of one, a step of the
next. DPO's steps see no row twice and read the reference for each, but for "ours, reference read before".
"""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer

from atp_utils import models, parameters, resolve
from atp_utils.models import weights_memory
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.training import exact_trainers, pairs, trainer
from benchmarks import limits

BEFORE = "ours, reference read before"
WAYS = ("TRL", "TRL, our settings", "ours", BEFORE)
USUAL = {"dpo": ("TRL", "ours", BEFORE), "grpo": ("TRL", "ours")}
# What TRL is told too: how much a step is, and what it is to learn.
SAME = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "use_cpu", "bf16", "seed",
    "report_to", "disable_tqdm", "learning_rate", "beta", "num_generations", "max_completion_length", "temperature",
)  # fmt: skip


class TheirDPO(DPOTrainer):
    """TRL's trainer on our tokens."""

    _prepare_dataset = exact_trainers.ExactDPOTrainer._prepare_dataset


class Steps(TrainerCallback):
    """Tells of each step its seconds, the processors' and the tokens that were read, those to learn from apart."""

    def __init__(self, model, tell, wait=lambda: None):
        self.tell, self.wait, self.device = tell, wait, model.device
        model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, _, given, __):
        self.tokens[torch.is_grad_enabled()] += given[0].numel()

    def on_step_begin(self, args, state, control, **_):
        self.wait()
        self.tokens = [0, 0]
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        limits.wait(self.device)
        seconds, busy = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.tell({"seconds": seconds, "processor_seconds": busy, "read": self.tokens[0], "learnt": self.tokens[1]})


def prepare(stack, kind, method, model, dtype, steps, scenario="role_play", **changes):
    """A trainer by the quick profile's parameters, open as long as ``stack`` is."""
    models.quiet()
    book, scenario = parameters.ALIGN[method], SCENARIOS[scenario]
    profile = yaml.safe_load(resolve("profiles/quick.yaml").read_text())["notebooks"][f"{book}/{scenario.name}"]
    changes |= {"model": model, "dtype": dtype, "scenario": scenario.name, "warmup_ratio": 0, "max_steps": steps}
    given = parameters.check(book, profile | changes)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    run = Run(book, given, folder, scenario)
    items = pairs.training_items(run, method)
    rows = pairs.preference_rows(run, items)[0] if method == "dpo" else pairs.reward_rows(run, items)
    rows = rows[: given.batch_size] if kind == BEFORE else rows
    arguments = trainer.trl_arguments(folder, rows, given)
    if kind == "TRL":
        same = {name: getattr(arguments, name) for name in SAME if hasattr(arguments, name)}
        arguments = type(arguments)(save_strategy="no", **same)
    if "TRL" in kind:
        for name in ("score_answers", "share_prefill", "in_order"):
            stack.enter_context(mock.patch.object(exact_trainers, name, lambda given: given))
    parts = {"args": arguments, **trainer._parts(rows, given)}
    if method == "grpo":
        rewards = stack.enter_context(scenario.reward(given.group_size))
        made = exact_trainers.ExactGRPOTrainer(reward_funcs=rewards, **parts)
    else:
        made = (TheirDPO if kind == "TRL" else exact_trainers.ExactDPOTrainer)(**parts)
    made.remove_callback(PrinterCallback)
    return made


def _train(pipe, *given, **changes):
    with contextlib.ExitStack() as stack:
        training = prepare(stack, *given, **changes)

        def tell(step):
            pipe.send(step | {"memory_gib": weights_memory.most_held() / weights_memory.GIB})

        training.add_callback(Steps(training.model, tell, wait=pipe.recv))
        training.train()


def _limits(model, dtype, before=None):
    """In a process of its own: a worker's peak memory counts from what the process that starts it has."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_limits_here, (model, dtype, before))


def _limits_here(model, dtype, before):
    return limits.measure(models.load_weights(model, dtype), before)


def measure(method, model, dtype, turns=3, ways=(), **changes):
    """One part of the benchmark, with what each step took: ``turns`` that are timed after one that isn't."""
    spawn, pipes, workers = multiprocessing.get_context("spawn"), {}, []
    best = _limits(model, dtype)
    for kind in ways or USUAL[method]:
        pipes[kind], there = spawn.Pipe()
        given = there, kind, method, model, dtype, turns + 1
        workers.append(spawn.Process(target=_train, args=given, kwargs=changes))
        workers[-1].start()
        there.close()
    found = {kind: [] for kind in pipes}
    for _ in range(turns + 1):
        for kind, pipe in pipes.items():
            pipe.send("go")
            found[kind].append(pipe.recv())
    for worker in workers:
        worker.join()
    best = _limits(model, dtype, best)
    # A token to learn from is read, and its gradient goes back through as many products.
    steps = found.get("ours") or next(iter(found.values()))
    tokens = statistics.median(step["read"] + 2 * step["learnt"] for step in steps[1:])
    best["least_seconds"] = limits.least(best, tokens)
    return {
        "settings": changes,
        "kinds": {
            kind: {
                "seconds": [step["seconds"] for step in steps[1:]],
                "processor_seconds": [step["processor_seconds"] for step in steps[1:]],
                "tokens": steps[-1]["read"] + steps[-1]["learnt"],
                "memory_gib": max(step["memory_gib"] for step in steps),
            }
            for kind, steps in found.items()
        },
        "limits": best,
    }
