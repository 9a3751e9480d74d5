"""Kept prefixes in models whose layers see a window only, against one plain pass of the model over one chat."""

import json
import math
import os
from dataclasses import replace

import pytest
import tiny_models
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations import sdpa_attention

from atp_utils.engines.kv_cache import ROOM, SHARED_HEADS, GrowingCache, check_attention
from atp_utils.engines.next_token import draw
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution.requests import Request, Sampling
from atp_utils.models.chat_template import render, tokenised

WINDOW = 32
OPTIONS = ('{"choice": "A"}', '{"choice": "Brimstone"}')
SHAPE = {key: value for key, value in tiny_models.SIZES.items() if key != "tie_word_embeddings"}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SHARED = {
    "num_kv_shared_layers": 1,
    "num_hidden_layers": 4,
    "vocab_size_per_layer_input": 2000,
    "intermediate_size": 128,
}
SHARED |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 2, "sliding_window": None}
WINDOWED = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_oss": EXPERTS,
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama": {},
    "gemma3n_text": SHARED,
    "gemma4_text": SHARED | {"global_head_dim": 32},
    "deepseek_v3": LATENT,
}
# Their layers' keys and values differ in shape: nothing is kept, and each round is read whole.
UNKEPT = ("gemma4_text", "deepseek_v3")
STATEFUL = ("qwen3_next", "lfm2", "mamba", "mamba2", "jamba", "falcon_h1", "recurrent_gemma", "qwen3_5_text", "zamba2")


def save(folder, kind, generation=None, **settings):
    """A tiny random model of ``kind`` with Qwen3's tokenizer; settings that the kind doesn't have are ignored."""
    tokenizer = tiny_models._qwen3_tokenizer()
    tokenizer.chat_template = tiny_models.template("qwen3")
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = SHAPE | marks | {"vocab_size": len(tokenizer), "sliding_window": WINDOW} | settings
    if kind == "llama":
        del shape["sliding_window"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32)
    if generation:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **generation)
    # transformers refuses to save a model with some of the settings that published ones have.
    suggested, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(suggested.to_diff_dict()))
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.inference_mode()
def plain_scores(engine, request):
    prompt, options = tokenised(engine.tokenizer, request.messages, request.options)
    found = []
    for option in options:
        logits = engine.model(torch.tensor([prompt + option]), use_cache=False).logits[0].float().log_softmax(-1)
        found.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(option)))
    return found


def chat(*turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return Request("key", messages, 0, OPTIONS)


FIRST = [chat("Hi."), chat("Hello there, and so on. " * 6), chat("Hm?")]
# Kept and new tokens of unequal length, one chat that is new, one that is much longer than the window.
SECOND = [
    chat("Hi.", OPTIONS[0], "Once more, please."),
    chat("Hello there, and so on. " * 6, OPTIONS[1], "And again? " * 20),
    chat("Hm?", OPTIONS[0], "And? " * 9, OPTIONS[1], "?"),
    chat("All new. " * 12),
]


@pytest.mark.parametrize("kind", WINDOWED)
def test_later_rounds_are_scored_as_by_a_plain_pass(kind, tmp_path):
    engine = TransformersEngine(save(tmp_path, kind, **WINDOWED[kind]), dtype=torch.float32)
    window = getattr(engine.model.config, "sliding_window", None)
    assert window == (None if kind in ("llama", "deepseek_v3") else WINDOW)
    for requests in (FIRST, SECOND):
        replies = dict(engine.answer(requests))
        for index, request in enumerate(requests):
            assert replies[index].logprobs == pytest.approx(plain_scores(engine, request), abs=1e-4)
    assert len(engine._kept.chats) == (0 if kind in UNKEPT else len(FIRST) + len(SECOND))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt_oss"])
def test_later_rounds_are_written_as_by_a_plain_pass(kind, tmp_path):
    engine = TransformersEngine(save(tmp_path, kind, **WINDOWED[kind]), dtype=torch.float32)
    list(engine.answer(FIRST))
    greedy = [replace(request, options=(), sampling=Sampling(8, temperature=0)) for request in SECOND]
    replies = dict(engine.answer(greedy))
    for index, request in enumerate(greedy):
        ids = engine.tokenizer(render(engine.tokenizer, request.messages, True), add_special_tokens=False)["input_ids"]
        new = []
        while len(new) < 8 and not set(new) & set(engine._stop_ids):
            with torch.inference_mode():
                new.append(int(engine.model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
        assert replies[index].text == engine.tokenizer.decode(new, skip_special_tokens=True)
        assert replies[index].completion_tokens == len(new)


@torch.inference_mode()
def plainly_written(engine, request):
    """Token by token, one chat alone, the whole of it read anew for each token."""
    text = render(engine.tokenizer, request.messages, True)
    ids, new = engine.tokenizer(text, add_special_tokens=False)["input_ids"], []
    generator = torch.Generator().manual_seed(request.seed)
    while len(new) < request.sampling.max_new_tokens and not set(new) & engine._stop_ids:
        logits = engine.model(torch.tensor([ids + new]), use_cache=False).logits[:, -1].float()
        new += draw(logits, request.sampling, [generator])
    stopped = new[-1] in engine._stop_ids
    text = engine.tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True)
    return text, len(new), "stop" if stopped else "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "deepseek_v3"])
def test_chats_that_leave_and_join_are_written_as_alone(kind, temperature, tmp_path, monkeypatch):
    folder = save(tmp_path, kind, **WINDOWED[kind])
    engine = TransformersEngine(folder, dtype=torch.float32, batch_tokens=90)
    # A random model would hardly ever end.
    engine._stop_ids = set(range(0, len(engine.tokenizer), 9))
    sizes, forward = [], engine._forward
    monkeypatch.setattr(engine, "_forward", lambda ids, *rest: sizes.append(len(ids)) or forward(ids, *rest))
    sampling = Sampling(24, temperature=temperature)
    first = [chat(f"{number}. " + "Hm? " * (5 * number % 17)) for number in range(12)]
    asked = [replace(one, options=(), seed=seed, sampling=sampling) for seed, one in enumerate(first)]
    for _ in range(2):
        replies, steps = {}, []
        sizes.clear()
        for index, reply in engine.answer(asked):
            replies[index] = reply
            steps.append(len(sizes))
        for index, request in enumerate(asked):
            reply = replies[index]
            assert (reply.text, reply.completion_tokens, reply.finish_reason) == plainly_written(engine, request)
        # Replies are handed out when they end; not all chats are in one batch, nor does each wait for the one before.
        lengths = [reply.completion_tokens for reply in replies.values()]
        assert max(sizes) < len(asked) and len(sizes) < sum(lengths) and len(set(steps)) > 3
        turns = [{"role": "assistant", "content": ""}, {"role": "user", "content": "And?"}]
        asked = [
            replace(request, messages=[*request.messages, turns[0] | {"content": replies[index].text}, turns[1]])
            for index, request in enumerate(asked)
        ]


def test_the_last_rows_take_the_places_of_those_that_left():
    def filled(cache, numbers, tokens):
        states = torch.tensor(numbers, dtype=torch.float)[:, None, None, None].expand(-1, 2, tokens, 3).clone()
        return cache.update(states, -states, 0)

    cache, other = GrowingCache(), GrowingCache()
    filled(cache, [0, 1, 2, 3, 4], 6)
    assert cache.leave([True, False, False, True, False], 4) == [4, 1, 2]
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[4] * 4, [1] * 4, [2] * 4] and cache.get_seq_length() == 4
    cache.layers[0]._buffers[0][3:] = math.nan  # memory that nobody wrote
    filled(other, [7, 8, 9], 2)
    cache.join(other)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys[:, 0, :, 0].tolist() == [[4] * 4, [1] * 4, [2] * 4, *([0, 0, n, n] for n in (7, 8, 9))]
    assert torch.equal(keys, -values)
    grown, _ = filled(cache, [5] * 6, 200)
    assert torch.equal(grown[..., :4, :], keys) and bool((grown[..., 4:, :] == 5).all())


def test_heads_share_keys_and_values_without_a_copy(tmp_path, monkeypatch):
    folder, scores = save(tmp_path, "llama"), []
    for shared in (False, True):
        engine = TransformersEngine(folder, dtype=torch.float32)
        with monkeypatch.context() as patch:
            if shared:
                patch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("copied"))
            else:
                patch.setenv(SHARED_HEADS, "0")
            replies = [reply for requests in (FIRST, SECOND) for _, reply in sorted(engine.answer(requests))]
        scores.append(torch.tensor([reply.logprobs for reply in replies]))
    assert torch.allclose(*scores, atol=1e-5, rtol=0)
    assert SHARED_HEADS not in os.environ


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    drawn = draw(
        probabilities.log().expand(4000, 4), Sampling(), [torch.Generator().manual_seed(i) for i in range(4000)]
    )
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    # Five standard deviations of a binomial's count.
    assert ((counts - 4000 * probabilities).abs() <= 5 * (4000 * probabilities * (1 - probabilities)).sqrt()).all()
    again = [torch.Generator().manual_seed(i) for i in (7, 3)]
    assert draw(probabilities.log().expand(2, 4), Sampling(), again) == [drawn[7], drawn[3]]


@pytest.mark.parametrize("kind", STATEFUL)
def test_models_with_a_running_state_are_refused_by_name(kind):
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if kind == "lfm2" else {}
    config = AutoConfig.for_model(kind, **layers)
    with pytest.raises(ValueError, match=rf"model 'some/model' \({kind}\) has layers with a running state .* server"):
        check_attention("some/model", config)


def test_models_of_attention_layers_pass():
    for kind in [*WINDOWED, "qwen3", "mixtral", "deepseek_v3"]:
        check_attention("some/model", AutoConfig.for_model(kind))


def test_a_refused_model_is_refused_before_its_weights_are_read(tmp_path):
    folder = save(tmp_path, "llama")
    transformers.Qwen3NextConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"\(qwen3_next\) has layers with a running state"):
        TransformersEngine(folder)


SUGGESTED = [
    {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    {"suppress_tokens": list(range(900))},
    {"forced_eos_token_id": 3, "forced_bos_token_id": 5, "min_new_tokens": 9},
    {"num_beams": 3, "early_stopping": True},
    {"stop_strings": ["a", "e"]},
    {"cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True},
    {"do_sample": True, "temperature": 0.1, "top_k": 1, "min_p": 0.9, "typical_p": 0.2, "max_length": 3},
]


@pytest.fixture(scope="module")
def unsuggested(tmp_path_factory):
    return written(save(tmp_path_factory.mktemp("plain"), "llama"))


def written(folder):
    engine = TransformersEngine(folder, dtype=torch.float32)
    request = replace(chat("Tell me of rain."), options=())
    asked = [replace(request, seed=seed, sampling=Sampling(12, temperature=t)) for seed, t in ((0, 0.0), (1, 1.0))]
    return [reply.text for _, reply in sorted(engine.answer(asked))]


@pytest.mark.parametrize("suggested", SUGGESTED, ids=lambda settings: next(iter(settings)))
def test_what_a_model_suggests_for_generation_changes_nothing(suggested, unsuggested, tmp_path):
    assert len(set(unsuggested)) == 2
    assert written(save(tmp_path, "llama", suggested)) == unsuggested


@pytest.mark.parametrize("sampling", [None, Sampling(12)])
def test_a_chat_that_does_not_fit_is_answered_so_and_the_others_go_on(sampling, tmp_path):
    texts = ["Hi.", "Hello there, and so on. " * 8, "Hm?"]
    engine = TransformersEngine(save(tmp_path, "llama", max_position_embeddings=512), dtype=torch.float32)
    requests = [
        chat(text) if sampling is None else replace(chat(text), options=(), sampling=sampling) for text in texts
    ]
    lengths = [engine._row(request) for request in requests]
    needed = [len(row.ids) + (max(map(len, row.tails)) if row.tails else 1) for row in lengths]
    engine.context = needed[1]
    assert all(reply.finish_reason != "context" for _, reply in engine.answer(requests))
    engine.context = needed[1] - 1
    replies = dict(engine.answer(requests))
    assert [replies[i].finish_reason == "context" for i in range(3)] == [False, True, False]
    long = replies[1]
    assert (long.text, long.completion_tokens, long.logprobs) == ("", 0, None)
    assert long.prompt_tokens == len(lengths[1].ids) - lengths[1].shared
    assert replies[0].logprobs is None or all(map(math.isfinite, replies[0].logprobs))


def test_a_reply_ends_with_the_context_and_the_others_of_its_batch_go_on(tmp_path):
    texts = ["Hi.", "Hello there, and so on. " * 8, "Hm?"]
    engine = TransformersEngine(save(tmp_path, "llama", max_position_embeddings=512), dtype=torch.float32)
    requests = [replace(chat(text), options=(), sampling=Sampling(40, temperature=0)) for text in texts]
    whole = dict(engine.answer(requests))
    assert {reply.finish_reason for reply in whole.values()} == {"length"}
    engine.context = len(engine._row(requests[1]).ids) + 7
    cut = dict(engine.answer(requests))
    # As long as the context allows, the same words as before, and counted as cut.
    assert [cut[i].completion_tokens for i in range(3)] == [40, 7, 40]
    assert (cut[1].finish_reason, cut[0], cut[2]) == ("length", whole[0], whole[2])
    assert whole[1].text.startswith(cut[1].text)


def test_a_batch_leaves_room_for_replies_as_long_as_they_may_get(tmp_path):
    engine = TransformersEngine(save(tmp_path, "llama", max_position_embeddings=512), dtype=torch.float32)
    rows = [engine._row(replace(chat("Hi."), options=(), sampling=Sampling(100))) for _ in range(7)]
    assert [len(batch) for batch in engine._batches(rows)] == [7]
    engine.held_tokens = 3.5 * (len(rows[0].ids) + 100 + ROOM)
    assert [len(batch) for batch in engine._batches(rows)] == [3, 3, 1]
    engine.held_tokens = 1
    assert [len(batch) for batch in engine._batches(rows)] == [1] * 7


def test_the_context_is_what_the_model_was_trained_on(tmp_path):
    assert TransformersEngine(save(tmp_path / "plain", "llama", max_position_embeddings=77)).context == 77
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = save(
        tmp_path / "long",
        "phi3",
        rope_parameters=rope,
        max_position_embeddings=400,
        original_max_position_embeddings=99,
    )
    assert TransformersEngine(folder).context == 99
