"""Alignment arms: preference pairs and rewards, then LoRA adapters by DPO and GRPO (TRL + PEFT).

Training sees training prompts only, each as the opening of an episode, without history (Appendix A.1.1):
self-evolution happens after training. Everything here works for any scenario whose items have ``options``,
``compliant`` and an ``opening(item, protocol)``.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from atp_utils import files, models, progress, shown
from atp_utils.decisions import answer_json, parse_choice, split_thinking
from atp_utils.engine import Message, Request, derive_seed
from atp_utils.journal import write_manifest
from atp_utils.protocol import Protocol

LOG, SETTINGS = "training_log.csv", "settings.json"
COMPLIANT_REWARD, DEVIANT_REWARD, INVALID_REWARD = 1.0, 0.1, 0.0
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


@dataclass(frozen=True)
class Training:
    """What a training run needs to know; the paper's values are in ``profiles/paper.yaml``.

    ``max_steps`` 0 trains for ``epochs``; ``beta`` is DPO's temperature or GRPO's KL weight; a step of DPO
    sees ``batch_size * accumulation`` pairs, one of GRPO as many prompts with ``group_size`` replies each.
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

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Training":
        """The training that a notebook's parameters describe: those of ``parameters`` that have a field's name."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls) if field.name in parameters})


Opening = Callable[[Any, Protocol], list[Message]]


def render(tokenizer: Any, messages: Sequence[Message], thinking: bool = False) -> str:
    """A chat as the text that the model continues, exactly as the engine renders it."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def answer_pairs(items: Sequence, opening: Opening, tokenizer: Any, protocol: Protocol) -> list[dict[str, str]]:
    """DPO rows whose two completions are the bare JSON answers: compliant preferred to deviant."""
    return [
        {
            "prompt": render(tokenizer, opening(item, protocol)),
            "chosen": answer_json(item.compliant),
            "rejected": answer_json(item.deviant),
        }
        for item in items
    ]


def elicitation(item: Any, opening: Opening, protocol: Protocol, seed: int) -> Generator[list[Request], list, dict]:
    """Episode that gets the model's own reply for either option, asked for by an instruction added here only.

    Returns ``{"item", "prompt", "chosen", "rejected"}`` with the chat of the plain prompt, so training never
    sees the added instruction; a completion is None where no attempt gave a valid reply with that option.
    """
    plain = opening(item, protocol)
    found: dict[str, str | None] = {item.compliant: None, item.deviant: None}
    for attempt in range(protocol.max_attempts):
        open_options = [option for option, reply in found.items() if reply is None]
        if not open_options:
            break
        replies = yield [_elicit(item, plain, option, attempt, seed, protocol) for option in open_options]
        for option, reply in zip(open_options, replies, strict=True):
            if parse_choice(reply.text, item.options) == option:
                found[option] = split_thinking(reply.text)[1]
    return {"item": item.id, "prompt": plain, "chosen": found[item.compliant], "rejected": found[item.deviant]}


def _elicit(item: Any, plain: list[Message], option: str, attempt: int, seed: int, protocol: Protocol) -> Request:
    key = ("elicit", item.id, option, f"seed{seed}", f"attempt{attempt}")
    added = f"{plain[-1]['content']}\nIn this exercise, give the reasons for {option} and choose {option}."
    messages = (*plain[:-1], {"role": "user", "content": added})
    return Request("/".join(key), messages, derive_seed(*key), sampling=protocol.sampling)


def elicited_pairs(found: Sequence[dict], tokenizer: Any, protocol: Protocol) -> list[dict[str, str]]:
    """DPO rows from `elicitation`'s results; items without both completions are left out."""
    return [
        {**pair, "prompt": render(tokenizer, pair["prompt"], protocol.sampling.thinking)}
        for pair in found
        if pair["chosen"] is not None and pair["rejected"] is not None
    ]


def choice_reward(completion: str, options: Sequence[str], compliant: str) -> float:
    """GRPO's reward (Appendix A.1.1): compliant 1, deviant 0.1, invalid 0."""
    choice = parse_choice(completion, options)
    if choice is None:
        return INVALID_REWARD
    return COMPLIANT_REWARD if choice == compliant else DEVIANT_REWARD


def reward_rows(
    items: Sequence, opening: Opening, tokenizer: Any, protocol: Protocol, prefill: str = ""
) -> list[dict[str, Any]]:
    """GRPO rows. ``prefill`` is the beginning of the answer, given to the model as if it had written it.

    A model that seldom answers in JSON by itself gets hardly any reward above 0 and learns nothing; with the
    prefill ``{"choice": "`` it is trained on just what the `choose` protocol later asks of it.
    """
    thinking = protocol.name == "reason" and protocol.sampling.thinking
    return [
        {
            "prompt": render(tokenizer, opening(item, protocol), thinking) + prefill,
            "options": list(item.options),
            "compliant": item.compliant,
            "prefill": prefill,
        }
        for item in items
    ]


def _rewards(completions: list[str], options: list, compliant: list, prefill: list, **_: Any) -> list[float]:
    rows = zip(completions, options, compliant, prefill, strict=True)
    return [choice_reward(start + text, names, good) for text, names, good, start in rows]


def train_dpo(model: str, rows: list[dict], out: Path, training: Training) -> pd.DataFrame:
    """Train a LoRA adapter by DPO into ``out``; returns the training log (see `_train`)."""

    def build() -> DPOTrainer:
        arguments = DPOConfig(
            **_common(out, training, rows), per_device_train_batch_size=training.batch_size, max_length=None
        )
        return DPOTrainer(**_parts(model, rows, training), args=arguments)

    return _train("dpo", model, rows, out, training, build)


def train_grpo(
    model: str, rows: list[dict], out: Path, training: Training, rewards: Callable[..., list[float]] = _rewards
) -> pd.DataFrame:
    """Train a LoRA adapter by GRPO into ``out``; returns the training log (see `_train`).

    ``rewards`` is TRL's reward function: it gets the columns of ``rows`` and the completions.
    """

    def build() -> GRPOTrainer:
        arguments = GRPOConfig(
            **_common(out, training, rows),
            per_device_train_batch_size=training.batch_size * training.group_size,
            num_generations=training.group_size,
            max_completion_length=training.max_new_tokens,
            temperature=training.temperature,
            # TRL's defaults are a later variant without KL; these are the method of the paper's reference.
            loss_type="grpo",
        )
        return GRPOTrainer(**_parts(model, rows, training), args=arguments, reward_funcs=rewards)

    return _train("grpo", model, rows, out, training, build)


def _parts(model: str, rows: list[dict], training: Training) -> dict[str, Any]:
    # The adapter's weights are drawn when the trainer is built, before TRL sets its own seed.
    set_seed(training.seed)
    lora = LoraConfig(r=training.lora_rank, lora_alpha=2 * training.lora_rank, target_modules="all-linear")
    weights = models.load_weights(model)
    weights.config._name_or_path = weights.name_or_path = model
    return {
        "model": weights,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": models.load_tokenizer(model),
        "peft_config": lora,
    }


def _common(out: Path, training: Training, rows: list[dict]) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    step_rows = training.batch_size * training.accumulation
    steps = training.max_steps or max(1, round(training.epochs * len(rows) / step_rows))
    return {
        "output_dir": str(out / "checkpoints"),
        "learning_rate": training.learning_rate,
        "max_steps": steps,
        "gradient_accumulation_steps": training.accumulation,
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


def _train(
    method: str, model: str, rows: list[dict], out: Path, training: Training, build: Callable[[], Any]
) -> pd.DataFrame:
    """Train once: a finished adapter is returned as it is, an interrupted training goes on from its checkpoint.

    ``out`` gets ``settings.json``, the adapter, ``training_log.csv`` and, last, ``manifest.json``; what it held of
    a training with other settings or data is removed first. Columns of the log: step, and those of `CURVES` that
    the method has.
    """
    if not rows:
        raise ValueError(f"{shown(out)}: there is nothing to train on (0 rows)")
    settings = {"method": method, "model": model, "identity": models.identity(model), **asdict(training)}
    settings["rows_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if _settings_of(out / SETTINGS) != settings:
        shutil.rmtree(out, ignore_errors=True)
        files.write_json(out / SETTINGS, settings)
    elif (out / LOG).is_file():
        return _finish(out, settings, rows)
    models.quiet()
    checkpoints = out / "checkpoints"
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    trainer = build()
    trainer.add_callback(_Bar(f"{method} {model}"))
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out))
    (out / "training_args.bin").unlink(missing_ok=True)
    # The log is written once the adapter is whole: its presence says that the training is done.
    files.write_text(out / LOG, _log(trainer.state.log_history).to_csv(index=False, float_format="%.6g"))
    return _finish(out, settings, rows)


def _finish(out: Path, settings: dict, rows: list[dict]) -> pd.DataFrame:
    """Write the manifest, also where a workflow removed it before it asked again for a finished adapter."""
    log = pd.read_csv(out / LOG)
    write_manifest(out, settings=settings, rows=len(rows), steps=int(log["step"].iloc[-1]))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return log


def _settings_of(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _log(history: list[dict]) -> pd.DataFrame:
    rows = [entry for entry in history if "loss" in entry]
    columns = {new: [float(row[old]) for row in rows] for old, new in CURVES.items() if rows and old in rows[0]}
    return pd.DataFrame({"step": [row["step"] for row in rows], **columns})


class _Bar(TrainerCallback):
    """Shows the training's progress on `progress.bar`, in optimiser steps."""

    def __init__(self, label: str):
        self.label, self.stack = label, ExitStack()

    def on_train_begin(self, args, state, control, **_):
        self.bar = self.stack.enter_context(progress.bar(state.max_steps, self.label))
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.bar.update(1)

    def on_train_end(self, args, state, control, **_):
        self.stack.close()
