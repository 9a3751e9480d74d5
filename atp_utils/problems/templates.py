"""Templates of simple word problems, known by construction (paper, Appendix A.1.2).

The paper takes its simple problems from GSM8K: "basic arithmetic operations (<= 3 computational steps,
numbers < 1000, <= 50 words)". These templates stand in for them where the hub can't be reached. A template
states its steps, so that the rule holds for every intermediate result and not only for what is printed.
"""

import re
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from atp_utils import resolve
from atp_utils.support import files

TEXTS = Path("data/environments/word_problems.yaml")
MAX_STEPS, MAX_NUMBER, MAX_WORDS = 3, 1000, 50  # numbers stay below MAX_NUMBER

NAMES = """Ada Ben Carla Dev Elif Farah George Hana Ivan Jia Kofi Lena Mateo Nadia Omar Priya Quinn Rosa Sven
Tara Umar Vera Will Ximena Yusuf Zoe""".split()
THINGS = """apples beads books buttons candles cards cookies marbles oranges pencils postcards shells stamps
stickers stones tickets""".split()

Step = tuple[int, str, int, int]  # left operand, operation, right operand, result


class Template(BaseModel):
    """One entry of ``data/environments/word_problems.yaml``; that file explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]
    text: str
    ranges: Annotated[str, StringConstraints(pattern=r"^[a-d] \d+-\d+(; [a-d] \d+-\d+)*$")]
    steps: Annotated[str, StringConstraints(pattern=r"^\w+ [-+*/] \w+(; \w+ [-+*/] \w+)*$")]

    @cached_property
    def draw(self) -> dict[str, tuple[int, int]]:
        """Name -> range of each number: "a 2-9; b 10-50"."""
        found = re.findall(r"(\w) (\d+)-(\d+)", self.ranges)
        return {name: (int(low), int(high)) for name, low, high in found}


TEMPLATES = {template.name: template for template in files.read_named(resolve(TEXTS), Template, "templates")}


def _operate(left: int, operation: str, right: int) -> int | None:
    """The result as a whole number from 1 to MAX_NUMBER - 1, else `None`."""
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": Fraction(left, right)}[operation]
    return int(exact) if exact == int(exact) and 0 < exact < MAX_NUMBER else None


def _work_out(template: Template, numbers: dict[str, int]) -> list[Step] | None:
    """Every step with its operands and result; `None` if one isn't a whole number in range."""
    known, worked = dict(numbers), []
    for index, step in enumerate(template.steps.split("; "), 1):
        left, operation, right = step.split()
        a, b = (known[name] if name in known else int(name) for name in (left, right))
        result = _operate(a, operation, b)
        if result is None:
            return None
        known[f"r{index}"] = result
        worked.append((a, operation, b, result))
    return worked


def draft(name: str, rng: Random, tries: int = 10_000) -> tuple[str, list[Step]]:
    """A question from template `name` and its steps; the last step's result is the answer.

    Numbers are drawn anew until every result is whole and in range, and the answer isn't simply one of the
    numbers in the question. RuntimeError if no draw of `tries` does that (a fault of the template).
    """
    template = TEMPLATES[name]
    who, other = rng.sample(NAMES, 2)
    words = dict(who=who, other=other, things=rng.choice(THINGS))
    for _ in range(tries):
        numbers = {key: rng.randint(*bounds) for key, bounds in template.draw.items()}
        steps = _work_out(template, numbers)
        question = template.text.format(**words, **numbers)
        if steps and str(steps[-1][3]) not in re.findall(r"\d+", question):
            return question, steps
    raise RuntimeError(f"template {name!r}: no admissible numbers in {tries} draws")
