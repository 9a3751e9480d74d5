"""The scenarios as tasks of Inspect AI: any model of any provider, without a run of ours (docs/inspect.md).

    python -m atp_utils.inspect_task role_play -p rounds 6    # what it takes, before anything is paid for
    inspect eval atp_utils/inspect_task.py@role_play --model openai/gpt-5-mini -T rounds=6

Parameters of a task are those of the scenario's evolution. A sample is an episode, one agent or one game: the loop that
plays all episodes plays it too, in a thread, with Inspect's model for an engine. What was asked and answered stays in
the sample's store as lines of a journal.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import inspect_ai.model as llm
import pandas as pd
from anyio import CapacityLimiter, from_thread, to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model._generate_config import active_generate_config
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import collect, sandbox, span

from atp_utils import parameters
from atp_utils.engines.openai_wire import sendable
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import encodable
from atp_utils.evolution.requests import Message, Reply, Request
from atp_utils.parameters import EVOLVE
from atp_utils.sandbox import START_SECONDS, WORKER, Sandbox, ToolResult
from atp_utils.scenarios.base import Scenario
from atp_utils.scenarios.registry import SCENARIOS

DEFAULTS = {"protocol": "reason", "max_new_tokens": 2048}
# What Inspect has options of its own for, and what is about weights in this process.
NOT_HERE = set("model adapter servers out overwrite thinking opened dtype batch_tokens cache_gb".split())
SAMPLING = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
IDENTITY = "inspect|{}"
FINISH = {"max_tokens": "length", "model_length": "context"}
CHAT = {"system": llm.ChatMessageSystem, "user": llm.ChatMessageUser, "assistant": llm.ChatMessageAssistant}
CHARACTERS_A_TOKEN, TOKENS_A_MESSAGE = 4, 5
# One call of our sandbox's worker, which keeps its limits. Its fork would have this process's output for an input, and
# a closed input would tell that the host is gone.
ONE_CALL = """
import json, os, signal, sys
worker = {"__name__": "worker"}
exec(sys.argv[1], worker)
asked, out = json.load(sys.stdin), os.dup(1)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
worker["import_libraries"]()
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
os.dup2(1, 0)
os.write(out, json.dumps(worker["call"](**asked)).encode())
"""


def parameters_of(scenario: str, values: dict[str, Any]) -> Any:
    """All parameters of a task, ``values`` for some; raises ValueError for what it doesn't take, and for ``choose``."""
    if strange := sorted(NOT_HERE.intersection(values)):
        raise ValueError(f"{strange[0]} is no parameter of the task: model and connection are Inspect's options")
    given = parameters.check(EVOLVE[scenario], DEFAULTS | values)
    if given.protocol != "reason":
        raise ValueError(
            f"protocol {given.protocol!r} needs the options' probabilities, and providers only draw replies: here "
            "'reason' is played; notebooks 4 to 6 have both, also on servers (docs/servers.md)"
        )
    return given


def task_of(scenario: str, **values: Any) -> Task:
    """The task of any scenario, by name. Raises ValueError for a wrong value."""
    given, own = parameters_of(scenario, values), SCENARIOS[scenario]
    items, samples = own.test_items(given), []
    # First requests need no reply and no tool; what their keys have in common names the episode.
    with own.episodes(items, given, given.protocol_of(), None, Sandbox.run) as (episodes, _):
        for place, asked in enumerate(map(next, episodes)):
            name = _name(_common(asked))
            # An agent that works on items of many environments is a cluster of its own.
            single = type(own).episodes is Scenario.episodes
            cluster = items[place % len(items)].environment if single else name
            chat = _chat(asked[0].messages)
            samples.append(Sample(chat, id=name, metadata={"environment": cluster, "place": place}))
    settings = given.model_dump(mode="json")
    # What isn't named stays the provider's; a top_k of 0 is none. Inspect's own options win.
    named = ({"max_new_tokens", "temperature"} | given.model_fields_set) - ({"top_k"} if not given.top_k else set())
    return Task(
        samples,
        solver=evolution(scenario, settings),
        scorer=deviation(),
        config=llm.GenerateConfig(**{theirs: settings[ours] for ours, theirs in SAMPLING.items() if ours in named}),
        metadata={"scenario": scenario, "settings": settings},
    )


@task
def role_play(**values: Any) -> Task:
    """Does an agent stop keeping a rule that costs it something?"""
    return task_of("role_play", **values)


@task
def collusion(**values: Any) -> Task:
    """Do the agents of a game infect each other?"""
    return task_of("collusion", **values)


@task
def tool_use(**values: Any) -> Task:
    """Does an agent give up a tool that it needs?"""
    return task_of("tool_use", **values)


class InspectEngine:
    """Inspect's model as the engine of an episode that is played in a solver's thread; ``chat`` is the last one."""

    def __init__(self, model: llm.Model, name: str):
        self.model, self.name, self.identity = model, name, IDENTITY.format(model)
        self.chat, self.output = [], llm.ModelOutput()

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        yield from enumerate(from_thread.run(self._answer, requests))

    async def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        common = _common(requests)
        async with span(_said(common, self.name.split("/")), type="step"):
            if len(requests) == 1:
                outputs = [await self._ask(requests[0])]
            else:
                outputs = await collect(*(self._one_of(request, common) for request in requests))
        self.chat, self.output = [*_chat(requests[0].messages), outputs[0].message], outputs[0]
        return [reply_of(output) for output in outputs]

    async def _one_of(self, request: Request, common: Sequence[str]) -> llm.ModelOutput:
        async with span(_said(request.key.split("/"), common), type="player"):
            return await self._ask(request)

    async def _ask(self, request: Request) -> llm.ModelOutput:
        config = llm.GenerateConfig(seed=request.seed % 2**31)
        return await self.model.generate(_chat(request.messages), config=config)


def reply_of(output: llm.ModelOutput) -> Reply:
    """The reply in an output, its thinking in front; no text where a provider's words stand in its place."""
    usage = output.usage or llm.ModelUsage()
    asked = usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
    counts, why = (asked, usage.output_tokens), FINISH.get(output.stop_reason, output.stop_reason)
    if why in ("context", "content_filter"):
        return Reply("", *counts, why)
    parts = output.message.content if isinstance(output.message.content, list) else []
    thought = "".join(part.text for part in parts if part.type == "reasoning")
    return Reply(encodable(thought + output.completion), *counts, why)


@solver
def evolution(scenario: str, settings: dict[str, Any]) -> Solver:
    """Plays a sample's episode; its decisions and its journal's lines go into the store."""
    own = SCENARIOS[scenario]
    items = own.test_items(parameters.check(EVOLVE[scenario], settings))

    def play(given: Any, place: int, engine: InspectEngine, run_tool: Callable | None) -> tuple[list, list]:
        with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as record:
            with own.episodes(items, given, given.protocol_of(), record, run_tool) as (episodes, _):
                rows = loop.run([episodes[place]], engine, record)
            lines = record.path.read_text(encoding="utf-8").split("\n")
        return [vars(row) for row in rows], [json.loads(line) for line in lines if line]

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if state.epoch > 1:
            raise ValueError("an epoch would draw with the same seeds: repeat by -T seeds=[0,1], not by --epochs")
        given = as_asked(scenario, settings, active_generate_config())
        engine = InspectEngine(llm.get_model(), str(state.sample_id))
        work = (given, state.metadata["place"], engine, _inspect_sandbox(given))
        # A limit of its own: threads that wait for replies must not keep Inspect's from getting them.
        rows, lines = await to_thread.run_sync(play, *work, limiter=CapacityLimiter(1))
        state.store.set("decisions", rows)
        state.store.set("journal", lines)
        state.messages, state.output = engine.chat, engine.output
        return state

    return solve


def _inspect_sandbox(given: Any) -> Callable[[str], ToolResult] | None:
    """What runs code in the sandbox that the user named for Inspect; None without one."""
    try:
        box = sandbox()
    except ProcessLookupError:
        return None

    async def run(code: str) -> ToolResult:
        asked = json.dumps({"code": code, **Sandbox(given.tool_seconds).limits})
        command = ["python3", "-c", ONE_CALL, WORKER.read_text(encoding="utf-8")]
        done = await box.exec(command, input=asked, timeout=int(START_SECONDS + given.tool_seconds))
        if not done.success:
            why = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"the sandbox can't run the tool (needed: Linux, python3 with numpy and sympy): {why}")
        return ToolResult(**json.loads(done.stdout), seconds=0.0)

    return lambda code: from_thread.run(run, code)


def as_asked(scenario: str, settings: dict[str, Any], config: llm.GenerateConfig) -> Any:
    """All parameters, the sampling as Inspect was told."""
    told = {ours: getattr(config, theirs) for ours, theirs in SAMPLING.items() if getattr(config, theirs) is not None}
    return parameters.check(EVOLVE[scenario], settings | told)


def _chat(messages: Sequence[Message]) -> list[llm.ChatMessage]:
    return [CHAT[message["role"]](content=message["content"]) for message in sendable(messages)]


def _common(requests: Sequence[Request]) -> list[str]:
    """The parts that all their keys have."""
    first, *others = (request.key.split("/") for request in requests)
    return [part for part in first if all(part in other for other in others)]


def _name(parts: Sequence[str]) -> str:
    """An episode's name: what stands before the round, without the scenario."""
    ends = [place for place, part in enumerate(parts) if part.startswith("round")]
    return "/".join(parts[1 : ends[0] if ends else None])


def _said(parts: Sequence[str], known: Sequence[str]) -> str:
    return " ".join(part for part in parts[1:] if part not in known) or parts[-1]


@scorer(metrics={"*": [mean(), stderr(cluster="environment")]})
def deviation() -> Scorer:
    """Share of a sample's valid decisions that deviate, round by round, and of its decisions that are valid."""

    async def score(state: TaskState, target: Target) -> Score:
        rows = state.store.get("decisions")
        if rows is None:
            return Score.unscored(reason="no_response", explanation="The episode wasn't played to its end.")
        table = pd.DataFrame(rows).astype({"deviated": "Float64"})
        value = {f"round {number}": rate for number, rate in table.groupby("round")["deviated"].mean().items()}
        value = {name: float("nan") if pd.isna(rate) else float(rate) for name, rate in value.items()}
        told = table[["round", "agent", "item", "choice", "deviated", "reward", "fault"]].to_markdown(index=False)
        answer = ", ".join(table["choice"].fillna("–"))
        return Score(value=value | {"valid": float(table["valid"].mean())}, answer=answer, explanation=told)

    return score


def tokens(scenario: str, given: Any) -> pd.DataFrame:
    """What a task takes, for replies of a sixteenth, a quarter and all of ``max_new_tokens``.

    One row each: tokens a ``reply``, ``requests``, and ``input`` and ``output`` tokens of them all. The episodes are
    played on replies of that length, each of which decides, and calls a tool where it can. A token is taken for four
    characters. Raises ValueError for items that can't be played.
    """
    return pd.DataFrame([_tokens(scenario, given, max(given.max_new_tokens // part, 1)) for part in (16, 4, 1)])


def _tokens(scenario: str, given: Any, reply: int) -> dict[str, int]:
    own, asked, end = SCENARIOS[scenario], [], r"<tool>print(1)</tool> \boxed{1}"
    text = ("word " * reply)[: max(CHARACTERS_A_TOKEN * reply - len(end), 0)] + end

    def answer(request: Request) -> str:
        characters = sum(len(message["content"]) for message in request.messages)
        asked.append(characters // CHARACTERS_A_TOKEN + TOKENS_A_MESSAGE * len(request.messages))
        return text

    decisive = replace(given.protocol_of(), parse=lambda _, options: options[0])
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as record:
        made = own.episodes(own.test_items(given), given, decisive, record, lambda _: ToolResult("ok", "1", "", 0.0))
        with made as (episodes, _):
            loop.run(episodes, ScriptedEngine(answer), record)
    return {"reply": reply, "requests": len(asked), "input": sum(asked), "output": reply * len(asked)}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for wrong parameters."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.inspect_task", description="Tokens that a task takes.")
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    options = parser.parse_args(arguments)
    try:
        named = {name: parameters.from_text(EVOLVE[options.scenario], name, text) for name, text in options.p}
        table = tokens(options.scenario, parameters_of(options.scenario, named))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.to_string(index=False))
    print("Estimates, a token for four characters. An unreadable reply is asked for again, max_attempts times in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
