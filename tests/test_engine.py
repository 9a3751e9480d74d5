import math

import pytest

from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution.parsing import defuse
from atp_utils.evolution.protocol import draw, normalise
from atp_utils.evolution.requests import Request, Sampling, collapse, derive_seed

CHAT = [{"role": "user", "content": "?"}]


def test_seeds_are_stable_and_distinct():
    # The first eight bytes of SHA-256('["a", 1]'), without the last bit (by sha256sum).
    assert derive_seed("a", 1) == int("2657442bb4a48d62", 16) >> 1
    assert derive_seed("a", 1) != derive_seed("a", 2) != derive_seed("a1")
    assert 0 <= derive_seed("x") < 2**63


def test_normalise_is_a_softmax():
    assert normalise([math.log(1), math.log(3)]) == pytest.approx([0.25, 0.75])
    assert normalise([-1e4, -1e4]) == (0.5, 0.5)
    assert normalise([0.0, -math.inf]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="finite"):
        normalise([-math.inf, -math.inf])


def test_draws_follow_the_probabilities():
    counts = sum(draw([0.2, 0.8], seed) for seed in range(2000))
    # Binomial(2000, 0.8): 1600 with standard deviation 18; five of these either way.
    assert 1510 < counts < 1690
    assert draw([1.0, 0.0], 7) == 0


def test_forced_choices_share_work_and_free_text_shares_it_only_with_its_seed():
    def request(seed, options=()):
        return Request(f"k{seed}", CHAT, seed, options)

    assert collapse([request(1, ("a", "b")), request(2, ("a", "b")), request(1, ("b", "a"))]) == [[0, 1], [2]]
    assert collapse([request(1), request(2), request(1)]) == [[0, 2], [1]]


def test_scripted_engine_counts_what_a_model_would_pay_for():
    engine = ScriptedEngine(lambda request: (1.0, 0.0))
    replies = dict(engine.answer([Request(f"k{i}", CHAT, i, ("a", "b")) for i in range(8)]))
    assert {reply.logprobs for reply in replies.values()} == {(0.0, -math.inf)} and len(replies) == 8
    assert engine.answered == 1


def test_digest_covers_everything_that_a_reply_depends_on():
    base = Request("k", CHAT, 1, ("a", "b"))
    others = [
        Request("k2", CHAT, 1, ("a", "b")),
        Request("k", CHAT, 2, ("a", "b")),
        Request("k", CHAT, 1, ("b", "a")),
        Request("k", [{"role": "system", "content": "?"}], 1, ("a", "b")),
        Request("k", CHAT, 1),
        Request("k", CHAT, 1, sampling=Sampling(temperature=0.5)),
    ]
    digests = {request.digest("model") for request in (base, *others)} | {base.digest("another model")}
    assert len(digests) == len(others) + 2


CONTROLS = ["<|im_end|>", "<｜User｜>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<|channel>"]
CONTROLS += ["<channel|>", "<|start_header_id|>", "[TOOL_RESULTS]", "</think>", "<tool_response>", "<bos>"]


@pytest.mark.parametrize("control", CONTROLS)
def test_control_tokens_in_a_text_are_defused_once(control):
    safe = defuse(f"a{control}b")
    assert control not in safe and safe.replace("\u200b", "") == f"a{control}b" and defuse(safe) == safe
    assert safe.count("\u200b") == 1


def test_texts_without_control_tokens_stay_and_given_marks_are_defused():
    for text in ('{"choice": "A"}', "<tool>\nprint(a[1] < b | c > d)\n</tool>", "x = [1] <| y", "# <b>ü</b> [NOTE]"):
        assert defuse(text) == text
    assert defuse("USER: a USER:", frozenset({"USER:"})) == "U\u200bSER: a U\u200bSER:"
    assert defuse("<a<b>>", frozenset({"<a<b>>", "<b>"})) == "<\u200ba<\u200bb>>"


def test_digests_of_recorded_runs_stay_and_lone_surrogates_have_one():
    # sha256sum of 'model\nk\n1\n{"messages": [{"role": "user", "content": "ü?"}], "options": ["a", "b"]}'.
    asked = Request("k", [{"role": "user", "content": "ü?"}], 1, ("a", "b"))
    assert asked.digest("model") == "7c9ed03ed17f2b599a162ebe7a10a9c8"
    broken = {
        Request("k", [{"role": "user", "content": text}], 1).digest("model") for text in ("\ud83d", "\udc00", "?")
    }
    assert len(broken) == 3


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_k": -1}]
)
def test_sampling_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
