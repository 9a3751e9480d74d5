"""LoRA adapters by DPO and GRPO (TRL + PEFT), in this process or in several.

The training is written once, in `fit`. Without a launcher it runs here; with one, `launch` starts processes that run
``python -m atp_utils.training.trainer FOLDER``, which reads what to do from the folder's marker and calls the same
function. A step sees the same number of rows in either case: the processes share out ``accumulation``.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, GRPOConfig
from trl.import_utils import is_vllm_available

from atp_utils import models, parameters, shown
from atp_utils.models import weights_memory
from atp_utils.models.chat_template import turn_end
from atp_utils.runs import PLACE, Run
from atp_utils.scenarios.registry import SCENARIOS, source
from atp_utils.support import files, folders, progress
from atp_utils.support.code_digest import PACKAGE, code_of
from atp_utils.support.manifest import made_by, write_manifest
from atp_utils.training import launch
from atp_utils.training.exact_trainers import ExactDPOTrainer, ExactGRPOTrainer

LOG, ORIGIN, CHECKPOINTS, LAUNCHED = "training_log.csv", "origin.json", "checkpoints", "launched"
# TRL's names of what the notebooks plot.
CURVES = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
    "score": "score",
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
    share(given, launch.processes(launch.configuration(given.launcher)) if given.launcher else 1)
    code = code_of(f"{PACKAGE}/training/trainer.py", *([source(run.scenario)] if method == "grpo" else []))
    settings = {"method": method, "identity": models.identity(given.model, dtype=given.dtype), "code": code}
    settings |= {name: value for name, value in run.settings.items() if name not in PLACE | ROWS}
    folders.check(run.out, settings, overwrite=given.overwrite)
    return settings


def adapter(run: Run, method: str, rows: list[dict]) -> pd.DataFrame:
    """Train a LoRA adapter by ``method`` ("dpo" or "grpo") into the run's folder, once; returns the training log.

    A finished adapter is returned as it is, an interrupted training goes on from its checkpoint. The folder gets a
    marker, the adapter, ``training_log.csv`` and, last, ``manifest.json``; an adapter of another training that it held
    is set aside if the run may ``overwrite``. Columns of the log: step, and those of `CURVES` that the method has. The
    launcher is no part of the settings: it decides where a training runs, not which it is. GRPO's reward is the
    scenario's. Raises as `check` does.
    """
    out, launcher = run.out, run.parameters.launcher
    if not rows:
        raise ValueError(f"{shown(out)}: there is nothing to train on (0 rows)")
    settings = check(run, method) | {"rows_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    folders.claim(out, settings, overwrite=run.parameters.overwrite)
    if not (out / LOG).is_file():
        if launcher:
            files.write_json(out / LAUNCHED / "rows.json", rows)
            label = f"{method} {settings['model']}"
            launch.run(launcher, f"{PACKAGE}.training.trainer", [str(out)], out / LAUNCHED / "output.log", label)
        else:
            fit(out, settings, rows, progress.bar)
    return _finish(run, settings, rows)


def _finish(run: Run, settings: dict, rows: list[dict]) -> pd.DataFrame:
    """Write the manifest, also where a workflow removed it before it asked again for a finished adapter.

    Commit, packages and date are those of the training, which may be older than the code that asks.
    """
    out = run.out
    log, origin = pd.read_csv(out / LOG), json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    facts = {"settings": run.settings, "training": settings, "rows": len(rows), "steps": int(log["step"].iloc[-1])}
    write_manifest(out, origin, **facts)
    for used in (CHECKPOINTS, LAUNCHED):
        shutil.rmtree(out / used, ignore_errors=True)
    return log


# --- The training itself -----------------------------------------------------------------------------------


def fit(out: Path, settings: dict, rows: list[dict], bar: Callable) -> None:
    """Train from the last checkpoint in ``out`` to the end; save the adapter, then the log.

    Every process of a launched training calls this with the same arguments. ``bar`` is `progress.bar` or like it.
    """
    models.quiet()
    method, name = settings["method"], settings["model"]
    known = parameters.model_of(parameters.ALIGN[method]).model_fields
    given = parameters.check(parameters.ALIGN[method], {key: settings[key] for key in known if key in settings})
    checkpoints = out / CHECKPOINTS / _layout()
    reward = SCENARIOS[given.scenario].reward(given.group_size) if method == "grpo" else contextlib.nullcontext()
    with reward as rewards, weights_memory.advice(ROOM):
        # The configuration comes first: it starts the process group, which decides how the weights are loaded.
        if method == "dpo":
            arguments = dpo_arguments(checkpoints, rows, given)
            trainer = ExactDPOTrainer(args=arguments, **_parts(rows, given))
        else:
            arguments = grpo_arguments(checkpoints, rows, given, models.load_tokenizer(name))
            trainer = ExactGRPOTrainer(args=arguments, reward_funcs=rewards, **_parts(rows, given))
        # Without tqdm the Trainer would print a dictionary a step.
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Bar(f"{method} {name}", bar))
        trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
        trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        models.check_adapter(out, name)
        (out / "training_args.bin").unlink(missing_ok=True)
        files.write_json(out / ORIGIN, made_by())
        # The log is written once the adapter is whole: its presence says that the training is done.
        files.write_text(out / LOG, _log(trainer.state.log_history).to_csv(index=False, float_format="%.6g"))


def dpo_arguments(checkpoints: Path, rows: list[dict], given: Any) -> DPOConfig:
    """TRL's configuration of a DPO training, for this process's share of it."""
    common = _common(checkpoints, rows, given)
    return _on_one_gpu(DPOConfig(**common, per_device_train_batch_size=given.batch_size, max_length=None))


def grpo_arguments(checkpoints: Path, rows: list[dict], given: Any, tokenizer: Any) -> GRPOConfig:
    """TRL's configuration of a GRPO training, for this process's share of it."""
    vllm = {}
    if given.use_vllm:
        longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
        # Without a bound vLLM makes room for the longest context of the model, beside the model in training.
        vllm = {"vllm_mode": "colocate", "vllm_max_model_length": longest + given.max_new_tokens}
    arguments = GRPOConfig(
        **_common(checkpoints, rows, given),
        per_device_train_batch_size=given.batch_size * given.group_size,
        num_generations=given.group_size,
        max_completion_length=given.max_new_tokens,
        temperature=given.temperature,
        # TRL's defaults are a later variant without KL; these are the method of the paper's reference.
        loss_type="grpo",
        use_vllm=given.use_vllm,
        **vllm,
    )
    return _on_one_gpu(arguments)


def _common(checkpoints: Path, rows: list[dict], given: Any) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    total = steps(given, len(rows))
    return {
        "output_dir": str(checkpoints),
        "learning_rate": given.learning_rate,
        "max_steps": total,
        "gradient_accumulation_steps": share(given, _processes()),
        "beta": given.beta,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(given.warmup_ratio * total),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": given.save_steps,
        "save_total_limit": 1,
        "gradient_checkpointing": given.checkpoint_activations,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "seed": given.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _processes() -> int:
    """How many processes train together, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _on_one_gpu(arguments: Any) -> Any:
    """A process trains on one GPU; seeing several, the Trainer would split each batch over them by itself."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _parts(rows: list[dict], given: Any) -> dict[str, Any]:
    # The adapter's weights are drawn when the trainer is built, before TRL sets its own seed.
    set_seed(given.seed)
    targets = [name.strip() for name in given.lora_targets.split(",")]
    lora = LoraConfig(
        r=given.lora_rank, lora_alpha=given.lora_alpha, target_modules=targets[0] if len(targets) == 1 else targets
    )
    weights = models.load_weights(given.model, given.dtype)
    weights.config._name_or_path = weights.name_or_path = given.model
    tokenizer = models.load_tokenizer(given.model)
    # GRPO stops its replies where the engine stops them.
    known = weights.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    weights.generation_config.eos_token_id = sorted(
        {turn_end(tokenizer), tokenizer.eos_token_id, *(i for i in known if i is not None)}
    )
    return {
        "model": weights,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "peft_config": lora,
    }


def _layout() -> str:
    """How this process keeps its checkpoints: those of sharded trainings can't be read by others."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            return name.lower()
    return "whole"


def _last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint whose state, its last file, is there: a kill may leave half of one."""
    whole = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _log(history: list[dict]) -> pd.DataFrame:
    rows = [entry for entry in history if "loss" in entry]
    columns = {new: [float(row[old]) for row in rows] for old, new in CURVES.items() if rows and old in rows[0]}
    return pd.DataFrame({"step": [row["step"] for row in rows], **columns})


class _Bar(TrainerCallback):
    """Shows the training's progress, in optimiser steps; of several processes the first does."""

    def __init__(self, label: str, bar: Callable):
        self.label, self.open, self.stack = label, bar, contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = self.stack.enter_context(self.open(state.max_steps, self.label))
            self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar.update(1)

    def on_train_end(self, args, state, control, **_):
        self.stack.close()


@record  # so that torchrun's summary has the traceback of the process that failed first
def main(arguments: list[str] | None = None) -> None:
    """What a launched process runs: the training that a folder describes, up to its adapter and log."""
    [folder] = map(Path, arguments or sys.argv[1:])
    rows = json.loads((folder / LAUNCHED / "rows.json").read_text(encoding="utf-8"))
    fit(folder, folders.read_marker(folder), rows, launch.bar)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
