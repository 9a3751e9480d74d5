"""What the trainers read is what the engine reads: the template's own rendering, special tokens once."""

import pytest
from tiny_models import FAMILIES, STOPS
from trainings import a_run, rows_of

from atp_utils import models
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import DATE, Request, Sampling
from atp_utils.models.chat_template import render
from atp_utils.scenarios import role_play
from atp_utils.training import pairs, trainer
from atp_utils.training.exact_trainers import preference_ids

PROTOCOLS = ("choose", "reason")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


SETTINGS = {"scenario": "role_play", "max_steps": 1, "batch_size": 1, "lora_rank": 2, "max_new_tokens": 2}


class Seen(Exception):
    """Carries what a trainer was about to train on."""


@pytest.fixture
def read_by_trl(tiny, tmp_path, monkeypatch):
    """The ids of prompt, chosen and rejected (DPO), or of the prompt (GRPO), as TRL tokenises a row."""

    def dpo(self, **_):
        [row] = self.train_dataset
        raise Seen([row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")])

    def grpo(self, **_):
        raise Seen(self._tokenize_prompts(list(self.train_dataset["prompt"]))[0])

    def read(method, family, row):
        monkeypatch.setattr(trainer.ExactDPOTrainer, "train", dpo)
        monkeypatch.setattr(trainer.ExactGRPOTrainer, "train", grpo)
        run = a_run(method, tiny[family], tmp_path / method, **SETTINGS)
        with pytest.raises(Seen) as seen:
            trainer.fit(run.out, run.parameters, [row], print)
        return seen.value.args[0]

    return read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dpo_reads_the_chat_as_the_engine_does_and_the_turns_end(family, protocol, splits, tiny, tmp_path, read_by_trl):
    """Prompt, answer and stop token are the template's own rendering of the answered chat."""
    tokenizer, item = models.load_tokenizer(tiny[family]), splits[0][0]
    chat = role_play.SCENARIO.opening(item, Protocol(protocol))
    if protocol == "choose":
        row, _ = rows_of(a_run("dpo", tiny[family], tmp_path), [item])
    else:
        said = {"chosen": f"So {answer_json(item.compliant)}", "rejected": "So not."}
        row = {"prompt": render(tokenizer, chat), **said}
    prompt, chosen, rejected = read_by_trl("dpo", family, row)
    stop = tokenizer.convert_tokens_to_ids(STOPS[family][0])
    assert (chosen[-1], rejected[-1]) == (stop, stop)
    for ids, said in ((chosen, row["chosen"]), (rejected, row["rejected"])):
        answered = [*chat, {"role": "assistant", "content": said}]
        whole = tokenizer.apply_chat_template(answered, tokenize=False, date_string=DATE).rstrip("\n")
        assert tokenizer.decode(prompt + ids) == whole
    assert prompt == tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_grpo_reads_the_chat_as_the_engine_does(family, protocol, splits, tiny, tmp_path, read_by_trl):
    item = splits[0][0]
    row, _ = rows_of(a_run("grpo", tiny[family], tmp_path, protocol=protocol, prefill="", thinking=True), [item])
    options = tuple(map(answer_json, item.options)) if protocol == "choose" else ()
    asked = TransformersEngine(tiny[family])._row(
        Request("k", role_play.SCENARIO.opening(item, Protocol(protocol)), 0, options)
    )
    assert read_by_trl("grpo", family, row) == [asked.ids[: len(asked.ids) - asked.shared]]


@pytest.mark.parametrize("thinking", [False, True])
def test_written_pairs_keep_the_thinking_behind_the_prompt_of_the_evolution(
    thinking, splits, tiny, tmp_path, monkeypatch
):
    """The text that Qwen3's DPO trains on; today's default leaves the thinking out, and the prompt says so."""
    item, thought = splits[0][0], "<think>\nThe rule, or the money?\n</think>\n\n"
    written = ScriptedEngine(lambda request: f"{thought}So {answer_json(request.key.split('/')[2])}")
    monkeypatch.setattr(pairs, "open_engine", lambda *_, **__: written)
    given = {"pairs": "written", "protocol": "reason", "thinking": thinking}
    run = a_run("dpo", tiny["qwen3"], tmp_path / "adapter", **given)
    [row], counts = pairs.preference_rows(run, [item])
    assert counts == {"kept": 1, "without both replies": 0}
    kept = thought if thinking else ""
    assert row["chosen"] == f"{kept}So {answer_json(item.compliant)}"
    assert row["rejected"] == f"{kept}So {answer_json(item.deviant)}"
    engine = TransformersEngine(tiny["qwen3"])
    chat = role_play.SCENARIO.opening(item, Protocol("reason"))
    asked = engine._row(Request("r", chat, 0, sampling=Sampling(thinking=thinking)))
    ids = preference_ids(engine.tokenizer, row)
    # The evolution thinks by default: its very prompt is what the trained text begins with.
    assert ids["prompt_ids"] == asked.ids
    assert engine.tokenizer.decode(ids["chosen_ids"]) == row["chosen"] + STOPS["qwen3"][0]


def test_a_block_that_the_template_opens_is_not_opened_twice(splits, tiny, tmp_path, monkeypatch):
    item = splits[0][0]
    run = a_run("dpo", tiny["qwen3"], tmp_path / "adapter", pairs="written", protocol="reason", thinking=True)
    monkeypatch.setattr(pairs, "render", lambda *_: "user: ...\nassistant: <think>\n")
    replies = ScriptedEngine(lambda request: f"<think>\nHm.\n</think>\n{answer_json(request.key.split('/')[2])}")
    monkeypatch.setattr(pairs, "open_engine", lambda *_, **__: replies)
    [row], _ = pairs.preference_rows(run, [item])
    assert (row["prompt"] + row["chosen"]).count("<think>") == 1 and "Hm.\n</think>" in row["chosen"]


def test_bare_answers_have_no_thinking(tiny, tmp_path):
    with pytest.raises(ValueError, match="thinking must be false where pairs are answers"):
        a_run("dpo", tiny["qwen3"], tmp_path, thinking=True)
