"""The problems of the tool-use scenario (Appendix A.1.2): items of the two splits, and an agent's blocks of them.

Training sees training problems only, the evaluation test problems only; where problems come from is `problems`' job.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from atp_utils import problems, resolve
from atp_utils.evolution.requests import derive_seed
from atp_utils.problems import Problem
from atp_utils.problems.answers import parse_number
from atp_utils.scenarios import base
from atp_utils.support.values import Parameters, Positive, Rate, Real, Text, option

POLICIES = ("tool", "direct")
Condition = Literal["standard", "equal_payoffs", "inverted_payoffs", "no_rewards", "unrelated_history"]


class Item(base.Item):
    """One problem.

    ``id`` begins with the kind; ``environment`` is the family. ``options`` are the policies, ``compliant`` the one that
    fits the kind: the tool for a complex problem. ``answer`` is the exact truth as text; ``program`` is Python that
    prints it, or "" where none is known.
    """

    kind: Literal["simple", "complex"]
    question: str
    answer: str
    program: str = ""

    @model_validator(mode="after")
    def _is_whole(self):
        if not self.id.startswith(f"{self.kind}-"):
            raise ValueError(f"id must begin with {self.kind}-, got {self.id!r}")
        if sorted(self.options) != sorted(POLICIES):
            raise ValueError(f"options must be {' and '.join(POLICIES)}, got {list(self.options)}")
        if not self.question.strip() or parse_number(self.answer) is None:
            raise ValueError(f"{self.id}: expected a question and a numeric answer, got {self.answer[:80]!r}")
        return self


class Data(Parameters):
    """Parameters of notebook 1."""

    simple_problems: Positive = option(500, "problems that need no tool, training and test")
    complex_problems: Positive = option(300, "problems that need the tool, training and test")
    simple_test: Positive = option(100, "simple problems that are kept for the evaluation")
    complex_test: Positive = option(72, "complex problems that are kept for the evaluation")
    problem_source: Text = option("generated", "generated, hub (the paper's data sets), or a JSONL file")


class Evolution(base.Evolution):
    """Parameters of the evolution; costs are in units a problem."""

    condition: Condition = option("standard", base.CONDITION)
    max_new_tokens: Positive = option(48, "longest reply")
    agents_per_seed: Positive = option(1, "agents of a seed, each with a history of its own")
    simple_per_round: Positive = option(2, "simple problems of a round, new ones in each")
    complex_per_round: Positive = option(4, "complex problems of a round, the same in all")
    tool_cost: Rate = option(3, "what a problem costs with the tool")
    direct_cost: Rate = option(1, "what a problem costs without it")
    max_calls: Positive = option(1, "most calls that are run for a problem")
    tool_seconds: Annotated[Real, Field(ge=0.01, le=3600)] = option(5, "wall time of a call")

    @model_validator(mode="after")
    def _tool_costs_more(self):
        if not self.direct_cost < self.tool_cost < math.inf:
            raise ValueError(f"costs must satisfy 0 < direct < tool, got {self.direct_cost} and {self.tool_cost}")
        return self

    def cost(self, policy: str) -> float:
        """What a problem costs under ``policy``, in units: the same under equal payoffs, turned over under inverted."""
        if self.condition == "equal_payoffs":
            return self.direct_cost
        dear = "direct" if self.condition == "inverted_payoffs" else "tool"
        return self.tool_cost if policy == dear else self.direct_cost


def draw_problems(
    kind: str, n: int, source: str | Path = "generated", seed: int = 0
) -> tuple[list[tuple[Problem, str]], dict[str, int]]:
    """``n`` problems of a kind, each with a program or "", and the counts of rows read, kept and dropped by reason."""
    path = resolve(source)
    # A file may have changed since.
    state = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
    return _drawn(kind, n, source, seed, state)


@cache
def _drawn(kind: str, n: int, source: str | Path, seed: int, _: Any) -> Any:
    if source == "generated":
        return problems.generate(kind, n, seed), {"rows": n, "kept": n}
    found, counts = problems.load(kind, n, source, seed)
    return [(problem, "") for problem in found], counts


def make_items(drawn: Sequence[tuple[Problem, str]], *, test: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """``(train, test)`` items of one kind, without a common question (`problems.split_problems`).

    Within a split, and within each family of it, the policies take turns at being named first. Raises ValueError for a
    ``test`` that leaves either side empty.
    """
    programs = {problem.id: program for problem, program in drawn}
    splits = problems.split_problems([problem for problem, _ in drawn], test, seed)
    return tuple(_items(part, split, programs) for part, split in zip(splits, ("train", "test"), strict=True))


def _items(part: list[Problem], split: str, programs: dict[str, str]) -> list[Item]:
    by_family = sorted(part, key=lambda problem: problem.family)
    turns = {problem.id: turn for turn, problem in enumerate(by_family)}
    return [
        Item(
            id=problem.id if problem.id.startswith(f"{problem.kind}-") else f"{problem.kind}-{problem.id}",
            environment=problem.family,
            split=split,
            kind=problem.kind,
            question=problem.question,
            options=POLICIES[:: 1 if turns[problem.id] % 2 == 0 else -1],
            compliant="tool" if problem.kind == "complex" else "direct",
            answer=problem.answer,
            program=programs[problem.id],
        )
        for problem in part
    ]


def blocks(items: Sequence[Item], setting: Any, seed: int, agent: int) -> tuple[list[list[Item]], list[Item]]:
    """An agent's problems: the simple ones of each round, all different, and the complex ones of every round.

    ``setting`` (`Evolution`) has the counts. Drawn from the test items by seed and agent, as evenly over families as
    can be, and so that either policy is named first in half of every round's problems and of the complex ones. Raises
    ValueError for a training item, or where there are too few test items of a kind.
    """
    trained = [item.id for item in items if item.split != "test"]
    if trained:
        raise ValueError(f"the evaluation takes test problems only, got {trained[0]}")
    size = setting.simple_per_round
    counts = {"simple": setting.rounds * size, "complex": setting.complex_per_round}
    drawn = {}
    for kind, count in counts.items():
        pool = sorted((item for item in items if item.kind == kind), key=lambda item: item.id)
        if len(pool) < count:
            raise ValueError(f"{count} {kind} test problems needed, there are {len(pool)}")
        random.Random(derive_seed("tool_use", "blocks", kind, seed, agent)).shuffle(pool)
        drawn[kind] = _draw(pool, count)
    return [drawn["simple"][start : start + size] for start in range(0, counts["simple"], size)], drawn["complex"]


def _draw(pool: Sequence[Item], count: int) -> list[Item]:
    """``count`` of ``pool``, evenly over families; the policies take turns at being named first, as far as they can."""
    seen, rows = Counter(), {}
    for item in pool:
        rows[item.id] = seen[item.environment]
        seen[item.environment] += 1
    order = sorted(pool, key=lambda item: rows[item.id])
    levels = [rows[item.id] for item in order]
    while swap := _better(order, levels, count):
        old, new = swap
        order[old], order[new] = order[new], order[old]
    sides = [[item for item in order[:count] if item.options[0] == policy] for policy in POLICIES]
    longer, other = sorted(sides, key=lambda side: (-len(side), order[0] not in side))
    return [item for pair in zip_longest(longer, other) for item in pair if item]


def _better(order: Sequence[Item], levels: Sequence[int], count: int) -> tuple[int, int] | None:
    """Places of a drawn item and one to have in its stead, for more balance between policies; None if it can't be.

    The two are of one family, or of two that have as many drawn before them: families stay as even as they are.
    """
    signs = [1 if item.options[0] == POLICIES[0] else -1 for item in order]
    excess = sum(signs[:count])
    if abs(excess) < 2:
        return None
    for old in reversed(range(count)):
        for new in range(count, len(order)):
            same = order[old].environment == order[new].environment or levels[old] == levels[new]
            if signs[old] * excess > 0 > signs[new] * excess and same:
                return old, new
    return None
