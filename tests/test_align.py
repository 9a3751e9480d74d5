import json

import pandas as pd
import pytest
from trainings import a_run, rows_of

from atp_utils import models
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Sampling
from atp_utils.scenarios import preferences, role_play
from atp_utils.training import pairs, trainer

SETTINGS = {
    "learning_rate": 1e-3, "epochs": 1, "max_steps": 2, "batch_size": 2, "accumulation": 1, "beta": 0.1,
    "lora_rank": 2, "seed": 0, "save_steps": 1,
}  # fmt: skip


def test_rewards_are_the_papers(item):
    def reward(text):
        return preferences.choice_reward(text, item.options, item.compliant)

    assert reward(answer_json(item.compliant)) == 1.0
    assert reward(f"Well: {answer_json(item.deviant)}") == 0.1
    assert reward(item.compliant) == 0.0
    assert reward(answer_json(item.compliant) + answer_json(item.deviant)) == 0.0
    rows = [{"options": list(item.options), "compliant": item.compliant, "prefill": '{"choice": "'}] * 2
    texts = [f'{item.compliant}"}} and', f"{item.compliant}, then"]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    logged = {}
    assert preferences.rewards(texts, **columns, prompts=["", ""], log_metric=logged.__setitem__) == [1.0, 0.0]
    assert logged == {"valid": 0.5}


def test_pairs_prefer_the_rule_and_have_no_history(splits, embedded, tmp_path):
    rows = rows_of(a_run("dpo", embedded, tmp_path), splits[0])
    assert len(rows) == 320
    for one, other, item in zip(rows[::2], rows[1::2], splits[0], strict=True):
        for row in (one, other):
            assert row["chosen"] == answer_json(item.compliant) and row["rejected"] == answer_json(item.deviant)
            assert item.prompt in row["prompt"] and "You chose to" not in row["prompt"]
        assert [named_first(row, item) for row in (one, other)] == list(item.options)


def named_first(row, item):
    return min(item.options, key=lambda option: row["prompt"].rindex(answer_json(option)))


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("history", [0, 2])
def test_rows_of_both_methods_come_in_both_orders_behind_the_history_that_was_asked(
    splits, embedded, tmp_path, method, history
):
    items = splits[0][:3]
    rows = rows_of(a_run(method, embedded, tmp_path, history_pairs=history), items)
    assert len(rows) == 6
    for place, row in enumerate(rows):
        item = items[place // 2]
        assert named_first(row, item) == item.options[place % 2]
        assert row["prompt"].count("You chose to") == row["prompt"].count("This kept the rule.") == history
        if method == "grpo":
            assert row["options"] == list(item.options) and row["compliant"] == item.compliant


@pytest.mark.parametrize("name", ["collusion", "tool_use"])
def test_a_history_before_training_prompts_is_role_plays_alone(embedded, tmp_path, name):
    run = a_run("grpo", embedded, tmp_path, scenario=name, history_pairs=1)
    with pytest.raises(ValueError, match=f"{name} has no training prompts with a history: history_pairs must be 0"):
        rows_of(run, pairs.training_items(run, "grpo")[:1])


@pytest.mark.parametrize("name", ["collusion", "tool_use"])
def test_written_pairs_behind_a_history_are_role_plays_alone(embedded, tmp_path, monkeypatch, name):
    changes = {"scenario": name, "history_pairs": 1, "pairs": "written", "protocol": "reason"}
    run = a_run("dpo", embedded, tmp_path / "out", **changes)
    asked = []
    monkeypatch.setattr(pairs, "open_engine", lambda *_, **__: ScriptedEngine(lambda request: asked.append(request)))
    with pytest.raises(ValueError, match=f"{name} has no training prompts with a history: history_pairs must be 0"):
        rows_of(run, pairs.training_items(run, "dpo")[:1])
    assert not asked


def test_elicited_pairs_leave_the_added_instruction_out(splits, tmp_path):
    items = splits[0][:2]
    protocol = Protocol("reason", max_attempts=2, sampling=Sampling(max_new_tokens=20))

    def rule(request):
        # Follows the added instruction, but never breaks the rule of the second item, and fumbles once.
        _, item_id, option, _, attempt = request.key.split("/")
        wanted = items[1].compliant if item_id == items[1].id else option
        assert f"choose {option}." in request.messages[-1]["content"]
        fumbles = (item_id, option, attempt) == (items[0].id, items[0].deviant, "attempt0")
        return "Hm." if fumbles else f"I reason. {answer_json(wanted)}"

    episodes = [preferences.elicitation(item, role_play.SCENARIO.opening, protocol, 0) for item in items]
    with Journal(tmp_path) as journal:
        found = loop.run_all(episodes, ScriptedEngine(rule), journal)
    assert journal.paid == 3 + 3
    assert found[1]["rejected"] is None and found[1]["chosen"]
    [row], counts = preferences.elicited_pairs(found)
    assert counts == {"kept": 1, "without both replies": 1}
    assert row["chosen"] == f"I reason. {answer_json(items[0].compliant)}"
    assert row["rejected"] == f"I reason. {answer_json(items[0].deviant)}"
    assert row["messages"] == role_play.SCENARIO.opening(items[0], protocol)


def test_nothing_to_train_on(tmp_path, embedded):
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer.adapter(a_run("dpo", embedded, tmp_path / "dpo"), "dpo", [])


class Killed(RuntimeError):
    pass


def test_dpo_trains_resumes_and_is_not_repeated(splits, embedded, tmp_path, monkeypatch):
    rows = rows_of(a_run("dpo", embedded, tmp_path), splits[0][:4])
    whole = trainer.adapter(a_run("dpo", embedded, tmp_path / "whole", **SETTINGS), "dpo", rows)
    assert list(whole.columns) == ["step", "loss", "margin", "accuracy", "mass"] and list(whole["step"]) == [1, 2]
    assert whole["loss"][0] == pytest.approx(0.6931, abs=1e-3)

    def killer(self, args, state, control, **_):
        if state.global_step == 1:
            raise Killed

    out = tmp_path / "broken"
    run = a_run("dpo", embedded, out, **SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer._Steps, "on_save", killer, raising=False)
        trainer.adapter(run, "dpo", rows)
    assert not (out / "manifest.json").exists()
    resumed = trainer.adapter(run, "dpo", rows)
    assert resumed["loss"].tolist() == pytest.approx(whole["loss"].tolist(), abs=2e-3)

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["learning_rate"] == 1e-3 and manifest["steps"] == 2
    assert len(manifest["made_of"]["weights"]) == len(manifest["sha256"]) == 64 and manifest["seconds"] > 0
    models.check_adapter(out, embedded)
    assert not (out / "checkpoints").exists()

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer, "ExactDPOTrainer", never)
    monkeypatch.setattr(trainer, "made_by", lambda: {"commit": "a later one"})
    # Snakemake removes a job's output before it runs the job again.
    (out / "manifest.json").unlink()
    pd.testing.assert_frame_equal(trainer.adapter(run, "dpo", rows), resumed)
    assert json.loads((out / "manifest.json").read_text()) == manifest

    # Another training, other rows or other code don't take its place unless they are told to, and lose nothing then.
    with pytest.raises(FileExistsError, match="beta: '0.1', asked '0.2'"):
        trainer.adapter(a_run("dpo", embedded, out, **SETTINGS | {"beta": 0.2}), "dpo", rows)
    with pytest.raises(FileExistsError, match="rows_sha256"):
        trainer.adapter(run, "dpo", rows[:3])
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match="code: "):
        patch.setattr(trainer, "code_of", lambda *_: "edited")
        trainer.check(run, "dpo")
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AssertionError, match="trained again"):
        trainer.adapter(a_run("dpo", embedded, out, **SETTINGS | {"beta": 0.2}, overwrite=True), "dpo", rows)
    assert (tmp_path / ".replaced-broken-1/adapter_model.safetensors").read_bytes() == before


def test_grpo_trains_on_what_the_reward_says(splits, embedded, tmp_path):
    rows = rows_of(a_run("grpo", embedded, tmp_path), splits[0][:4])
    assert all(row["prompt"].endswith('assistant\n{"choice": "') for row in rows)
    changes = SETTINGS | {"max_steps": 1, "batch_size": 1, "group_size": 4, "max_new_tokens": 4, "beta": 0.04}
    log = trainer.adapter(a_run("grpo", embedded, tmp_path, **changes), "grpo", rows)
    assert list(log.columns) == ["step", "loss", "reward", "valid", "kl", "dead_groups"]
    assert 0 <= log["reward"][0] <= log["valid"][0] <= 1 and log["dead_groups"][0] in (0, 1)
    models.check_adapter(tmp_path, embedded)
