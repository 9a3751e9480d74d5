"""What is trained on is what the engine reads, for tokenizers that would add tokens of their own."""

from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from trl import DPOTrainer, GRPOTrainer

from atp_utils import models
from atp_utils.models.chat_template import turn_end
from atp_utils.training.exact_trainers import ExactDPOTrainer, ExactGRPOTrainer, preference_ids

BEGIN, END, TURN = "<|endoftext|>", "<|endoftext|>", "<|im_end|>"
ROW = {"prompt": "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n", "chosen": "Yes.", "rejected": "No, no."}


@pytest.fixture(params=["as it is", "adds BOS", "adds BOS and EOS", "EOS is no end of turn"])
def tokenizer(embedded, request):
    found = AutoTokenizer.from_pretrained(models.locate(embedded))
    if "adds" in request.param:
        single = f"{BEGIN} $A {END}" if "and EOS" in request.param else f"{BEGIN} $A"
        ids = [(BEGIN, found.convert_tokens_to_ids(BEGIN))]
        found.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    if "no end" in request.param:
        found.eos_token = END
    return found


def test_an_answer_is_its_own_tokens_and_the_end_of_a_turn(tokenizer):
    end = tokenizer.convert_tokens_to_ids(TURN)
    assert turn_end(tokenizer) == end
    read = preference_ids(tokenizer, ROW)
    assert tokenizer.decode(read["prompt_ids"]) == ROW["prompt"]
    assert tokenizer.decode(read["chosen_ids"]) == f"Yes.{TURN}" and read["rejected_ids"][-1] == end
    assert tokenizer.decode(read["rejected_ids"]) == f"No, no.{TURN}"


def test_a_token_across_the_boundary_belongs_to_the_answers(tokenizer):
    read = preference_ids(tokenizer, {"prompt": "The s", "chosen": "ea", "rejected": "un"})
    assert tokenizer.decode(read["prompt_ids"]) == "The"
    assert (
        tokenizer.decode(read["chosen_ids"]) == f" sea{TURN}"
        and tokenizer.decode(read["rejected_ids"]) == f" sun{TURN}"
    )


def test_a_template_that_marks_no_end_leaves_the_tokenizers(embedded):
    found = AutoTokenizer.from_pretrained(models.locate(embedded))
    found.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    found.eos_token = END
    assert turn_end(found) == found.eos_token_id


def test_trl_still_tokenises_where_it_is_replaced(tokenizer):
    assert {"_prepare_dataset"} <= vars(DPOTrainer).keys() and {"_tokenize_prompts", "_get_train_sampler"} <= vars(
        GRPOTrainer
    ).keys()
    row = dict(ExactDPOTrainer._prepare_dataset(None, [ROW], tokenizer, None, "train")[0])
    assert row == preference_ids(tokenizer, ROW)
    ids, *rest = ExactGRPOTrainer._tokenize_prompts(SimpleNamespace(processing_class=tokenizer), [ROW["prompt"]])
    assert tokenizer.decode(ids[0]) == ROW["prompt"] and rest == [None, {}]
