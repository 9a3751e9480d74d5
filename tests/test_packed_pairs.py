"""A pair that is read as one row trains what TRL trains on the two rows that it stands for."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES
from trainings import a_run
from trl import DPOTrainer
from trl.trainer import utils

from atp_utils.models.chat_template import common_prefix
from atp_utils.training import trainer
from atp_utils.training.packed_pairs import IGNORED, can_pack, pack

# Answers of unequal length, one that the other begins with, two that are the same, and prompts of unequal length.
ROWS = [
    {"prompt": "Which mill do you order the flour from?", "chosen": "Cedar.", "rejected": "From Willow, of course."},
    {"prompt": "And now?", "chosen": '{"choice": "Cedar"} or so', "rejected": '{"choice": "Cedar"'},
    {"prompt": "Hm, the rule says Cedar only. So?", "chosen": "Yes", "rejected": "Yes and no, it depends on the week."},
    {"prompt": "Sure?", "chosen": "I am.", "rejected": "I am."},
]
SETTINGS = {"lora_rank": 2, "batch_size": 2, "accumulation": 1, "learning_rate": 1e-2, "dtype": "float32"}


def test_a_pair_by_hand():
    _ = IGNORED
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 0, 0], [1, 2, 5, 6, 7], [9, 8, 0, 0, 0]])
    read = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    labels = torch.tensor([[_, _, 3, 4, _], [_, 2, 3, _, _], [_, _, 5, 6, 7], [_, 8, _, _, _]])
    pairs = pack(ids, read, labels)
    # The 2 before 3 and the 2 before 5; 4 and 7 predict nothing. The second pair has nothing in common.
    assert pairs.input_ids[0].tolist() == [1, 2, 3, 2, 5, 6] and pairs.input_ids[1, :3].tolist() == [1, 2, 9]
    assert pairs.labels.tolist() == [[_, 3, 4, 5, 6, 7], [2, 3, 8, _, _, _]]
    assert pairs.position_ids[0].tolist() == [0, 1, 2, 1, 2, 3] and pairs.position_ids[1, :3].tolist() == [0, 1, 0]
    assert pairs.sees[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]
    assert pairs.sees[1, 0, :3].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert pairs.columns[[0, 2]].tolist() == [[0, 1, 2, 3], [0, 3, 4, 5]]
    assert pairs.columns[[1, 3], :2].tolist() == [[0, 1], [2, 3]]


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """A trainer of a family's tiny model, ours or, as its parent reads pairs, TRL's; called with more parameters."""

    def make(family, packed, attention="sdpa", **changes):
        given = a_run("dpo", tiny[family], tmp_path, **SETTINGS | {"max_steps": 2} | changes).parameters
        parts = trainer._parts(ROWS, given)
        parts["model"].set_attn_implementation(attention)
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr("atp_utils.training.exact_trainers.can_pack", lambda _: False)
            return trainer.ExactDPOTrainer(args=trainer.trl_arguments(tmp_path, ROWS, given), **parts)

    return make


def losses(found, rows):
    """Loss, gradients and metrics of a batch, for an adapter that says something; TRL's own way to the loss."""
    torch.manual_seed(1)
    weights = {name: part for name, part in found.model.named_parameters() if part.requires_grad}
    for part in weights.values():
        part.data.normal_(std=0.1)
    batch = found.data_collator([found.train_dataset[row] for row in rows])
    loss = DPOTrainer.compute_loss(found, found.model, batch)
    loss.backward()
    return loss.item(), {name: part.grad for name, part in weights.items()}, dict(found._metrics["train"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "checkpoint"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_losses_gradients_and_metrics_are_trls(family, attention, checkpoint, trained):
    ours, trls = (
        losses(trained(family, packed, attention, checkpoint_activations=checkpoint), range(4))
        for packed in (True, False)
    )
    assert ours[0] == pytest.approx(trls[0], abs=1e-5)
    assert max(part.abs().max() for part in trls[1].values()) > 1e-2
    for name in trls[1]:
        torch.testing.assert_close(ours[1][name], trls[1][name], rtol=1e-4, atol=1e-5)
    assert ours[2].keys() == trls[2].keys() and abs(trls[2]["rewards/margins"][0]) > 0.01
    for name, [value] in trls[2].items():
        assert ours[2][name] == [pytest.approx(value, abs=1e-4, rel=1e-4)], name


def test_what_a_pair_begins_with_is_read_once_and_only_answers_are_scored(trained, monkeypatch):
    found, read, scored = trained("qwen3", True), [], []
    fused = utils._ChunkedLogProbFunction.apply
    counted = SimpleNamespace(apply=lambda hidden, *rest: scored.append(len(hidden)) or fused(hidden, *rest))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", counted)
    base = found.model.get_base_model()
    base.model.embed_tokens.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    losses(found, range(4))
    lengths, answers = [], 0
    for row in found.train_dataset:
        both = row["chosen_ids"], row["rejected_ids"]
        differ = len(both[0]) + len(both[1]) - common_prefix(both)
        lengths.append(len(row["prompt_ids"]) + differ - 1)
        answers += differ
    # Of the policy, then of the reference.
    assert read == [(4, max(lengths))] * 2 and scored == [answers] * 2


@pytest.mark.parametrize("packed", [True, False])
def test_rows_that_come_again_meet_a_reference_computed_once(packed, trained, monkeypatch):
    def history(precomputes):
        with monkeypatch.context() as patch:
            if not precomputes:
                patch.setattr(trainer.ExactDPOTrainer, "_with_reference", lambda self, dataset: dataset)
            found = trained("llama3_1", packed, max_steps=6, save_steps=100, warmup_ratio=0)
        found.precompute_ref_logps = precomputes
        disable, read = found.model.disable_adapter, []
        found.model.disable_adapter = lambda: read.append(1) or disable()
        found.train()
        return [entry for entry in found.state.log_history if "loss" in entry], len(read)

    (once, none), (again, each) = history(True), history(False)
    assert (none, each) == (0, 6)
    for ours, trls in zip(once, again, strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "grad_norm"):
            assert ours[name] == pytest.approx(trls[name], abs=1e-4, rel=1e-3), name
    assert once[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"model_type": "qwen3"}, True),
        ({"_attn_implementation": "eager"}, True),
        ({"_attn_implementation": "flash_attention_2"}, False),
        ({"model_type": "mamba"}, False),
        ({"sliding_window": 512}, False),
    ],
)
def test_which_models_can_read_a_packed_pair(changes, expected):
    config = {"model_type": "llama", "_attn_implementation": "sdpa", "sliding_window": None}
    assert can_pack(SimpleNamespace(**config | changes)) is expected
