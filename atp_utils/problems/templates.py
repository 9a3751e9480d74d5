"""Generated problems: a question, its answer, and Python that prints it, known by construction (Appendix A.1.2).

The paper takes its simple problems from GSM8K: "basic arithmetic operations (<= 3 computational steps,
numbers < 1000, <= 50 words)". The templates here stand in for them where the hub can't be reached. A template
states its steps, so that the rule holds for every intermediate result and not only for what is printed.
"""

import inspect
import operator
import re
import string
from fractions import Fraction
from random import Random
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from atp_utils import resolve
from atp_utils.problems import families
from atp_utils.support import files

MAX_STEPS, MAX_NUMBER, MAX_WORDS = 3, 1000, 50  # numbers stay below MAX_NUMBER
TRIES = 10_000

NAMES = """Ada Ben Carla Dev Elif Farah George Hana Ivan Jia Kofi Lena Mateo Nadia Omar Priya Quinn Rosa Sven
Tara Umar Vera Will Ximena Yusuf Zoe""".split()
THINGS = """apples beads books buttons candles cards cookies marbles oranges pencils postcards shells stamps
stickers stones tickets""".split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}


class Template(BaseModel):
    """One entry of ``data/environments/{simple,complex}_problems.yaml``; the files explain the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    text: str
    ranges: dict[str, Annotated[list[int], Field(min_length=2)]] = {}
    steps: list[Annotated[str, Field(pattern=r"^\w+ [-+*/] \w+$")]] = []

    def numbers(self, rng: Random) -> dict[str, Any]:
        """A number, list or matrix from each range."""
        return {name: _number(rng, *bounds) for name, bounds in self.ranges.items()}


def _number(rng: Random, low: int, high: int, *sizes: int) -> int | list:
    return [_number(rng, low, high, *sizes[1:]) for _ in range(sizes[0])] if sizes else rng.randint(low, high)


def _read(kind: str) -> dict[str, Template]:
    found = files.read_named(resolve(f"data/environments/{kind}_problems.yaml"), Template, "templates")
    return {template.name: template for template in found}


TEMPLATES = {kind: _read(kind) for kind in ("simple", "complex")}


class _Wording(string.Formatter):
    """Lists as "1, 2 and 3" or joined by the field's format, matrices as "1 2; 3 4"."""

    def format_field(self, value: Any, joint: str) -> str:
        if not isinstance(value, list):
            return str(value)
        if isinstance(value[0], list):
            return "; ".join(" ".join(map(str, row)) for row in value)
        head = ", ".join(map(str, value[:-1]))
        return joint.join(map(str, value)) if joint else f"{head} and {value[-1]}"


def _solution(template: Template, numbers: dict[str, int]) -> tuple[str, str] | None:
    """The last result and the Python of all steps; None if one isn't a whole number from 1 to MAX_NUMBER - 1."""
    known, code = dict(numbers), ""
    for index, step in enumerate(template.steps, 1):
        left, operation, right = step.split()
        a, b = (int(known.get(name, name)) for name in (left, right))
        result = Fraction(OPERATIONS[operation](a, b))
        if result.denominator > 1 or not 0 < result < MAX_NUMBER:
            return None
        known[f"r{index}"] = int(result)
        code += f"r{index} = {a} {operation} {b}\n"
    return str(result), f"{code}print(r{index})\n"


def draw_simple(template: Template, rng: Random) -> tuple[str, str, str]:
    """Question, answer, and Python that prints it.

    Numbers are drawn anew until every result is whole and in range, and the answer isn't simply one of the numbers in
    the question. RuntimeError if no draw of `TRIES` does that (a fault of the template).
    """
    who, other = rng.sample(NAMES, 2)
    words = dict(who=who, other=other, things=rng.choice(THINGS))
    for _ in range(TRIES):
        numbers = template.numbers(rng)
        question, found = template.text.format(**words, **numbers), _solution(template, numbers)
        if found and found[0] not in re.findall(r"\d+", question):
            return question, *found
    raise RuntimeError(f"template {template.name!r}: no admissible numbers in {TRIES} draws")


def draw_complex(template: Template, rng: Random) -> tuple[str, str, str]:
    """Question, answer, and Python that prints it: the solver's source, which stands on its own, and a call."""
    name, solver = template.name, getattr(families, template.name)
    numbers = template.numbers(rng) or getattr(families, f"draw_{name}")(rng)
    question = _Wording().vformat(template.text, (), numbers)
    call = f"{name}({', '.join(f'{key}={value!r}' for key, value in numbers.items())})"
    return question, str(solver(**numbers)), f"{inspect.getsource(solver)}\n\nprint({call})\n"


DRAW = {"simple": draw_simple, "complex": draw_complex}
