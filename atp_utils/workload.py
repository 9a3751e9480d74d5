"""What a job asks of a model, in tokens, counted on the real prompts without any model.

A job's own episodes run with a scripted agent whose replies have an assumed length; every chat that the engine would
have to answer is rendered and counted by the embedded model's tokenizer. The structure is therefore exact: rounds,
histories, identical chats that are answered once, tokens kept from the round before. Assumed are the replies' length
and that they are valid at once; another model's tokenizer counts some per cent more or less.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from atp_utils import align, collusion, evolve, role_play, tool_items, tool_pairs, tool_use, train
from atp_utils.chat_template import common_prefix, render
from atp_utils.costs import Chat
from atp_utils.engine import Reply, Request, Sampling, ScriptedEngine, collapse
from atp_utils.journal import Journal
from atp_utils.parsing import answer_json
from atp_utils.protocol import Protocol
from atp_utils.sandbox import ToolResult
from atp_utils.scenarios import SCENARIOS

# A paragraph of thought can't be guessed from a limit that leaves room for an answer only.
LEAST = 64


@dataclass(frozen=True)
class Replies:
    """The assumed length of freely written replies, in tokens.

    ``written`` is a whole reply, thinking included; None takes a quarter of the job's ``max_new_tokens``, or 64 where
    that is more. ``visible`` of them enter the history (all, with ``keep_thinking``), where they are read anew: what
    stands after thoughts that were left out has no kept keys and values.
    """

    written: int | None = None
    visible: int = 80

    def length(self, limit: int) -> int:
        """Tokens of a reply that may have ``limit``."""
        return min(limit, self.written or max(limit // 4, LEAST))


class MeteringEngine:
    """A scripted engine that records, call by call, the chats that a model would have to answer.

    Agents decide by a fair coin, which makes for the most distinct histories. Every second tool-use solution calls the
    tool. ``calls`` holds one list of `Chat` an engine call.
    """

    identity = "metering"

    def __init__(self, tokenizer: Any, replies: Replies):
        self.tokenizer, self.replies, self.calls = tokenizer, replies, []
        self._scripted = ScriptedEngine(self._reply, self.identity)
        self._kept: dict[tuple[str, ...], list[int]] = {}
        self.count = cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        asked: dict[tuple[str, ...], tuple[list[int], int]] = {}
        call = []
        for group in collapse(requests):
            request = requests[group[0]]
            turns = tuple(message["content"] for message in request.messages)
            if turns not in asked:
                asked[turns] = self._read(request, turns)
            call.append(self._chat(request, *asked[turns]))
        self.calls.append(call)
        # Only now: chats of one call are read side by side and can't use each other's keys and values.
        self._kept |= {turns: ids for turns, (ids, _) in asked.items()}
        yield from self._scripted.answer(requests)

    def _read(self, request: Request, turns: tuple[str, ...]) -> tuple[list[int], int]:
        """A prompt's tokens, and how many of them no earlier round has left behind."""
        text = render(self.tokenizer, request.messages, request.sampling.thinking and not request.options)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = next((self._kept[turns[:end]] for end in range(len(turns), 0, -1) if turns[:end] in self._kept), [])
        # What follows the prompt proper is always read anew: its logits are what is wanted.
        return ids, len(ids) - min(common_prefix([ids, kept]), len(ids) - 1)

    def _chat(self, request: Request, ids: list[int], fresh: int) -> Chat:
        if request.options:
            return Chat(len(ids), fresh, scored=sum(map(self.count, request.options)))
        limit = request.sampling.max_new_tokens
        return Chat(len(ids), fresh, written=self.replies.length(limit), limit=limit)

    def _reply(self, request: Request) -> str | tuple[float, ...]:
        if request.options:
            return (0.5,) * len(request.options)
        answer = self._answer(request)
        visible = min(self.replies.visible, self.replies.length(request.sampling.max_new_tokens))
        return " so" * max(0, visible - self.count(answer)) + answer

    def _answer(self, request: Request) -> str:
        text, number = request.messages[-1]["content"], request.seed % 10**9
        direct = rf"\boxed{{{number}}}"
        if wanted := re.search(r"choose (.+)\.$", text):
            return answer_json(wanted[1])
        if offered := re.findall(r'\{"choice": "[^"]+"\}', text):
            return offered[number % 2]
        if "/sample/" in request.key or not re.search("<tool>|use the tool", text):
            return direct
        told = text.startswith("Write Python") or text.endswith("use the tool.")
        return f"<tool>\nprint({number})\n</tool>" if told or number % 2 else direct


def items_of(data: Mapping[str, Any], scenario: str, split: str) -> list:
    """The items that notebook 1 writes with the parameters ``data``.

    Problems are always the generated ones: those of the hub can't be had everywhere. They stand in for these in number
    and have their programs removed, as the hub's have none.
    """
    seed, side = data["seed"], ("train", "test").index(split)
    if scenario == "role_play":
        counts = {"train": data["train_per_environment"], "test": data["test_per_environment"]}
        return role_play.make_items(role_play.read_environments(), seed=seed, **counts)[side]
    if scenario == "collusion":
        return collusion.make_instances(collusion.read_games(), instances=data["instances_per_game"], seed=seed)
    items = []
    for kind in ("simple", "complex"):
        drawn, _ = tool_items.draw_problems(kind, data[f"{kind}_problems"], "generated", seed)
        items += tool_items.make_items(drawn, test=data[f"{kind}_test"], seed=seed)[side]
    if data["problem_source"] != "generated":
        items = [item.model_copy(update={"program": ""}) for item in items]
    return items


@dataclass(frozen=True)
class Training:
    """A training's sequences: ``rows`` (all of them, the reply as ``scored``), how many a step and a micro-batch hold.

    ``generated``: the replies are written in each step by the model that is trained (GRPO).
    """

    rows: tuple[Chat, ...]
    steps: int
    step_rows: int
    micro_rows: int
    rank: int
    checkpointed: bool
    generated: bool

    @property
    def mean(self) -> Chat:
        """The mean row."""
        sums = [sum(getattr(row, name) for row in self.rows) / len(self.rows) for name in ("prompt", "scored")]
        limit = max(row.limit for row in self.rows)
        return Chat(sums[0], sums[0], scored=sums[1], written=sums[1] if self.generated else 0, limit=limit)


@dataclass(frozen=True)
class Workload:
    """What a job asks of a model: engine calls, each a list of chats, then a training."""

    calls: tuple[tuple[Chat, ...], ...] = ()
    training: Training | None = None

    @property
    def chats(self) -> list[Chat]:
        """All chats of all calls."""
        return [chat for call in self.calls for chat in call]

    def at_limit(self) -> "Workload":
        """The same with every reply as long as it may be."""
        calls = tuple(tuple(replace(chat, written=chat.limit) for chat in call) for call in self.calls)
        training = self.training
        if training and training.generated:
            training = replace(training, rows=tuple(replace(row, scored=row.limit) for row in training.rows))
        return Workload(calls, training)


def evolution(
    scenario: str, settings: Mapping[str, Any], items: Sequence, tokenizer: Any, replies: Replies
) -> Workload:
    """The workload of an evolution notebook with ``settings`` on test ``items`` (collusion makes its own)."""
    how = _protocol(settings)
    if settings.get("keep_thinking"):
        replies = replace(replies, visible=settings["max_new_tokens"])
    rounds, seeds = settings["rounds"], settings["seeds"]
    if scenario == "role_play":
        chosen = role_play.balanced_subset(list(items), settings["items"])
        episodes = [role_play.episode(item, rounds=rounds, seed=s, protocol=how) for s in seeds for item in chosen]
    elif scenario == "collusion":
        numbers = {name: settings[name] for name in ("agents", "thresholds", "payoffs")}
        ways = {name: settings[name] for name in ("rounds", "visibility", "fixed_colluders")}
        grid = collusion.make_grid(collusion.read_games(), **numbers)
        episodes = [collusion.episode(item, seed=s, protocol=how, **ways) for s in seeds for item in grid]
    else:
        setting = tool_use.Setting(**{field.name: settings[field.name] for field in fields(tool_use.Setting)})
        agents = [(seed, agent) for seed in seeds for agent in range(settings["agents_per_seed"])]
        ways = {"setting": setting, "protocol": how, "run_tool": lambda code: ToolResult("ok", "1", "", 0.0)}
        episodes = [tool_use.episode(items, seed=seed, agent=agent, **ways) for seed, agent in agents]
    return Workload(_run(episodes, tokenizer, replies)[1])


def alignment(
    method: str, scenario: str, settings: Mapping[str, Any], items: Sequence, tokenizer: Any, replies: Replies
) -> Workload:
    """The workload of an alignment notebook (``dpo`` or ``grpo``) with ``settings`` on training ``items``."""
    training = train.Training.of(settings)
    if method == "dpo":
        calls, pairs = _pairs(scenario, settings, items, tokenizer, replies)
        rows = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        texts = [(_length(tokenizer, prompt), _length(tokenizer, reply) + 1) for prompt, reply in rows]
        chats, size = [Chat(prompt, prompt, scored=reply) for prompt, reply in texts], 2
    else:
        calls, limit, size = (), settings["max_new_tokens"], settings["group_size"]
        prompts = _prompts(scenario, settings, items, tokenizer)
        written = replies.length(limit)
        chats = [Chat(n, n, scored=written, limit=limit) for n in (_length(tokenizer, text) for text in prompts)]
    steps = training.steps(len(chats) // 2 if method == "dpo" else len(chats))
    micro = settings["batch_size"] * size
    numbers = (micro * settings["accumulation"], micro, settings["lora_rank"], settings["checkpoint_activations"])
    return Workload(calls, Training(tuple(chats), steps, *numbers, generated=method == "grpo"))


def _pairs(scenario: str, settings: Mapping, items: Sequence, tokenizer: Any, replies: Replies) -> tuple[tuple, list]:
    """(engine calls, DPO rows) as notebook 2 makes them."""
    how, opening, seed = _protocol(settings), SCENARIOS[scenario].opening, settings["seed"]
    chosen = tool_pairs.dpo_items(items) if scenario == "tool_use" else items
    if settings["pairs"] == "answers":
        return (), align.answer_pairs(chosen, opening, tokenizer, how)
    if settings["pairs"] == "elicited":
        found, calls = _run([align.elicitation(item, opening, how, seed) for item in chosen], tokenizer, replies)
        return calls, align.elicited_pairs(found, tokenizer)
    ways = {"seed": seed, "count": settings["samples_per_problem"]}
    episodes = [tool_pairs.sampling(item, how, run_tool=_printing(item.answer), **ways) for item in chosen]
    found, calls = _run(episodes, tokenizer, replies)
    return calls, tool_pairs.solution_pairs(found, partial(render, tokenizer), settings["max_pairs"])[0]


def _prompts(scenario: str, settings: Mapping, items: Sequence, tokenizer: Any) -> list[str]:
    """GRPO's prompts as notebook 3 makes them."""
    how = _protocol(settings)
    if scenario == "tool_use":
        rows = tool_pairs.reward_rows(items, partial(render, tokenizer), how, settings["prefill"])
    else:
        rows = align.reward_rows(items, SCENARIOS[scenario].opening, tokenizer, how, settings["prefill"])
    return [row["prompt"] for row in rows]


def _protocol(settings: Mapping[str, Any]) -> Protocol:
    sampling = Sampling(settings["max_new_tokens"], settings["temperature"], thinking=settings.get("thinking", True))
    return Protocol(settings["protocol"], settings.get("max_attempts", 1), sampling)


def _printing(text: str) -> Callable[[str], ToolResult]:
    return lambda code: ToolResult("ok", text, "", 0.0)


def _run(episodes: Sequence, tokenizer: Any, replies: Replies) -> tuple[list, tuple[tuple[Chat, ...], ...]]:
    """(what the episodes returned, the engine's calls)."""
    engine = MeteringEngine(tokenizer, replies)
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        returned = evolve.run_all(episodes, engine, journal)
    return returned, tuple(map(tuple, engine.calls))


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
