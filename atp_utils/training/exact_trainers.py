"""TRL's trainers on the very tokens that the engine reads and writes.

Left to itself TRL lets the tokenizer put its own special tokens around a text whose template wrote them already, and
ends an answer with the tokenizer's end-of-text token, which for many models isn't the end of a turn. Each class
replaces the one method of TRL that tokenises.
"""

from typing import Any

from datasets import Dataset
from trl import DPOTrainer, GRPOTrainer

from atp_utils.models.chat_template import common_prefix, encode, turn_end


def preference_ids(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of a row; each answer is read behind its prompt, as one text.

    Where a token reaches across the boundary, both answers begin with it.
    """
    prompt, end = encode(tokenizer, row["prompt"]), turn_end(tokenizer)
    answers = [encode(tokenizer, row["prompt"] + row[side]) + [end] for side in ("chosen", "rejected")]
    start = common_prefix([prompt, *answers])
    chosen, rejected = (answer[start:] for answer in answers)
    return {"prompt_ids": prompt[:start], "chosen_ids": chosen, "rejected_ids": rejected}


class ExactDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` on `preference_ids`."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        return Dataset.from_list([preference_ids(processing_class, row) for row in dataset])


class ExactGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose prompts get no token that their text doesn't have."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}
