"""A training that takes the answers away from the model is seen, stopped, and not taken for one."""

import json
import re

import pandas as pd
import pytest
from tiny_models import FAMILIES
from trainings import a_run, rows_of

from atp_utils import parameters
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution.protocol import Protocol, Question, decide
from atp_utils.runs import adapters
from atp_utils.scenarios import role_play
from atp_utils.training import collapse, trainer

FAST = {"learning_rate": 0.05, "warmup_ratio": 0, "lora_rank": 2, "batch_size": 2, "save_steps": 2, "dtype": "float32"}
STEPS = 12


def masses(engine, items):
    """What the evolution records for the two answers to each item, in either order."""
    protocol = Protocol("choose")
    prompts = [(item, turned) for item in items for turned in (False, True)]
    chats = [role_play.SCENARIO.opening(item, protocol, turned) for item, turned in prompts]
    options = [item.named(turned) for item, turned in prompts]
    asked = decide([Question((0,), *both) for both in zip(chats, options, strict=True)], protocol)
    requests = next(asked)
    replies = dict(engine.answer(requests))
    with pytest.raises(StopIteration) as end:
        asked.send([replies[place] for place in range(len(requests))])
    return [choice.mass for choice in end.value.value]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mass_is_that_of_the_evolutions_forced_choice(family, splits, tiny, tmp_path):
    items = splits[0][:3]
    run = a_run("dpo", tiny[family], tmp_path, **FAST | {"batch_size": 6, "max_steps": 1}, min_mass=0)
    log = trainer.adapter(run, "dpo", rows_of(run, items))
    expected = sum(masses(TransformersEngine(tiny[family], dtype="float32"), items)) / 6
    assert log["mass"][0] == pytest.approx(expected, rel=1e-3) and 0 < expected < 1


def test_written_replies_have_no_mass(splits, tiny, tmp_path):
    rows = rows_of(a_run("dpo", tiny["qwen3"], tmp_path), splits[0][:2])
    run = a_run("dpo", tiny["qwen3"], tmp_path / "out", **FAST, max_steps=1, pairs="written", min_mass=1)
    assert list(trainer.adapter(run, "dpo", rows)) == ["step", "loss", "margin", "accuracy"]


@pytest.fixture
def collapsing(splits, tiny, tmp_path):
    """A training so fast that the answers lose what they had; called with more parameters, and the folder's name."""

    def train(name="out", items=8, **changes):
        run = a_run(
            "dpo", tiny["qwen3"], tmp_path / name, **FAST | {"max_steps": STEPS, "learning_rate": 0.1} | changes
        )
        return trainer.adapter(run, "dpo", rows_of(run, splits[0][:items])[::2])

    return train


def test_a_collapse_stops_the_training_and_is_no_adapter(collapsing, tmp_path, monkeypatch):
    whole = collapsing("whole", min_mass=0)
    first, last = whole["mass"].head(3).mean(), whole["mass"].tail(3).mean()
    assert len(whole) == STEPS and last < first / 100
    out, least = tmp_path / "out", first / 2
    with pytest.raises(
        RuntimeError, match=r"out: after \d+ steps .* probability of .*learning_rate.*beta.*min_mass to 0"
    ):
        collapsing(min_mass=least)
    assert not (out / adapters.LOG).exists() and not (out / "manifest.json").exists()
    stopped = pd.read_csv(out / trainer.UNCHECKED)
    assert 3 < len(stopped) < STEPS and stopped["mass"].tail(3).mean() < least
    pd.testing.assert_frame_equal(stopped, whole.head(len(stopped)), check_dtype=False)
    # Asked again it is refused again, and nothing is paid twice.
    fit, calls = trainer.fit, []
    monkeypatch.setattr(trainer, "fit", lambda *given: calls.append(1) or fit(*given))
    with pytest.raises(RuntimeError, match="out: after"):
        collapsing(min_mass=least)
    assert not calls
    # Taken all the same it goes on where it was stopped, and is the training that it would have been.
    taken = collapsing(min_mass=0)
    assert calls == [1] and taken["loss"].tolist() == pytest.approx(whole["loss"].tolist(), abs=1e-4)
    assert json.loads((out / "manifest.json").read_text())["steps"] == STEPS
    assert not (out / trainer.UNCHECKED).exists() and not (out / trainer.CHECKPOINTS).exists()
    # A finished adapter doesn't pass where more is asked of it.
    with pytest.raises(RuntimeError, match=re.escape(f"below min_mass {least:g}")):
        collapsing(min_mass=least)


def test_a_whole_training_that_was_refused_is_taken_as_it_is(collapsing, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="small from the start.*another model"):
        collapsing(min_mass=1, max_steps=2)
    monkeypatch.setattr(trainer, "fit", None)
    assert len(collapsing(min_mass=0, max_steps=2)) == 2
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["min_mass"] == 0


def test_a_training_can_stop_once_all_pairs_are_apart(collapsing):
    log = collapsing(items=1, min_mass=0, stop_margin=0.5)
    assert 3 <= len(log) < STEPS
    assert (log["margin"].tail(3) > 0.5).all() and (log["accuracy"].tail(3) == 1).all()


@pytest.mark.parametrize("ends", [{"stop_margin": 0.5, "items": 1}, {"max_steps": 3}], ids=["margin", "last step"])
def test_an_ended_training_whose_adapter_could_not_be_written_is_not_trained_further(
    collapsing, tmp_path, monkeypatch, ends
):
    whole = collapsing("whole", min_mass=0, **ends)
    save = trainer.ExactDPOTrainer.save_model

    def full(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            raise OSError("No space left on device")
        save(self, output_dir, _internal_call)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(trainer.ExactDPOTrainer, "save_model", full)
        collapsing(min_mass=0, **ends)
    pd.testing.assert_frame_equal(collapsing(min_mass=0, **ends), whole)
    weights = [(tmp_path / name / adapters.WEIGHTS).read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def log_of(*mass, margin=0.1, accuracy=1.0):
    return pd.DataFrame({"step": range(1, len(mass) + 1), "margin": margin, "accuracy": accuracy, "mass": mass})


@pytest.mark.parametrize(
    ("log", "given", "ended"),
    [
        (log_of(0.9, 0.9, 0.9, 0.4, 0.4), {}, False),
        (log_of(0.9, 0.9, 0.9, 0.4, 0.4, 0.4), {}, True),
        (log_of(0.9, 0.9, 0.9, 0.4, 0.4, 0.4), {"min_mass": 0}, False),
        # Small from the start: it may rise.
        (log_of(0.1, 0.1, 0.1, 0.1, 0.05, 0.06), {}, False),
        (log_of(0.1, 0.1, 0.1, 0.04, 0.04, 0.04), {}, True),
        (log_of(0.1, 0.1, 0.1), {}, False),
        (log_of(*[0.9] * 9), {}, False),
        (log_of(*[0.9] * 10), {}, True),
        (log_of(*[0.9] * 3, margin=2.0), {"stop_margin": 1.0}, True),
        (log_of(*[0.9] * 3, margin=2.0), {"stop_margin": 3.0}, False),
        (log_of(*[0.9] * 2, margin=2.0), {"stop_margin": 1.0}, False),
        (log_of(*[0.9] * 3, margin=2.0, accuracy=[1.0, 0.9, 1.0]), {"stop_margin": 1.0}, False),
        (log_of()[["step"]], {}, False),
    ],
)
def test_when_a_training_of_ten_steps_has_ended(log, given, ended):
    assert bool(collapse.ended(log, parameters.Dpo(**given), 10)) is ended


def test_grpo_ends_with_its_last_step():
    log = pd.DataFrame({"step": [1, 2], "reward": [0.0, 0.0]})
    assert not collapse.ended(log, parameters.Grpo(), 3) and collapse.ended(log, parameters.Grpo(), 2)
    assert not collapse.low(log, parameters.Grpo())
