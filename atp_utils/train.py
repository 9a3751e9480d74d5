"""LoRA adapters by DPO and GRPO (TRL + PEFT), in this process or in several.

The training is written once, in `fit`. Without a launcher it runs here; with one, `launch` starts processes that run
``python -m atp_utils.train FOLDER``, which reads what to do from the folder's marker and calls the same function. A
step sees the same number of rows in either case: the processes share out ``accumulation``.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, GRPOConfig
from trl.import_utils import is_vllm_available

from atp_utils import align, files, folders, launch, memory, models, progress, shown, tool_pairs
from atp_utils.chat_template import turn_end
from atp_utils.code_digest import PACKAGE, code_of
from atp_utils.exact_trainers import ExactDPOTrainer, ExactGRPOTrainer
from atp_utils.journal import made_by, write_manifest
from atp_utils.runs import Run
from atp_utils.sandbox import Sandbox

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
Reward = Literal["choice", "preference"]


@dataclass(frozen=True)
class Training:
    """What a training run needs to know; the paper's values are in ``profiles/paper.yaml``.

    ``max_steps`` 0 trains for ``epochs``; ``beta`` is DPO's temperature or GRPO's KL weight; a step of DPO
    sees ``batch_size * accumulation`` pairs, one of GRPO as many prompts with ``group_size`` replies each, however
    many processes share the work. ``use_vllm`` lets vLLM write GRPO's replies, on the same GPUs.
    """

    learning_rate: float
    epochs: float
    max_steps: int
    batch_size: int
    accumulation: int
    beta: float
    lora_rank: int
    seed: int
    save_steps: int
    warmup_ratio: float = 0.1
    group_size: int = 1
    max_new_tokens: int = 0
    temperature: float = 1.0
    checkpoint_activations: bool = False
    use_vllm: bool = False

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Training":
        """The training that a notebook's parameters describe: those of ``parameters`` that have a field's name."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls) if field.name in parameters})

    def steps(self, rows: int) -> int:
        """Optimiser steps of a training on so many rows."""
        return self.max_steps or max(1, round(self.epochs * rows / (self.batch_size * self.accumulation)))

    def share(self, processes: int) -> int:
        """Batches that each of ``processes`` accumulates for a step; raises ValueError where they don't divide."""
        if self.accumulation % processes:
            raise ValueError(
                f"accumulation is {self.accumulation} and must be a multiple of the number of processes, {processes}: "
                "they share it out, so that a step sees batch_size * accumulation rows on any number of GPUs"
            )
        return self.accumulation // processes


def check(run: Run, method: str, reward: Reward = "choice") -> dict[str, Any]:
    """What the training of a notebook's ``run`` depends on besides its rows; a notebook asks before other work.

    The code counts too: it is that of this module's import closure, which makes the adapter of the rows. Raises
    ValueError or FileNotFoundError for a training that can't start here, and FileExistsError where ``out`` isn't ours
    or holds another training and ``overwrite`` is false.
    """
    training, launcher = Training.of(run.parameters), run.parameters["launcher"]
    if training.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm is true, and vLLM isn't installed: pip install trl[vllm], or set it to false")
    training.share(launch.processes(launch.configuration(launcher)) if launcher else 1)
    settings = {"method": method, "model": run.parameters["model"], **({"reward": reward} if method == "grpo" else {})}
    settings |= {"identity": models.identity(settings["model"]), **asdict(training)}
    settings["code"] = code_of(f"{PACKAGE}/train.py")
    folders.check(run.out, settings, overwrite=run.parameters["overwrite"])
    return settings


def adapter(run: Run, method: str, rows: list[dict], reward: Reward = "choice") -> pd.DataFrame:
    """Train a LoRA adapter by ``method`` ("dpo" or "grpo") into the run's folder, once; returns the training log.

    A finished adapter is returned as it is, an interrupted training goes on from its checkpoint. The folder gets a
    marker, the adapter, ``training_log.csv`` and, last, ``manifest.json``; an adapter of another training that it held
    is set aside if the run may ``overwrite``. Columns of the log: step, and those of `CURVES` that the method has. The
    launcher is no part of the settings: it decides where a training runs, not which it is. GRPO's ``reward`` "choice"
    is `align.choice_reward`, "preference" that of tool use (`tool_pairs.preference_reward`), for which each process has
    a sandbox. Raises as `check` does.
    """
    out, launcher = run.out, run.parameters["launcher"]
    if not rows:
        raise ValueError(f"{shown(out)}: there is nothing to train on (0 rows)")
    settings = check(run, method, reward)
    settings["rows_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    folders.claim(out, settings, overwrite=run.parameters["overwrite"])
    if not (out / LOG).is_file():
        if launcher:
            files.write_json(out / LAUNCHED / "rows.json", rows)
            label = f"{method} {settings['model']}"
            launch.run(launcher, f"{PACKAGE}.train", [str(out)], out / LAUNCHED / "output.log", label)
        else:
            fit(out, settings, rows, progress.bar)
    return _finish(run, settings, rows)


def _finish(run: Run, settings: dict, rows: list[dict]) -> pd.DataFrame:
    """Write the manifest, also where a workflow removed it before it asked again for a finished adapter.

    Commit, packages and date are those of the training, which may be older than the code that asks.
    """
    out = run.out
    log, origin = pd.read_csv(out / LOG), json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    facts = {"settings": run.parameters, "training": settings, "rows": len(rows), "steps": int(log["step"].iloc[-1])}
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
    training, name = Training.of(settings), settings["model"]
    checkpoints = out / CHECKPOINTS / _layout()
    with _rewards(settings.get("reward"), training) as rewards, memory.advice(ROOM):
        # The configuration comes first: it starts the process group, which decides how the weights are loaded.
        if settings["method"] == "dpo":
            arguments = dpo_arguments(checkpoints, rows, training)
            trainer = ExactDPOTrainer(args=arguments, **_parts(name, rows, training))
        else:
            arguments = grpo_arguments(checkpoints, rows, training, models.load_tokenizer(name))
            trainer = ExactGRPOTrainer(args=arguments, reward_funcs=rewards, **_parts(name, rows, training))
        # Without tqdm the Trainer would print a dictionary a step.
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Bar(f"{settings['method']} {name}", bar))
        trainer.train(resume_from_checkpoint=_last_whole(checkpoints))
        trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        models.check_adapter(out, name)
        (out / "training_args.bin").unlink(missing_ok=True)
        files.write_json(out / ORIGIN, made_by())
        # The log is written once the adapter is whole: its presence says that the training is done.
        files.write_text(out / LOG, _log(trainer.state.log_history).to_csv(index=False, float_format="%.6g"))


@contextlib.contextmanager
def _rewards(name: str | None, training: Training) -> Iterator[Callable[..., list[float]]]:
    """TRL's reward function of a name: what a launched process can be told, unlike a function with a sandbox in it."""
    if name == "preference":
        with Sandbox() as box:
            yield tool_pairs.preference_reward(box.run, training.group_size)
    else:
        yield align.rewards


def dpo_arguments(checkpoints: Path, rows: list[dict], training: Training) -> DPOConfig:
    """TRL's configuration of a DPO training, for this process's share of it."""
    common = _common(checkpoints, rows, training)
    return _on_one_gpu(DPOConfig(**common, per_device_train_batch_size=training.batch_size, max_length=None))


def grpo_arguments(checkpoints: Path, rows: list[dict], training: Training, tokenizer: Any) -> GRPOConfig:
    """TRL's configuration of a GRPO training, for this process's share of it."""
    vllm = {}
    if training.use_vllm:
        longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
        # Without a bound vLLM makes room for the longest context of the model, beside the model in training.
        vllm = {"vllm_mode": "colocate", "vllm_max_model_length": longest + training.max_new_tokens}
    arguments = GRPOConfig(
        **_common(checkpoints, rows, training),
        per_device_train_batch_size=training.batch_size * training.group_size,
        num_generations=training.group_size,
        max_completion_length=training.max_new_tokens,
        temperature=training.temperature,
        # TRL's defaults are a later variant without KL; these are the method of the paper's reference.
        loss_type="grpo",
        use_vllm=training.use_vllm,
        **vllm,
    )
    return _on_one_gpu(arguments)


def _common(checkpoints: Path, rows: list[dict], training: Training) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    steps = training.steps(len(rows))
    return {
        "output_dir": str(checkpoints),
        "learning_rate": training.learning_rate,
        "max_steps": steps,
        "gradient_accumulation_steps": training.share(_processes()),
        "beta": training.beta,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(training.warmup_ratio * steps),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": 1,
        "gradient_checkpointing": training.checkpoint_activations,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "seed": training.seed,
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


def _parts(model: str, rows: list[dict], training: Training) -> dict[str, Any]:
    # The adapter's weights are drawn when the trainer is built, before TRL sets its own seed.
    set_seed(training.seed)
    lora = LoraConfig(r=training.lora_rank, lora_alpha=2 * training.lora_rank, target_modules="all-linear")
    weights = models.load_weights(model)
    weights.config._name_or_path = weights.name_or_path = model
    tokenizer = models.load_tokenizer(model)
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
