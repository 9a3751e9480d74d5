"""TRL's trainers on the very tokens that the engine reads and writes.

Left to itself TRL lets the tokenizer put its own special tokens around a text whose template wrote them already, and
ends an answer with the tokenizer's end-of-text token, which for many models isn't the end of a turn. Each class
replaces the one method of TRL that tokenises, and computes a prompt once for all of its answers (`shared_prompts`);
DPO's also measures what the two answers of a pair are given.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from trl import DPOTrainer, GRPOTrainer

from atp_utils.models.chat_template import common_prefix, encode, turn_end
from atp_utils.training.shared_prompts import score_answers, share_prefill


def preference_ids(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of a row; each answer is read behind its prompt, as one text.

    Where a token reaches across the boundary, both answers begin with it.
    """
    prompt, end = encode(tokenizer, row["prompt"]), turn_end(tokenizer)
    answers = [encode(tokenizer, row["prompt"] + row[side]) + [end] for side in ("chosen", "rejected")]
    start = common_prefix([prompt, *answers])
    chosen, rejected = (answer[start:] for answer in answers)
    return {"prompt_ids": prompt[:start], "chosen_ids": chosen, "rejected_ids": rejected}


def answers_mass(inputs: Mapping[str, torch.Tensor], log_probs: torch.Tensor) -> torch.Tensor:
    """Probability of each pair's two answers together [pairs], given what both begin with, as a forced choice has it.

    ``inputs`` are TRL's batch: the chosen answers, then the rejected ones, each behind its prompt, padded on the right.
    ``log_probs`` [2 * pairs, tokens - 1] are those of each token after the first. A turn's end is no part of an answer.
    """
    chosen, rejected = inputs["input_ids"].chunk(2)
    alike = (chosen == rejected).cumprod(dim=1)[:, 1:].repeat(2, 1)
    followed = pad(inputs["completion_mask"][:, 2:], (0, 1))
    return (log_probs * followed * (1 - alike)).sum(dim=1).exp().view(2, -1).sum(dim=0)


def in_order(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's ``batches``, shuffled among each other, with each row where its "place" says; what has no rows stays."""
    order = torch.cat([batch["place"] for batch in batches]).argsort()

    def ordered(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return [batch[name] for batch in batches]
        return torch.cat([batch[name] for batch in batches])[order].chunk(len(batches))

    columns = {name: ordered(name, value) for name, value in batches[0].items()}
    return [{name: values[number] for name, values in columns.items()} for number in range(len(batches))]


def _models(trainer: Any) -> list[Any]:
    """The policy below PEFT and, where all its weights are trained, the reference below a launcher's wrapper."""
    policy = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    return [policy] + ([trainer.accelerator.unwrap_model(trainer.ref_model)] if trainer.ref_model is not None else [])


class ExactDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` on `preference_ids`, in which a pair's prompt is computed once.

    Where rows come up again, the reference's log-probabilities of all of them are computed before the training. Where
    ``measures_mass`` is true, the mean of `answers_mass` is logged.
    """

    measures_mass = False

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        for model in _models(self):
            score_answers(model)
        args = self.args
        seen = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        # A sharded model can't be read before the training, whose start shards it: TRL reads it in every step.
        if seen > len(self.train_dataset) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.train_dataset = self._with_reference(self.train_dataset)
            self.precompute_ref_logps = True
            # Where all weights are trained it is a copy of what the policy was until now.
            self.ref_model = None

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        return Dataset.from_list([preference_ids(processing_class, row) for row in dataset])

    def _with_reference(self, dataset: Dataset) -> Dataset:
        """``dataset`` with the columns in which TRL looks for the reference's log-probabilities, one number an answer.

        TRL's own way to them is by a file that only one of several processes finds, for a dataset in memory.
        """
        size = self.args.train_batch_size
        batches = self.accelerator.prepare(DataLoader(dataset, batch_size=size, collate_fn=self.data_collator))
        read = [self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, one)) for one in batches]
        for name, parts in zip(("ref_chosen_logps", "ref_rejected_logps"), zip(*read, strict=True), strict=True):
            dataset = dataset.add_column(name, torch.cat(parts).tolist())
        return dataset

    def compute_loss(self, model: Any, inputs: dict, *given: Any, **named: Any) -> Any:
        def noted(**what: Any) -> Any:
            # TRL calls the policy once for a loss: what it says of the answers is read on its way.
            outputs = model(**what)
            if self.measures_mass:
                tokens = inputs["input_ids"].size(1) - 1
                mass = answers_mass(inputs, outputs.log_probs[:, -tokens:].detach())
                self._metrics["train"]["mass"].append(self.accelerator.gather(mass).mean().item())
            return outputs

        return super().compute_loss(noted, inputs, *given, **named)


class ExactGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, whose prompts get no token that their text doesn't have.

    A group's prompt is read once where its replies are sampled, and once in the loss. TRL shuffles the replies of a
    step between reference and policy, which parts groups. Here they stay in order: a step's gradient is the same, where
    replies are sampled for one step, and the two read the same batches, so that before anything is learnt they differ
    by nothing. Of a difference by rounding Adam would make whole steps, as long as no group has a reward.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        for model in _models(self):
            score_answers(model)
        share_prefill(_models(self)[0])

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        """TRL's sampler; where a training goes on in a later pass over the rows, it has the order of that pass too."""
        sampler = super()._get_train_sampler(dataset)

        def set_epoch(epoch: int) -> None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

        sampler.set_epoch = set_epoch
        return sampler

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        return outputs | {"place": torch.arange(len(outputs["prompt_ids"]))}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = in_order(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]
