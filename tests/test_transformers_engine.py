"""The in-process engine on the embedded model, against the model called plainly."""

import math
from dataclasses import replace

import pytest
import torch

from atp_utils.engines.kv_cache import _chat_key
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution.requests import Sampling


@pytest.fixture(scope="module")
def exact(embedded):
    """In float32, so that only rounding of the last digits separates one batch shape from another."""
    return TransformersEngine(embedded, dtype=torch.float32)


def answers(engine, requests):
    replies = dict(engine.answer(requests))
    assert sorted(replies) == list(range(len(requests)))
    return [replies[index] for index in range(len(requests))]


@torch.inference_mode()
def plain_logprob(engine, request, option):
    """log P(option | chat), one full forward pass, no cache, no batch."""
    prompt = engine.tokenizer.apply_chat_template(
        list(request.messages), tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    answer = engine.tokenizer(option, add_special_tokens=False)["input_ids"]
    logits = engine.model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def test_scores_are_the_models_log_probabilities(exact, ask):
    turns = ('{"choice": "No"}', "Why not? It was rather good. Tell me once more.")
    requests = [
        ask("rain"),
        ask("the smell of freshly cut grass in the morning"),
        ask("rain", *turns),
        ask("tea", options=('{"choice": "Yes"}', '{"choice": "Absolutely not"}', '{"answer": 3}')),
    ]
    for request, reply in zip(requests, answers(exact, requests), strict=True):
        expected = [plain_logprob(exact, request, option) for option in request.options]
        assert reply.logprobs == pytest.approx(expected, abs=1e-3)
        # What the options share is a part of each; the rest are probabilities of different continuations.
        assert max(reply.logprobs) <= reply.shared + 1e-3 and reply.shared <= 0
        assert sum(math.exp(logprob - reply.shared) for logprob in reply.logprobs) <= 1 + 1e-3


def test_kept_conversations_cost_their_new_tokens_and_change_nothing(embedded, ask):
    first = [ask(subject) for subject in ("rain", "a long walk by the sea", "jam")]
    second = [
        ask(request.key.split("/")[1], f'{{"choice": "{said}"}}', heard)
        for request in first
        for said, heard in (("Yes", "Sure?"), ("No", "Why? Please think about it again."))
    ]
    outcomes, read = {}, {}
    for name, settings in {"kept": {}, "forgotten": {"cache_bytes": 0}, "one by one": {"batch_tokens": 1}}.items():
        engine = TransformersEngine(embedded, dtype=torch.float32, **settings)
        answers(engine, first)
        before = engine.forward_tokens
        outcomes[name] = [reply.logprobs for reply in answers(engine, second)]
        read[name] = engine.forward_tokens - before
    for name in ("forgotten", "one by one"):
        assert torch.allclose(torch.tensor(outcomes["kept"]), torch.tensor(outcomes[name]), atol=1e-3)
    assert read["kept"] == read["one by one"] < 0.75 * read["forgotten"]


def test_identical_chats_share_one_pass(embedded, ask):
    engine = TransformersEngine(embedded)
    replies = answers(engine, [ask("rain", seed=seed) for seed in range(40)])
    assert engine.answered == 1
    assert len({reply.logprobs for reply in replies}) == 1


def test_the_cache_is_bounded(embedded, ask):
    engine = TransformersEngine(embedded, cache_bytes=5e6)
    for number in range(6):
        answers(engine, [ask(f"number {number}")])
        assert engine._kept.bytes <= 5e6
        kept = [layer for _, layers in engine._kept.chats.values() for layer in layers]
        assert engine._kept.bytes == sum(layer.nbytes for layer in kept)
    assert 0 < len(engine._kept.chats) < 6


def test_only_chats_that_may_go_on_are_kept(embedded, ask):
    engine, last = TransformersEngine(embedded), replace(ask("snow"), extended=False)
    # Of equal chats one may go on.
    asked = [ask("rain"), last, replace(ask("jam", seed=1), extended=False), ask("jam", seed=2)]
    answers(engine, asked)
    kept = [request for request in asked if _chat_key(request.messages) in engine._kept.chats]
    assert len(engine._kept.chats) == 2 and last not in kept and len(kept) == 3
    assert last == ask("snow") and last.digest("model") == ask("snow").digest("model")


def free(request, seed=0, **settings):
    sampling = Sampling(**{"max_new_tokens": 12, **settings})
    return replace(request, options=(), seed=seed, sampling=sampling)


def test_greedy_text_is_the_models_own(exact, ask):
    requests = [free(ask(subject), temperature=0.0) for subject in ("rain", "the smell of cut grass", "jam")]
    for request, reply in zip(requests, answers(exact, requests), strict=True):
        inputs = exact.tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = exact.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected = exact.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert reply.text == expected
        assert 0 < reply.completion_tokens <= 12 and reply.finish_reason in ("stop", "length")


def test_sampled_text_depends_on_its_seed_alone(exact, ask):
    requests = [free(ask("rain"), seed) for seed in (1, 2, 3)] + [free(ask("the smell of cut grass"), 4)]
    together = answers(exact, requests)
    assert len({reply.text for reply in together[:3]}) == 3
    alone = TransformersEngine("smollm2-135m", dtype=torch.float32, cache_bytes=0)
    assert answers(alone, requests[3:1:-1]) == together[3:1:-1]
    alone.batch_tokens = 12  # two at a time, the others when one of them ends
    assert answers(alone, requests) == together


def test_a_chat_goes_on_from_its_generated_text(exact, ask):
    said = answers(exact, [free(ask("snow"), 5)])[0]
    request = ask("snow", said.text, "Answer yes or no.")
    before = exact.forward_tokens
    [reply] = answers(exact, [request])
    expected = [plain_logprob(exact, request, option) for option in request.options]
    assert reply.logprobs == pytest.approx(expected, abs=1e-3)
    assert exact.forward_tokens - before < reply.prompt_tokens


def test_top_k_1_is_greedy(exact, ask):
    greedy, narrow = answers(exact, [free(ask("rain"), temperature=0.0), free(ask("rain"), 9, top_k=1)])
    assert greedy.text == narrow.text
    assert math.isfinite(greedy.prompt_tokens)
