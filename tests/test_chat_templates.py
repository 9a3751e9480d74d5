"""The chat templates of Qwen3 and Llama 3.1: what a model reads over several rounds, and what comes back."""

import json
import re
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, STOPS, template

from atp_utils import models
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import answer_json, ends_thinking, parse_choice, split_thinking
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import DATE, Request, Sampling
from atp_utils.models.chat_template import render
from atp_utils.sandbox import ToolResult
from atp_utils.scenarios import collusion, role_play
from atp_utils.scenarios.collusion.items import make_grid, read_games
from atp_utils.scenarios.role_play.items import make_items, read_environments
from atp_utils.scenarios.tool_use import episodes as tool_use
from atp_utils.scenarios.tool_use import items as tool_items
from atp_utils.scenarios.tool_use.calls import read_answer

SCENARIOS = ("role_play", "collusion", "tool_use")
PROTOCOLS = ("choose", "reason")
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def make(tiny):
    """An engine in float32, so that only the last digits tell one batch shape from another."""
    return lambda family, **settings: TransformersEngine(tiny[family], dtype=torch.float32, **settings)


def by_hand(family, messages, thinking):
    """The documented formats, written out: ChatML with Qwen3's empty block, Llama's headers and date block."""
    if family == "qwen3":
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join(turns) + "<|im_start|>assistant\n" + ("" if thinking else EMPTY)
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
    texts = [dates + messages[0]["content"]] + [m["content"] for m in messages[1:]]
    heads = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in [m["role"] for m in messages]]
    turns = [f"{head}{text}<|eot_id|>" for head, text in zip(heads, texts, strict=True)]
    return "<|begin_of_text|>" + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def episodes(scenario, protocol, **ways):
    """Two short episodes of a scenario that feeds every reply back."""
    if scenario == "role_play":
        items, own = make_items(read_environments())[1][:2], role_play
        given = role_play.Evolution(rounds=3)
    if scenario == "collusion":
        items, own = make_grid(read_games()[:2], agents=2, thresholds=[2], payoffs=[[1.2, 1.0, 0.8]]), collusion
        given = collusion.Evolution(rounds=3, agents=2, **ways)
    if scenario != "tool_use":
        return [own.SCENARIO.episode(item, given, protocol, 0) for item in items]
    drawn = [tool_items.draw_problems(kind, 12)[0] for kind in ("simple", "complex")]
    items = [item for part in drawn for item in tool_items.make_items(part, test=6)[1]]
    setting = tool_items.Evolution(rounds=2, simple_per_round=2, complex_per_round=2)
    tool = {"run_tool": lambda code: ToolResult("ok", "1\n", "", 0.0)}
    return [tool_use.episode(items, setting=setting, seed=seed, protocol=protocol, **tool) for seed in (0, 1)]


def an_answer(request):
    """A valid end of a free reply to ``request``: one of the options that it names, else a tool call, then a number."""
    last = request.messages[-1]["content"]
    options = re.findall(r'\{"choice": "[^"]+"\}', last)
    if options:
        return options[request.seed % len(options)]
    return "\\boxed{1}" if "The tool printed" in last else "<tool>\nprint(1)\n</tool>"


class Listening:
    """An engine that notes what it is asked and what it replies, and may alter what the episode gets to see."""

    def __init__(self, engine, alter=lambda request, reply: reply):
        self.engine, self.identity, self.alter = engine, engine.identity, alter
        self.heard = []

    def answer(self, requests):
        for index, reply in self.engine.answer(requests):
            self.heard.append((requests[index], reply))
            yield index, self.alter(requests[index], reply)


def thoughtful(request):
    return [0.5, 0.5] if request.options else f"<think>\nA secret.\n</think>\n\nSo: {an_answer(request)}"


def play(scenario, protocol, engine, tmp_path, **ways):
    engine = Listening(engine) if isinstance(engine, ScriptedEngine) else engine
    with Journal(tmp_path) as journal:
        rows = loop.run(episodes(scenario, protocol, **ways), engine, journal)
    return rows, engine.heard


# --- what the model reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_prompts_are_the_templates_own_for_the_history_without_thinking(family, scenario, protocol, make, tmp_path):
    rows, heard = play(scenario, Protocol(protocol), ScriptedEngine(thoughtful), tmp_path)
    assert all(row.valid for row in rows)
    engine = make(family)
    assert any(message["role"] == "assistant" for request, _ in heard for message in request.messages)
    for request, _ in heard:
        thinking = protocol == "reason" or not request.options
        expected = by_hand(family, request.messages, thinking)
        assert "secret" not in expected
        row = engine._row(request)
        shared = request.options[0][: len(engine.tokenizer.decode(row.ids)) - len(expected)] if request.options else ""
        assert engine.tokenizer.decode(row.ids) == expected + shared
        assert row.ids[: len(row.ids) - row.shared] == engine.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert row.ids.count(engine.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == (family == "llama3_1")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kept_thinking_reaches_its_author_in_plain_words(family, scenario, make, tmp_path):
    _, heard = play(scenario, Protocol("reason", keep_thinking=True), ScriptedEngine(thoughtful), tmp_path)
    tokenizer = make(family).tokenizer
    for request, _ in heard:
        text = render(tokenizer, request.messages, True)
        said = [message["content"] for message in request.messages if message["role"] == "assistant"]
        assert all(turn.startswith("A secret.\n\nSo: ") for turn in said)
        assert text.count("A secret.") == len(said) and "think>" not in text
        assert text == by_hand(family, request.messages, True)
    assert any(message["role"] == "assistant" for request, _ in heard for message in request.messages)


def test_kept_thinking_stays_hidden_from_the_other_agents(tmp_path):
    protocol = Protocol("reason", keep_thinking=True)
    _, heard = play("collusion", protocol, ScriptedEngine(thoughtful), tmp_path, visibility="full replies")
    told = [message["content"] for request, _ in heard for message in request.messages if message["role"] == "user"]
    assert any("So: {" in text for text in told) and not any("secret" in text for text in told)


def test_the_day_is_not_in_the_prompt(family, tiny, tmp_path, monkeypatch):
    """Llama 3.1's template has a fixed date unless it is given one; that of 3.2 asks the clock."""
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    tokenizer = models.load_tokenizer(retold(tiny[family], tmp_path / "newer", template("llama3_2")))
    assert "03 Feb 2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert f"Today Date: {DATE}\n" in render(tokenizer, messages)
    own = models.load_tokenizer(tiny[family])
    plain = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert render(own, messages) == plain


def retold(folder, target, chat_template):
    """A copy of a model with another chat template."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(chat_template)
    return str(target)


# --- scores and texts ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def plain_score(engine, prompt, option):
    """log P(option | prompt): one forward pass over the text as a whole, no cache, no batch."""
    ids, answer = (engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, option))
    logits = engine.model(torch.tensor([ids + answer])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer))


def test_options_are_scored_behind_the_templates_generation_prompt(family, make, item):
    engine, chat = make(family), role_play.SCENARIO.opening(item, Protocol("choose"))
    options = tuple(map(answer_json, item.options))
    [(_, reply)] = engine.answer([Request("k", chat, 0, options)])
    prompt = by_hand(family, chat, thinking=False)
    assert reply.logprobs == pytest.approx([plain_score(engine, prompt, option) for option in options], abs=1e-4)
    # The test can fail: behind another prompt the scores are others.
    other = prompt.removesuffix(EMPTY) if family == "qwen3" else prompt.replace(DATE, "27 Jul 2024")
    assert abs(plain_score(engine, other, options[0]) - reply.logprobs[0]) > 0.01


def test_an_answer_has_the_same_tokens_alone_and_behind_its_prompt(family, tiny, item):
    """Training tokenises prompt and answer as one text, scoring one behind the other."""
    tokenizer = models.load_tokenizer(tiny[family])
    for protocol in map(Protocol, PROTOCOLS):
        prompt = render(tokenizer, role_play.SCENARIO.opening(item, protocol), protocol.name == "reason")
        for option in map(answer_json, item.options):
            apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, option)]
            assert tokenizer(prompt + option, add_special_tokens=False)["input_ids"] == apart[0] + apart[1]


def finish(request, reply):
    """Give garbage a readable end: in thinking that the template will drop, or in an answer that stays."""
    if request.options:
        return reply
    body = f"<think>{reply.text}</think>\n\n" if request.seed % 2 else f"{reply.text} "
    return replace(reply, text=body + an_answer(request))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kept_conversations_change_nothing_where_templates_rewrite_earlier_turns(
    family, scenario, protocol, make, tmp_path
):
    sampling = Sampling(max_new_tokens=10, temperature=0.6, top_p=0.95, top_k=20)
    kept, fresh = make(family), make(family, cache_bytes=0, batch_tokens=1)
    _, heard = play(scenario, Protocol(protocol, 2, sampling), Listening(kept, finish), tmp_path)
    assert any(len(request.messages) > 2 for request, _ in heard)
    for request, reply in heard:
        [(_, again)] = fresh.answer([request])
        assert again.text == reply.text and again.completion_tokens == reply.completion_tokens
        if request.options:
            assert reply.logprobs == pytest.approx(again.logprobs, abs=1e-4)
    assert kept.forward_tokens < 0.9 * fresh.forward_tokens


@torch.inference_mode()
def greedy(engine, prompt, count):
    """The model's most likely continuation, token by token, up to any of its stop tokens."""
    ids, new = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"], []
    stops = engine.model.generation_config.eos_token_id
    while len(new) < count and not (new and new[-1] in stops):
        new.append(int(engine.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return engine.tokenizer.decode(new, skip_special_tokens=True)


def test_the_models_own_sampling_settings_are_not_mixed_in(family, make, item):
    engine, chat = make(family), role_play.SCENARIO.opening(item, Protocol("reason"))
    assert engine.model.generation_config.do_sample and engine.model.generation_config.temperature == 0.6
    [(_, reply)] = engine.answer([Request("k", chat, 0, sampling=Sampling(12, temperature=0))])
    assert reply.text == greedy(engine, by_hand(family, chat, thinking=True), 12) != ""


def test_any_of_the_models_stop_tokens_ends_a_reply(family, make, item):
    engine, chat = make(family), role_play.SCENARIO.opening(item, Protocol("reason"))
    ids = engine.tokenizer(by_hand(family, chat, thinking=True), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        state = engine.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    weight = engine.model.lm_head.weight
    for name in STOPS[family]:
        stop, before = engine.tokenizer.convert_tokens_to_ids(name), weight.detach().clone()
        with torch.no_grad():
            weight[stop] = 10 * state
        [(_, reply)] = engine.answer([Request(name, chat, 0, sampling=Sampling(5, temperature=0))])
        with torch.no_grad():
            weight.copy_(before)
        assert (reply.text, reply.completion_tokens, reply.finish_reason) == ("", 1, "stop"), name


# --- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "thinking", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a </think> b </think>c", "a  b", "c"),
        ("<think>a</think>b<think>c</think>d", "ac", "bd"),
        ("<think>a</think>b<think>c", "ac", "b"),
        ("<THINK>a</Think>b", "a", "b"),
        ("a</THINK>b", "a", "b"),
        ("b", "", "b"),
    ],
)
def test_thinking_and_answer_hold_no_marks(reply, thinking, answer, tiny):
    assert split_thinking(reply) == (thinking, answer)
    # A mark left in the answer would make Qwen3's template delete what stands before it.
    tokenizer = models.load_tokenizer(tiny["qwen3"])
    chat = [("user", "U"), ("assistant", answer), ("user", "V")]
    text = render(tokenizer, [{"role": role, "content": content} for role, content in chat])
    assert f"assistant\n{answer}<|im_end|>" in text


CUT = [
    '<think>I take {"choice": "A"}',
    '{"choice": "A"} But wait.<think>Or rather',
    '<think>x</think>{"choice": "A"}<think>',
    'the prompt opened it</think>{"choice": "A"}<think>hm',
]


@pytest.mark.parametrize("reply", CUT)
def test_a_reply_that_ends_in_thinking_has_no_answer(reply):
    assert ends_thinking(reply) and parse_choice(reply, ("A", "B")) is None
    assert parse_choice(f'{reply}</think>{{"choice": "A"}}', ("A", "B")) == "A"
    assert read_answer(reply.replace('{"choice": "A"}', "\\boxed{1}"), cut=True) is None


def test_a_block_that_the_prompt_opens_is_in_the_reply(tiny, tmp_path, item):
    """As Qwen3.5's template does: cut off, such a reply would have no mark of thinking at all."""
    engine = TransformersEngine(retold(tiny["qwen3"], tmp_path / "model", template("qwen3_5_think")))
    chat = role_play.SCENARIO.opening(item, Protocol("reason"))
    assert render(engine.tokenizer, chat, True).endswith("assistant\n<think>\n")
    [(_, reply)] = engine.answer([Request("k", chat, 0, sampling=Sampling(6))])
    assert reply.text.startswith("<think>") and reply.finish_reason == "length"
    assert parse_choice(reply.text + answer_json(item.compliant), item.options) is None
    [(_, scored)] = engine.answer([Request("k", chat, 0, tuple(map(answer_json, item.options)))])
    assert len(scored.logprobs) == 2


def test_options_are_not_scored_as_thoughts(tiny, tmp_path, item):
    engine = TransformersEngine(retold(tiny["qwen3"], tmp_path / "model", template("deepseek_r1_distill")))
    chat = role_play.SCENARIO.opening(item, Protocol("choose"))
    with pytest.raises(ValueError, match="can't switch thinking off; take protocol reason"):
        list(engine.answer([Request("k", chat, 0, tuple(map(answer_json, item.options)))]))


def test_the_tiny_models_stop_where_the_families_do(family, tiny):
    settings = json.loads((Path(tiny[family]) / "generation_config.json").read_text())
    tokenizer = models.load_tokenizer(tiny[family])
    assert tokenizer.convert_ids_to_tokens(settings["eos_token_id"]) == list(STOPS[family])
    assert tokenizer.eos_token == STOPS[family][0] and settings["temperature"] == 0.6
