"""LoRA adapters, or whole models, by DPO and GRPO (TRL + PEFT), in this process or in several.

The training is written once, in `fit`. Without a launcher it runs here; with one, `launch` starts processes that run
``python -m atp_utils.training.trainer FOLDER``, which reads its task from the folder and calls the same function. A
step sees the same number of rows in either case: the processes share out ``accumulation``.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, GRPOConfig
from trl.import_utils import is_vllm_available

from atp_utils import models, parameters, resolve, shown
from atp_utils.models import precisions, weights_memory
from atp_utils.models.chat_template import turn_end
from atp_utils.runs import PLACE, Run
from atp_utils.runs.adapters import LOG, WEIGHTS
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support import files, folders, progress
from atp_utils.support.code_digest import PACKAGE, code_of
from atp_utils.support.files import sha256
from atp_utils.support.manifest import MANIFEST, made_by
from atp_utils.training import collapse, launch
from atp_utils.training.exact_trainers import ExactDPOTrainer, ExactGRPOTrainer

UNCHECKED, ORIGIN = "unchecked_log.csv", "origin.json"
CHECKPOINTS, LAUNCHED, TASK, OUTPUT = "checkpoints", "launched", "launched/task.json", "launched/output.log"
# TRL's names, and ours, of what the notebooks plot.
CURVES = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "mass": "mass",
    "reward": "reward",
    "score": "score",
    "valid": "valid",
    "kl": "kl",
    "frac_reward_zero_std": "dead_groups",
}
ROOM = (
    "in training: lower batch_size and raise accumulation as much (a step stays what it is), lower max_new_tokens, set "
    "checkpoint_activations, or name a launcher that shards the model (fsdp, zero3)"
)
# What decides the rows, whose own digest counts.
ROWS = {"data", "pairs", "samples_per_problem", "max_pairs", "max_attempts"}


def steps(given: Any, rows: int) -> int:
    """Optimiser steps of a training with the parameters ``given`` on so many rows."""
    return given.max_steps or max(1, round(given.epochs * rows / (given.batch_size * given.accumulation)))


def share(given: Any, processes: int) -> int:
    """Batches that each of ``processes`` accumulates for a step; raises ValueError where they don't divide."""
    if given.accumulation % processes:
        raise ValueError(
            f"accumulation is {given.accumulation} and must be a multiple of the number of processes, {processes}: "
            "they share it out, so that a step sees batch_size * accumulation rows on any number of GPUs"
        )
    return given.accumulation // processes


def check(run: Run, method: str) -> dict[str, Any]:
    """What the training of a notebook's ``run`` depends on besides its rows; a notebook asks before other work.

    The code counts too: it is that of this module's import closure, and of the scenario's, whose reward it may be.
    Raises ValueError or FileNotFoundError for a training that can't start here, and FileExistsError where ``out`` isn't
    ours or holds another training and ``overwrite`` is false.
    """
    given = run.parameters
    if method == "grpo" and given.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm is true, and vLLM isn't installed: pip install trl[vllm], or set it to false")
    share(given, launch.processes(given.launcher)[1] if given.launcher else 1)
    code = code_of(f"{PACKAGE}/training/trainer.py", *([source(run.scenario)] if method == "grpo" else []))
    settings = {"method": method, "identity": models.identity(given.model, dtype=given.dtype), "code": code}
    settings |= {name: value for name, value in run.settings.items() if name not in PLACE | ROWS}
    folders.check(run.out, settings, overwrite=given.overwrite)
    return settings


def adapter(run: Run, method: str, rows: list[dict]) -> pd.DataFrame:
    """Train a LoRA adapter by ``method`` ("dpo" or "grpo") into the run's folder, once; returns the training log.

    With ``lora_rank`` 0 all weights are trained, and what is called the adapter here is a whole model. A finished
    adapter is returned as it is, an interrupted training goes on from its checkpoint. The folder gets a marker, the
    adapter, ``training_log.csv`` and, last, ``manifest.json``; an adapter of another training that it held is set aside
    if the run may ``overwrite``. Columns of the log: step, and those of `CURVES` that the method has. The launcher is
    no part of the settings: it decides where a training runs, not which it is. GRPO's reward is the scenario's.

    Raises as `check` does, and RuntimeError where the answers are left with less probability than ``min_mass``: the
    folder then has the adapter, but no manifest, and its log is ``unchecked_log.csv``. A lower ``min_mass`` takes that
    adapter, or goes on with a training that was stopped.
    """
    out, given = run.out, run.parameters
    if not rows:
        raise ValueError(f"{shown(out)}: there is nothing to train on (0 rows)")
    settings = check(run, method) | {"rows_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    # Two processes don't train in one folder, and one that is in use isn't set aside; where another was, it has moved
    # with its lock, and the new one is locked anew.
    with folders.lock(out):
        folders.claim(out, settings, overwrite=given.overwrite)
    with folders.lock(out):
        return _trained(run, rows, settings)


def _trained(run: Run, rows: list[dict], settings: dict[str, Any]) -> pd.DataFrame:
    """The log of the training in the run's folder, with its adapter and manifest: from before, or made now."""
    out, given, log = run.out, run.parameters, _log_of(run, rows)
    if collapse.low(log, given):
        raise RuntimeError(f"{shown(out)}: {collapse.refusal(log, given)}")
    if (out / UNCHECKED).is_file():
        (out / UNCHECKED).replace(out / LOG)
    # Also where a workflow removed the manifest before it asked again for a finished adapter: commit, packages and date
    # are those of the training, which may be older than the code that asks.
    origin = files.read_json(out / ORIGIN)
    facts = {"settings": run.settings, "training": settings, "rows": len(rows), "steps": int(log["step"].iloc[-1])}
    hashes = {path.name: sha256(path) for path in sorted(out.glob("*.safetensors"))}
    weights = {"sha256": hashes[WEIGHTS] if given.lora_rank else hashes}
    # Which training prompts these were: an adapter is no other profile's that draws others, and tests on some of these.
    prompts = resolve(given.data) / given.scenario / folders.MARKER
    facts |= {"prompts": files.read_json(prompts)} if prompts.is_file() else {}
    files.write_json(out / MANIFEST, facts | weights | origin)
    for used in (CHECKPOINTS, LAUNCHED):
        shutil.rmtree(out / used, ignore_errors=True)
    return log


def _log_of(run: Run, rows: list[dict]) -> pd.DataFrame:
    """The log of the training in the run's folder, which has ended before or is trained to its end now."""
    out, given, total = run.out, run.parameters, steps(run.parameters, len(rows))
    for written in filter(Path.is_file, (out / LOG, out / UNCHECKED)):
        if collapse.ended(log := pd.read_csv(written), given, total):
            return log
    with progress.bar(total, f"{run.notebook} {given.model}") as bar:
        if given.launcher:
            # Processes that measured for themselves, all at once, might not agree.
            settings = run.settings | {"dtype": precisions.name_of(given.dtype)}
            files.write_json(out / TASK, {"notebook": run.notebook, "parameters": settings, "rows": rows})
            launch.run(given.launcher, f"{PACKAGE}.training.trainer", [str(out)], out / OUTPUT, bar)
        else:
            fit(out, given, rows, lambda done: bar.update(done - bar.n))
    return pd.read_csv(out / UNCHECKED)


# --- The training itself -----------------------------------------------------------------------------------


def fit(out: Path, given: Any, rows: list[dict], report: Callable[[int], None]) -> None:
    """Train from the last checkpoint in ``out`` to the end; save the adapter, then the log, still to be checked.

    Every process of a launched training calls this with the same arguments. ``given`` are the notebook's parameters;
    ``report`` is told how many steps are done.
    """
    models.quiet()
    disable_progress_bars()
    began = time.monotonic()
    # A launcher's own: checkpoints of sharded trainings can't be read by others.
    checkpoints = out / CHECKPOINTS / (Path(given.launcher).stem or "here")
    prefers = isinstance(given, parameters.Dpo)
    reward = contextlib.nullcontext() if prefers else SCENARIOS[given.scenario].reward(given.group_size)
    with reward as rewards, weights_memory.advice(ROOM):
        # The configuration comes first: it starts the process group, which decides how the weights are loaded.
        arguments = trl_arguments(checkpoints, rows, given)
        # A process trains on one GPU; seeing several, the Trainer would split each batch over them by itself.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if prefers:
            trainer = ExactDPOTrainer(args=arguments, **_parts(rows, given))
            trainer.measures_mass = given.pairs == "answers"
        else:
            trainer = ExactGRPOTrainer(args=arguments, reward_funcs=rewards, **_parts(rows, given))
        # Without tqdm the Trainer would print a dictionary a step.
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Steps(given, report))
        trained = 0.0
        with contextlib.suppress(_Ended):
            trained = trainer.train(resume_from_checkpoint=_last_whole(checkpoints)).metrics["train_runtime"]
        trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        models.check_adapter(out, given.model)
        (out / "training_args.bin").unlink(missing_ok=True)
        seconds = round(time.monotonic() - began, 1)
        # Of the steps since the last checkpoint, without loading and saving the model.
        cost = {"train_seconds": round(trained, 2), "most_bytes": weights_memory.most_held()}
        made_of = models.made_of(given.model, dtype=given.dtype)
        files.write_json(out / ORIGIN, {"made_of": made_of, "seconds": seconds} | cost | made_by())
        # The log is written once the adapter is whole: its presence says that the training has ended.
        files.write_text(out / UNCHECKED, _log(trainer.state.log_history).to_csv(index=False, float_format="%.6g"))


def trl_arguments(checkpoints: Path, rows: list[dict], given: Any) -> DPOConfig | GRPOConfig:
    """TRL's configuration of a training, for this process's share of it."""
    on_gpu = torch.cuda.is_available()
    total = steps(given, len(rows))
    common = {
        "output_dir": str(checkpoints),
        "learning_rate": given.learning_rate,
        "max_steps": total,
        "gradient_accumulation_steps": share(given, _processes()),
        "beta": given.beta,
        "lr_scheduler_type": given.scheduler,
        "warmup_steps": round(given.warmup_ratio * total),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": given.save_steps,
        "gradient_checkpointing": given.checkpoint_activations,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "seed": given.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if isinstance(given, parameters.Dpo):
        return DPOConfig(**common, per_device_train_batch_size=given.batch_size, max_length=None)
    vllm = {}
    if given.use_vllm:
        tokenizer = models.load_tokenizer(given.model)
        longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
        # Without a bound vLLM makes room for the longest context of the model, beside the model in training.
        vllm = {"vllm_mode": "colocate", "vllm_max_model_length": longest + given.max_new_tokens}
    return GRPOConfig(
        **common,
        per_device_train_batch_size=given.batch_size * given.group_size,
        num_generations=given.group_size,
        max_completion_length=given.max_new_tokens,
        temperature=given.temperature,
        # TRL's defaults are a later variant without KL; these are the method of the paper's reference.
        loss_type="grpo",
        use_vllm=given.use_vllm,
        **vllm,
    )


def _processes() -> int:
    """How many processes train together, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _parts(rows: list[dict], given: Any) -> dict[str, Any]:
    # The adapter's weights are drawn when the trainer is built, before TRL sets its own seed.
    set_seed(given.seed)
    # PEFT takes one word for all layers, and names as a list.
    targets = given.lora_targets if given.lora_targets == "all-linear" else re.split(r"\s*,\s*", given.lora_targets)
    lora = given.lora_rank and LoraConfig(r=given.lora_rank, lora_alpha=given.lora_alpha, target_modules=targets)
    # A step of 1e-6 is lost in bfloat16's three digits: all weights are kept in float32, a GPU multiplies in bfloat16.
    weights = models.load_weights(given.model, given.dtype if lora else "float32")
    # PEFT writes the name into the adapter's configuration; of a whole model TRL loads the reference by it.
    weights.config._name_or_path = weights.name_or_path = given.model if lora else models.locate(given.model)
    tokenizer = models.load_tokenizer(given.model)
    # GRPO stops its replies where the engine stops them.
    known = weights.generation_config.eos_token_id
    stops = {turn_end(tokenizer), tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    weights.generation_config.eos_token_id = sorted(stops - {None})
    return {
        "model": weights,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "peft_config": lora or None,
    }


def _last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint whose state, its last file, is whole: a kill may leave half of one."""
    whole = filter(_readable, checkpoints.glob("checkpoint-*/trainer_state.json"))
    return max((str(path.parent) for path in whole), key=_step, default=None)


def _readable(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(path.read_text(encoding="utf-8"))
        return True
    return False


def _step(checkpoint: str | Path) -> int:
    return int(str(checkpoint).rpartition("-")[2])


def _log(history: list[dict]) -> pd.DataFrame:
    rows = [entry for entry in history if "loss" in entry]
    columns = {new: [float(row[old]) for row in rows] for old, new in CURVES.items() if rows and old in rows[0]}
    return pd.DataFrame({"step": [row["step"] for row in rows], **columns})


class _Ended(Exception):
    """The checkpoint that was taken up is of the last step. The Trainer would do one more before it asked."""


class _Steps(TrainerCallback):
    """Reports the steps that are done (of several processes the first does), and stops where the training has ended.

    Of the checkpoints it keeps the last. The Trainer would go by their times, and after a clock was set back delete the
    one that it has just saved.
    """

    def __init__(self, given: Any, report: Callable[[int], None]):
        self.given, self.report = given, report

    def _ended(self, state) -> bool:
        return collapse.ended(_log(state.log_history), self.given, state.max_steps)

    def on_train_begin(self, args, state, control, **_):
        if self._ended(state):
            raise _Ended

    def on_log(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.report(state.global_step)
        if self._ended(state):
            control.should_training_stop = control.should_save = True

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
                if _step(checkpoint) != state.global_step:
                    shutil.rmtree(checkpoint, ignore_errors=True)


@record  # so that torchrun's summary has the traceback of the process that failed first
def main(arguments: list[str] | None = None) -> None:
    """What a launched process runs: the training whose task lies in a folder, up to its adapter and log."""
    [folder] = map(Path, arguments or sys.argv[1:])
    task = files.read_json(folder / TASK)
    given = parameters.check(task["notebook"], task["parameters"])
    fit(folder, given, task["rows"], launch.report)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
