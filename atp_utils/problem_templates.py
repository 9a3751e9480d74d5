"""Templates of simple word problems, known by construction (paper, Appendix A.1.2).

The paper takes its simple problems from GSM8K: "basic arithmetic operations (<= 3 computational steps,
numbers < 1000, <= 50 words)". These templates stand in for them where the hub can't be reached. A template
states its steps, so that the rule holds for every intermediate result and not only for what is printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random

MAX_STEPS, MAX_NUMBER, MAX_WORDS = 3, 1000, 50  # numbers stay below MAX_NUMBER

NAMES = """Ada Ben Carla Dev Elif Farah George Hana Ivan Jia Kofi Lena Mateo Nadia Omar Priya Quinn Rosa Sven
Tara Umar Vera Will Ximena Yusuf Zoe""".split()
THINGS = """apples beads books buttons candles cards cookies marbles oranges pencils postcards shells stamps
stickers stones tickets""".split()

Step = tuple[int, str, int, int]  # left operand, operation, right operand, result


@dataclass(frozen=True)
class Template:
    """Question text, the range each number is drawn from, and the steps; r1, r2, r3 name their results."""

    text: str
    draw: dict[str, tuple[int, int]]
    steps: tuple[str, ...]


def _template(text: str, ranges: str, steps: str) -> Template:
    """A template from "a 2-9; b 10-50" and "a * b; r1 + 3"."""
    named = (item.split() for item in ranges.split("; "))
    draw = {name: (int(low), int(high)) for name, (low, high) in ((n, r.split("-")) for n, r in named)}
    return Template(text, draw, tuple(steps.split("; ")))


TEMPLATES: dict[str, Template] = {
    "change": _template(
        "{who} buys {a} {things} at {b} dollars each and pays with {c} dollars. How many dollars of change "
        "does {who} get?",
        "a 2-15; b 2-15; c 20-250",
        "a * b; c - r1",
    ),
    "two_purchases": _template(
        "{who} buys {a} pens at {b} dollars each and {c} notebooks at {d} dollars each. How many dollars "
        "does {who} pay in total?",
        "a 2-12; b 2-9; c 2-12; d 3-15",
        "a * b; c * d; r1 + r2",
    ),
    "shared_boxes": _template(
        "A school receives {a} boxes with {b} {things} each and shares them equally among {c} classes. How "
        "many {things} does each class get?",
        "a 2-24; b 6-40; c 2-12",
        "a * b; r1 / c",
    ),
    "saving": _template(
        "{who} has {a} dollars and saves {b} dollars every week. How many dollars does {who} have after {c} weeks?",
        "a 5-300; b 3-40; c 3-15",
        "b * c; a + r1",
    ),
    "weeks_to_goal": _template(
        "{who} wants to buy a bicycle for {a} dollars, has {b} dollars already and saves {c} dollars a "
        "week. In how many weeks will {who} have enough?",
        "a 100-600; b 10-200; c 5-40",
        "a - b; r1 / c",
    ),
    "pages_left": _template(
        "A book has {c} pages. {who} reads {a} pages a day for {b} days. How many pages are left?",
        "a 5-45; b 3-14; c 80-600",
        "a * b; c - r1",
    ),
    "days_to_finish": _template(
        "A book has {a} pages. {who} has read {b} of them and reads {c} pages a day from now on. How many "
        "more days does {who} need to finish the book?",
        "a 100-600; b 10-300; c 5-45",
        "a - b; r1 / c",
    ),
    "twice_as_many": _template(
        "{who} has {a} {things}. {other} has twice as many and gives {b} of them away. How many {things} "
        "does {other} have left?",
        "a 5-300; b 2-200",
        "a * 2; r1 - b",
    ),
    "three_days": _template(
        "{who} picks {a} flowers on Monday, {b} on Tuesday, and on Wednesday three times as many as on "
        "Tuesday. How many flowers does {who} pick in all?",
        "a 3-200; b 3-150",
        "b * 3; a + b; r1 + r2",
    ),
    "bus": _template(
        "A bus leaves with {a} passengers. At the first stop {b} get off and {c} get on. At the second "
        "stop {d} get off. How many passengers are on the bus now?",
        "a 15-60; b 2-20; c 2-25; d 2-20",
        "a - b; r1 + c; r2 - d",
    ),
    "wages": _template(
        "{who} earns {a} dollars an hour and works {b} hours a day. How many dollars does {who} earn in {c} days?",
        "a 8-30; b 2-9; c 2-7",
        "a * b; r1 * c",
    ),
    "train": _template(
        "A train runs at {a} kilometers an hour for {b} hours and then at {c} kilometers an hour for {d} "
        "hours. How many kilometers does it run?",
        "a 40-150; b 2-5; c 40-150; d 2-5",
        "a * b; c * d; r1 + r2",
    ),
    "fence": _template(
        "A rectangular garden is {a} meters long and {b} meters wide. A fence costs {c} dollars a meter. "
        "How many dollars does a fence around the whole garden cost?",
        "a 5-60; b 4-50; c 2-15",
        "a + b; r1 * 2; r2 * c",
    ),
    "tiles": _template(
        "A floor {a} feet long and {b} feet wide is covered with tiles of one square foot. A box holds {c} "
        "tiles. How many boxes are needed?",
        "a 6-40; b 5-24; c 4-30",
        "a * b; r1 / c",
    ),
    "third_off": _template(
        "A coat costs {a} dollars. Its price is reduced by one third, and {who} has a coupon for another "
        "{b} dollars off. How many dollars does {who} pay?",
        "a 30-600; b 5-60",
        "a / 3; a - r1; r2 - b",
    ),
    "percent": _template(
        "{who} has {a} marbles, and {b} percent of them are red. How many of the marbles are not red?",
        "a 10-98; b 4-90",
        "a * b; r1 / 100; a - r2",
    ),
    "cartons": _template(
        "A farm collects {a} eggs on every day of the week and packs all of them in cartons of {b}. How "
        "many cartons does it fill in a week?",
        "a 12-140; b 4-30",
        "a * 7; r1 / b",
    ),
    "age_later": _template(
        "{who} is {a} years old. {other} is {b} years older than {who}. How old will {other} be in {c} years?",
        "a 5-50; b 2-25; c 2-20",
        "a + b; r1 + c",
    ),
    "recipe": _template(
        "A recipe for {a} cookies needs {b} spoons of sugar. How many spoons of sugar are needed for {c} cookies?",
        "a 6-30; b 2-12; c 30-480",
        "c / a; r1 * b",
    ),
    "machine": _template(
        "A machine makes {a} parts in {b} minutes. At this rate, how many parts does it make in {c} minutes?",
        "a 20-400; b 4-30; c 5-90",
        "a / b; r1 * c",
    ),
    "crates": _template(
        "A shop gets {a} crates with {b} bottles each. {c} bottles are broken, and the rest are sold for "
        "{d} dollars each. How many dollars does the shop take in?",
        "a 2-12; b 6-24; c 2-20; d 2-9",
        "a * b; r1 - c; r2 * d",
    ),
    "profit": _template(
        "{who} buys {a} {things} for {b} dollars each and sells all of them for {c} dollars each. How many "
        "dollars of profit does {who} make?",
        "a 4-80; b 2-20; c 3-40",
        "c - b; r1 * a",
    ),
    "seats": _template(
        "A theater has {a} rows with {b} seats each. Tonight {c} seats stay empty. How many people are in "
        "the audience if each has one seat?",
        "a 5-30; b 8-30; c 5-120",
        "a * b; r1 - c",
    ),
    "teams": _template(
        "{a} girls and {b} boys are put into teams of {c}. Each team needs {d} balls. How many balls are "
        "needed in total?",
        "a 8-90; b 8-90; c 3-12; d 2-9",
        "a + b; r1 / c; r2 * d",
    ),
    "average": _template(
        "{who} scores {a}, {b} and {c} points in three games. What is the average number of points per game?",
        "a 10-99; b 10-99; c 10-99",
        "a + b; r1 + c; r2 / 3",
    ),
    "half_given": _template(
        "{who} has {a} {things}, gives half of them to {other} and then loses {b}. How many {things} does "
        "{who} have now?",
        "a 20-600; b 2-150",
        "a / 2; r1 - b",
    ),
    "tank": _template(
        "An empty tank holds {a} liters. Every minute {b} liters flow in and {c} liters flow out. After "
        "how many minutes is the tank full?",
        "a 60-900; b 10-60; c 2-40",
        "b - c; a / r1",
    ),
    "movies": _template(
        "A streaming plan costs {a} dollars a month and {b} dollars for each new movie. How many dollars "
        "does {who} pay in a month with {c} new movies?",
        "a 5-40; b 2-12; c 2-20",
        "b * c; a + r1",
    ),
    "range": _template(
        "A car goes {a} miles on a gallon, and its tank holds {b} gallons. Since it was filled up the car "
        "has gone {c} miles. How many more miles can it go?",
        "a 15-50; b 8-20; c 20-600",
        "a * b; r1 - c",
    ),
    "ribbon": _template(
        "{who} cuts a ribbon of {a} centimeters into pieces of {b} centimeters and uses {c} of the pieces. "
        "How many pieces are left?",
        "a 60-900; b 4-30; c 2-40",
        "a / b; r1 - c",
    ),
    "parking": _template(
        "A parking garage charges {a} dollars for the first hour and {b} dollars for every further hour. "
        "How many dollars does it cost to park for {c} hours?",
        "a 3-20; b 2-15; c 3-24",
        "c - 1; r1 * b; r2 + a",
    ),
    "legs": _template(
        "There are {a} cows and {b} chickens on a farm. How many legs do the animals have in all?",
        "a 3-120; b 3-200",
        "a * 4; b * 2; r1 + r2",
    ),
    "coins": _template(
        "{who} has {a} nickels of 5 cents and {b} dimes of 10 cents. How many cents is that in all?",
        "a 3-90; b 3-50",
        "a * 5; b * 10; r1 + r2",
    ),
    "bags": _template(
        "{who} bakes {a} cookies, eats {b} of them and packs the rest equally into {c} bags. How many "
        "cookies are in each bag?",
        "a 20-400; b 2-30; c 3-20",
        "a - b; r1 / c",
    ),
}


def _operate(left: int, operation: str, right: int) -> int | None:
    """The result as a whole number from 1 to MAX_NUMBER - 1, else `None`."""
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": Fraction(left, right)}[operation]
    return int(exact) if exact == int(exact) and 0 < exact < MAX_NUMBER else None


def _work_out(template: Template, numbers: dict[str, int]) -> list[Step] | None:
    """Every step with its operands and result; `None` if one isn't a whole number in range."""
    known, worked = dict(numbers), []
    for index, step in enumerate(template.steps, 1):
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
