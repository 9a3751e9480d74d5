r"""Alignment of the tool-use scenario (Appendix A.1.2): DPO pairs and GRPO's preference rewards.

DPO (up to 2,000 pairs): a tool-assisted solution is preferred to the model's own sample. A tool-assisted solution is a
reply that calls the tool; it is run, and becomes a pair only if it prints the right answer. Its program is the
problem's own, or, where none is known (hub or file), written by the model when told to use the tool.

GRPO (groups of 8): "Bradley-Terry preference aggregation with temperature 0.7". The paper gives no formula. Ours: the
reward of a response is its mean win probability against the others of its group,

    reward_i = mean over j != i of sigmoid((score_i - score_j) / 0.7)

with a score that adds appropriate tool usage (the tool for a complex problem, none for a simple one) and
correctness. Within a group the rewards' mean is always 1/2: whether a model gets better shows in the score.

Training is one turn long, the evolution up to two: in training, what a call printed last counts as its answer.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

from scipy.special import expit

from atp_utils.evolution.parsing import marked_thinking, parse_choice, split_thinking
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Request
from atp_utils.problems.answers import is_correct
from atp_utils.scenarios.preferences import Opening
from atp_utils.scenarios.tool_use.calls import Call, RunTool, printed_answer, read_answer, read_call
from atp_utils.scenarios.tool_use.episodes import opening
from atp_utils.scenarios.tool_use.items import Item

MAX_PAIRS = 2000
TEMPERATURE = 0.7
# Usage as compliance in the other scenarios; correctness weighs as much.
APPROPRIATE, INAPPROPRIATE, UNDECIDED, RIGHT = 1.0, 0.1, 0.0, 1.0


# --- DPO ---------------------------------------------------------------------------------------------------


def solution(program: str) -> str:
    """A tool-assisted solution: the reply that calls the tool with ``program``."""
    return f"I write code for this.\n<tool>\n{program.strip()}\n</tool>"


def is_right(item: Item, call: Call, run_tool: RunTool) -> bool:
    """Whether a call prints the right answer in its last line; False without a call, and where the code fails."""
    return call.code is not None and is_correct(printed_answer(run_tool(call.code)), item.answer)


def sampling(
    item: Item, protocol: Protocol, opening: Opening = opening, *, seed: int, count: int, run_tool: RunTool
) -> Generator[list[Request], list, dict]:
    """Episode that gets ``count`` of the model's own replies to a training problem, and a tool-assisted solution.

    Returns ``{"item", "messages", "chosen", "samples"}``: the item's id, the chat, a solution that was run and is
    right (None if there is none), and (text, cut off?) of each reply. A problem without a program of its own is also
    put to the model with an instruction to use the tool, up to ``max_attempts`` times; the returned chat is without
    that instruction. Kept thinking stands in front of what the model wrote; a problem's own program has none.
    Raises ValueError for a ``choose`` protocol (its pairs are bare answers), or a count < 1.
    """
    if protocol.name != "reason" or count < 1:
        raise ValueError(f"samples are freely written (reason), 1 or more; got {protocol.name!r} and {count}")
    plain, name = opening(item, protocol, False), ("tool_use", item.id)
    replies = yield [protocol.ask((*name, "sample", f"seed{seed}", str(n)), plain) for n in range(count)]
    samples = [(_kept(reply.text, protocol), reply.finish_reason == "length") for reply in replies]
    own = solution(item.program) if item.program else None
    chosen = own if own and is_right(item, read_call(own), run_tool) else None
    told = f"{plain[-1]['content']}\nIn this exercise, use the tool."
    chat = [*plain[:-1], {"role": "user", "content": told}]
    for attempt in range(0 if own else protocol.max_attempts):
        [reply] = yield [protocol.ask((*name, "assisted", f"seed{seed}", str(attempt)), chat)]
        call = read_call(reply.text)
        if is_right(item, call, run_tool):
            chosen = _kept(reply.text, protocol, call.said)
            break
    return {"item": item.id, "messages": plain, "chosen": chosen, "samples": samples}


def _kept(text: str, protocol: Protocol, said: str | None = None) -> str:
    """What of a reply is trained on: what it ``said``, behind its thinking, marks and all, where that is kept."""
    thought = marked_thinking(text) if protocol.keep_thinking else ""
    return thought + (split_thinking(text)[1] if said is None else said)


def solution_pairs(found: Sequence[dict], limit: int = MAX_PAIRS) -> tuple[list[dict], Counter[str]]:
    """Pairs from `sampling`'s results, and how many samples were kept or left out, by reason.

    Left out: samples that use the tool themselves, were cut off or are empty, samples of a problem without a right
    solution, repeated pairs, and what is over ``limit``. Every problem gives its first pair before any gives a second.
    """
    pairs, seen, counts = [], set(), Counter()
    samples = [(place, result, *sample) for result in found for place, sample in enumerate(result["samples"])]
    for _, result, text, cut in sorted(samples, key=lambda sample: sample[0]):
        why = _left_out(result["chosen"], text, cut) or ("repeated" if (result["item"], text) in seen else "")
        why = why or ("over the limit" if len(pairs) >= limit else "kept")
        counts[why] += 1
        if why == "kept":
            seen.add((result["item"], text))
            pairs.append({"messages": result["messages"], "chosen": result["chosen"], "rejected": text})
    return pairs, counts


def _left_out(chosen: str | None, text: str, cut: bool) -> str:
    """Why a sample can't be the dispreferred side of a pair, or ""."""
    if chosen is None:
        return "no right solution"
    call = read_call(text)
    if call.code is not None or call.faults:
        return "sample calls the tool"
    return "cut off or empty" if cut or not split_thinking(text)[1] else ""


# --- GRPO --------------------------------------------------------------------------------------------------


def bt_rewards(scores: Sequence[float]) -> list[float]:
    """Bradley-Terry aggregation within a group: each response's mean win probability against the others.

    ``reward_i = mean over j != i of sigmoid((scores[i] - scores[j]) / TEMPERATURE)``, in (0, 1); the rewards of a group
    average 1/2. Raises ValueError for fewer than two scores, or one that isn't finite.
    """
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        raise ValueError(f"expected two or more finite scores, got {list(scores)}")
    return [
        sum(float(expit((own - other) / TEMPERATURE)) for j, other in enumerate(scores) if j != i) / (len(scores) - 1)
        for i, own in enumerate(scores)
    ]


def score(policy: str | None, appropriate: str, correct: bool) -> float:
    """A response's score: usage (appropriate 1, not 0.1, undecided 0) plus 1 if it is right; 0 to 2."""
    usage = UNDECIDED if policy is None else (APPROPRIATE if policy == appropriate else INAPPROPRIATE)
    return usage + RIGHT * correct


def completion_score(completion: str, row: dict[str, Any], run_tool: RunTool) -> float:
    """The score of one completion of a row of `reward_rows`.

    In ``choose`` the policy is all there is to score. In ``reason`` a reply with a call has chosen the tool, and is
    right if the call prints the right answer; one with an answer in a closed ``\\boxed{}`` is direct; one with
    neither is undecided (TRL doesn't say which replies were cut off).
    """
    text = row["prefill"] + completion
    if row["protocol"] == "choose":
        return score(parse_choice(text, row["options"]), row["compliant"], False)
    call = read_call(text)
    if call.code is not None:
        return score("tool", row["compliant"], is_correct(printed_answer(run_tool(call.code)), row["answer"]))
    answer = read_answer(text, cut=True)
    return score(None if answer is None else "direct", row["compliant"], is_correct(answer, row["answer"]))


def preference_reward(run_tool: RunTool, group_size: int) -> Callable:
    """TRL's reward function: `bt_rewards` of each group's scores; logs their mean, and the share with a policy.

    TRL hands over the responses of a problem one behind the other; ValueError where a group is not of one problem.
    The same code is run once.
    """
    run_once = functools.lru_cache(maxsize=4096)(run_tool)

    def preference(
        completions: Sequence[str], item: Sequence[str], log_metric: Any = None, **columns: Any
    ) -> list[float]:
        names = ("options", "compliant", "answer", "protocol", "prefill")
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(columns[n] for n in names), strict=True)]
        scores = [completion_score(text, row, run_once) for text, row in zip(completions, rows, strict=True)]
        if log_metric is not None:
            log_metric("score", sum(scores) / len(scores))
            log_metric("valid", sum(score != UNDECIDED for score in scores) / len(scores))
        rewards: list[float] = []
        for start in range(0, len(scores), group_size):
            group = slice(start, start + group_size)
            if len(scores[group]) != group_size or len(set(item[group])) != 1:
                raise ValueError(f"expected groups of {group_size} responses to one problem, got {item[group]}")
            rewards += bt_rewards(scores[group])
        return rewards

    return preference
