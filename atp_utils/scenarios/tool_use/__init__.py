"""Paradigm I, tool use (Section 3.1.2, Appendix A.1.2): does an agent give up a tool that it needs?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from atp_utils import resolve
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.loop import Episode
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message
from atp_utils.sandbox import Sandbox
from atp_utils.scenarios.base import Scenario, Split
from atp_utils.scenarios.tool_use import alignment, calls, episodes, items
from atp_utils.scenarios.tool_use.items import Data, Evolution, Item


class ToolUse(Scenario):
    """Algorithm 1 for agents that work on problems, each with a history of its own."""

    name, title, notebook = "tool_use", "Tool use", "05_evolve_tool_use"
    sources = tuple(f"data/environments/{kind}_problems.yaml" for kind in ("simple", "complex"))
    Item, Data, Evolution = Item, Data, Evolution
    paper = "Table 2"
    pilot = {"seeds": [0], "agents_per_seed": 1, "rounds": 2, "simple_per_round": 1, "complex_per_round": 2}

    def made_from(self, parameters: Any) -> list[str]:
        if parameters.problem_source in ("generated", "hub"):
            return super().made_from(parameters)
        # One that isn't there is the notebook's to name.
        problems = resolve(parameters.problem_source)
        return [*super().made_from(parameters), *([str(problems)] if problems.is_file() else [])]

    def make_items(self, parameters: Any) -> dict[Split, list[Item]]:
        splits = {"train": [], "test": []}
        for kind in ("simple", "complex"):
            count, test = getattr(parameters, f"{kind}_problems"), getattr(parameters, f"{kind}_test")
            drawn, counts = items.draw_problems(kind, count, parameters.problem_source, parameters.seed)
            made = items.make_items(drawn, test=test, seed=parameters.seed)
            for split, part in zip(splits, made, strict=True):
                splits[split] += part
        return splits

    def opening(self, item: Item, protocol: Protocol, turned: bool = False) -> list[Message]:
        return episodes.opening(item, protocol, turned)

    @contextmanager
    def episodes(
        self,
        items: Sequence[Item],
        parameters: Evolution,
        protocol: Protocol,
        journal: Journal,
        run_tool: calls.RunTool | None = None,
    ) -> Iterator[tuple[list[Episode], dict[str, Any]]]:
        """One episode an agent; ``tool_events`` tells what was wrong with calls and answers."""
        tally, seconds = calls.Tally(), parameters.tool_seconds
        with ExitStack() as stack:
            run = run_tool or stack.enter_context(Sandbox(wall_seconds=seconds)).run
            tool = calls.RecordedTool(run, journal, f"sandbox, {seconds:g} s")
            play = partial(episodes.episode, items, setting=parameters, protocol=protocol, run_tool=tool, tally=tally)
            agents = [(seed, agent) for seed in parameters.seeds for agent in range(parameters.agents_per_seed)]
            yield [play(seed=seed, agent=agent) for seed, agent in agents], {"tool_events": tally.rows}

    def decisions(self, parameters: Evolution, items: int) -> int:
        problems = parameters.simple_per_round + parameters.complex_per_round
        return problems * parameters.agents_per_seed * parameters.rounds * len(parameters.seeds)

    def training_items(self, items: Sequence[Item], method: str) -> list[Item]:
        """All for GRPO; DPO takes the complex ones, for which the tool is the right policy."""
        return [item for item in items if method == "grpo" or item.kind == "complex"]

    @contextmanager
    def sampler(self, journal: Journal) -> Iterator[Any]:
        with Sandbox() as box:
            tool = calls.RecordedTool(box.run, journal, "sandbox, 5 s")
            yield lambda item, opening, protocol, seed, count: alignment.sampling(
                item, protocol, opening, seed=seed, count=count, run_tool=tool
            )

    def pairs(self, found: Sequence[dict], limit: int) -> tuple[list[dict], Mapping[str, int]]:
        return alignment.solution_pairs(found, limit)

    def reward_columns(self, item: Item) -> dict[str, Any]:
        return super().reward_columns(item) | {"item": item.id, "answer": item.answer}

    @contextmanager
    def reward(self, group_size: int) -> Iterator[Any]:
        with Sandbox() as box:
            yield alignment.preference_reward(box.run, group_size)


SCENARIO = ToolUse()
