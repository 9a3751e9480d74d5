"""Rows of one prompt that are read as one train what TRL trains on the rows that it stands for."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES
from trainings import a_run
from trl import DPOTrainer
from trl.trainer import utils

from atp_utils.models.chat_template import common_prefix
from atp_utils.training import trainer
from atp_utils.training.exact_trainers import in_order
from atp_utils.training.shared_prompts import IGNORED, can_share, pack

# Answers of unequal length, one that the other begins with, two that are the same, and prompts of unequal length.
ROWS = [
    {"prompt": "Which mill do you order the flour from?", "chosen": "Cedar.", "rejected": "From Willow, of course."},
    {"prompt": "And now?", "chosen": '{"choice": "Cedar"} or so', "rejected": '{"choice": "Cedar"'},
    {"prompt": "Hm, the rule says Cedar only. So?", "chosen": "Yes", "rejected": "Yes and no, it depends on the week."},
    {"prompt": "Sure?", "chosen": "I am.", "rejected": "I am."},
]
SETTINGS = {"lora_rank": 2, "batch_size": 2, "accumulation": 1, "learning_rate": 1e-2, "dtype": "float32"}


def test_a_batch_by_hand():
    _ = IGNORED
    ids = torch.tensor([[1, 2, 3, 4, 0], [7, 1, 2, 3, 4], [1, 2, 5, 0, 0], [1, 2, 3, 6, 0]])
    labels = torch.tensor([[_, _, 3, 4, _], [_, _, _, 3, 4], [_, _, 5, _, _], [_, _, 3, 6, _]])
    packed = pack(ids, (ids > 0).int(), labels)
    # The prompt is 1, 2 in three rows: 1 stands once, 2 before each answer, and what ends an answer predicts nothing.
    assert packed.group.tolist() == [0, 1, 0, 0]
    assert packed.input_ids.tolist() == [[1, 2, 3, 2, 2, 3], [7, 1, 2, 3, 0, 0]]
    assert packed.labels.tolist() == [[_, 3, 4, 5, 3, 6], [_, _, 3, 4, _, _]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 1, 2], [0, 1, 2, 3, 0, 0]]
    assert packed.sees[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    assert torch.equal(packed.sees[1, 0, :4, :4], torch.ones(4, 4).tril().bool())
    columns = [row[:end] for row, end in zip(packed.columns.tolist(), (3, 4, 2, 3), strict=True)]
    assert columns == [[0, 1, 2], [0, 1, 2, 3], [0, 3], [0, 4, 5]]


def test_answers_that_share_their_beginning_share_it():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 0]])
    read = (ids > 0).int()
    packed = pack(ids, read, ids.masked_fill(torch.tensor([[True, False, False, False]]) | (ids == 0), IGNORED))
    assert packed.input_ids.tolist() == [[1, 2, 3, 3]] and packed.labels.tolist() == [[2, 3, 4, 5]]
    assert packed.columns[:2].tolist() == [[0, 1, 2], [0, 1, 3]] and packed.columns[2, :2].tolist() == [0, 1]


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch):
    """A trainer of a family's tiny model, ours or, as its parent reads pairs, TRL's; called with more parameters."""

    def make(family, packed, attention="sdpa", rows=ROWS, **changes):
        given = a_run("dpo", tiny[family], tmp_path, **SETTINGS | {"max_steps": 2} | changes).parameters
        parts = trainer._parts(rows, given)
        parts["model"].set_attn_implementation(attention)
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr("atp_utils.training.exact_trainers.score_answers", lambda _: None)
            return trainer.ExactDPOTrainer(args=trainer.trl_arguments(tmp_path, rows, given), **parts)

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


def count_scored(monkeypatch):
    """A list that grows by the number of tokens that go through TRL's head, one entry a forward pass."""
    scored, fused = [], utils._ChunkedLogProbFunction.apply
    counted = SimpleNamespace(apply=lambda hidden, *rest: scored.append(len(hidden)) or fused(hidden, *rest))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", counted)
    return scored


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


def test_answers_much_longer_than_their_prompt_stay_in_rows_of_their_own(trained):
    rows = [{"prompt": "So?", "chosen": "Yes. " * 40, "rejected": "No. " * length} for length in (40, 20)]
    ours, trls = trained("qwen3", True, rows=rows), trained("qwen3", False, rows=rows)
    read = []
    ours.model.get_base_model().model.embed_tokens.register_forward_hook(lambda _, given, __: read.append(given[0]))
    (loss, gradients, _), (expected, all_expected, _) = (losses(found, range(2)) for found in (ours, trls))
    assert read[0].tolist() == ours.data_collator(list(ours.train_dataset))["input_ids"].tolist()
    assert loss == pytest.approx(expected, abs=1e-5)
    for name in all_expected:
        torch.testing.assert_close(gradients[name], all_expected[name], rtol=1e-4, atol=1e-5)


def test_what_a_pair_begins_with_is_read_once_and_only_answers_are_scored(trained, monkeypatch):
    found, read, scored = trained("qwen3", True), [], count_scored(monkeypatch)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_grpos_log_probabilities_entropies_and_gradients_are_trls(family, tiny, tmp_path, monkeypatch):
    prompts, replies = [[5, 6, 7, 8, 9, 10], [0, 0, 5, 6, 7, 8]], [[20, 21, 22], [20, 21, 0], [23, 24, 25]]
    # As TRL has them: prompts padded on the left, replies on the right, the rows of a batch in any order.
    ids = torch.tensor([prompts[one] + replies[other] for one, other in [(0, 0), (1, 1), (0, 2), (0, 1), (1, 0)]])
    given = a_run("grpo", tiny[family], tmp_path, **SETTINGS, max_steps=1, group_size=2, temperature=0.7).parameters
    rows = [{"prompt": "Hm.", "options": ["a", "b"], "compliant": "a", "prefill": ""}] * 2

    scored = count_scored(monkeypatch)

    def scores(shares):
        with monkeypatch.context() as patch:
            if not shares:
                patch.setattr("atp_utils.training.exact_trainers.score_answers", lambda _: None)
            arguments = trainer.trl_arguments(tmp_path, rows, given)
            found = trainer.ExactGRPOTrainer(args=arguments, reward_funcs=print, **trainer._parts(rows, given))
        weights = {name: part for name, part in found.model.named_parameters() if part.requires_grad}
        torch.manual_seed(1)
        for part in weights.values():
            part.data.normal_(std=0.1)
        logps, entropies, _ = found._get_per_token_logps_and_entropies(
            found.model, ids, (ids > 0).long(), 3, compute_entropy=True
        )
        (logps * torch.arange(1.0, 16).view(5, 3)).sum().backward()
        return [logps, entropies], {name: part.grad for name, part in weights.items()}

    ours, trls = scores(True), scores(False)
    # Of the second prompt one reply begins with the other.
    assert scored == [3 + 3 + 2 + 3, 5 * 8]
    for one, other in zip(ours[0], trls[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert max(part.abs().max() for part in trls[1].values()) > 1
    for name, part in trls[1].items():
        torch.testing.assert_close(ours[1][name], part, rtol=1e-4, atol=1e-4 * part.abs().max().item())


@pytest.fixture
def grpo(tiny, tmp_path, monkeypatch):
    """History, weights and number of tokens read of a training by GRPO, ours or TRL's, for a family and a reward."""

    def train(family, shares, reward):
        # Of unequal length, so that one is padded; a step is of two batches, over which TRL shuffles its replies.
        rows = [{"prompt": prompt} for prompt in ("Cedar or Willow? Say it:", "So?")]
        changes = {"batch_size": 1, "accumulation": 2, "group_size": 3, "max_new_tokens": 4, "warmup_ratio": 0}
        given = a_run("grpo", tiny[family], tmp_path, **SETTINGS | {"beta": 0.1, "max_steps": 2} | changes).parameters
        with monkeypatch.context() as patch:
            if not shares:
                for name in ("score_answers", "share_prefill"):
                    patch.setattr(f"atp_utils.training.exact_trainers.{name}", lambda _: None)
                patch.setattr("atp_utils.training.exact_trainers.in_order", lambda batches: batches)
            arguments = trainer.trl_arguments(tmp_path, rows, given)
            found = trainer.ExactGRPOTrainer(args=arguments, reward_funcs=reward, **trainer._parts(rows, given))
            read = []
            layers = found.model.get_base_model().model
            layers.embed_tokens.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
            found.train()
        weights = {name: part for name, part in found.model.named_parameters() if part.requires_grad}
        return [entry for entry in found.state.log_history if "loss" in entry], weights, sum(read)

    return train


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_grpo_samples_and_learns_what_trls_does_and_reads_each_prompt_once(family, grpo):
    def lengths(completions, log_metric, **_):
        return [float(len(text) % 5) for text in completions]

    (ours, weights, read), (trls, their_weights, all_read) = (grpo(family, shares, lengths) for shares in (True, False))
    assert len(ours) == len(trls) == 2 and read < 0.6 * all_read
    for one, other in zip(ours, trls, strict=True):
        for name in ("loss", "reward", "reward_std", "kl", "entropy", "grad_norm", "completions/mean_length"):
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-4), name
    assert trls[0]["reward_std"] > 0 and trls[1]["kl"] > 0
    for name, part in weights.items():
        torch.testing.assert_close(part, their_weights[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_group_has_a_reward_nothing_moves(family, grpo):
    # Adam makes a whole step of the smallest difference between policy and reference.
    history, weights, _ = grpo(family, True, lambda completions, **_: [1.0] * len(completions))
    assert [(entry["kl"], entry["grad_norm"]) for entry in history] == [(0, 0)] * 2
    assert not any(part.any() for name, part in weights.items() if "lora_B" in name)


def test_rows_go_back_to_their_places():
    batches = [
        {"place": torch.tensor(places), "ids": torch.tensor(places)[:, None] * 10, "all": torch.tensor(7), "no": None}
        for places in ([3, 0], [2, 1])
    ]
    first, second = in_order(batches)
    assert first["ids"].tolist() == [[0], [10]] and second["ids"].tolist() == [[20], [30]]
    assert second["place"].tolist() == [2, 3] and second["all"] == 7 and second["no"] is None


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
    assert can_share(SimpleNamespace(**config | changes)) is expected
