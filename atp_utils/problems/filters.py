"""The paper's filters on rows of GSM8K and OpenThoughts (Appendix A.1.2): a row in, a problem or a reason out.

Pure functions: they read no file and count nothing. A row's keys and types have been checked before.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from atp_utils.problems.answers import boxed, extract_answer, parse_number
from atp_utils.problems.templates import MAX_NUMBER, MAX_STEPS, MAX_WORDS

NO_ANSWER = "no single numeric answer"
Row = dict[str, Any]

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_ANNOTATION = re.compile(r"<<(.*?)>>")
_UNFIT = re.compile(r"\b(?:prove|show that|figure|diagram)\b|\[asy\]|!\[", re.IGNORECASE)
# Our reading of the paper's three topics; the first that matches is the problem's family.
_TOPICS = {
    "combinatorics": r"how many|number of ways|permutation|combination|probabilit|arrange|subset|\bways\b",
    "algorithmic": r"remainder|modulo|divisib|digit|sequence|recursi|prime|divisor|integer|\bgcd\b|\blcm\b",
    "algebra": r"polynomial|equation|\broots?\b|matri|determinant|logarithm|\\log|function|real number|solve",
}


class Kept(NamedTuple):
    """What a filter takes from a row; a row that it drops gives the reason as text instead."""

    family: str
    question: str
    value: Fraction


def _numbers(text: str) -> Iterator[float]:
    return (float(number.replace(",", "")) for number in _NUMBER.findall(text))


def from_gsm8k(row: Row, allow_unannotated: bool = False) -> Kept | str:
    """The paper's rule for simple problems on a row with GSM8K's keys `question` and `answer`.

    A step is one annotation `<<...>>`. A solution without any has an unknown number of steps, and many of these
    solve an equation: they are dropped unless `allow_unannotated`.
    """
    question, solution = row["question"], row["answer"]
    steps = _ANNOTATION.findall(solution)
    value = parse_number(solution.rpartition("####")[2]) if "####" in solution else None
    if value is None:
        return NO_ANSWER
    if len(steps) > MAX_STEPS:
        return f"more than {MAX_STEPS} steps"
    if not steps and not allow_unannotated:
        return "steps not annotated"
    if abs(value) >= MAX_NUMBER or any(x >= MAX_NUMBER for text in (question, *steps) for x in _numbers(text)):
        return f"a number not below {MAX_NUMBER}"
    if len(question.split()) > MAX_WORDS:
        return f"more than {MAX_WORDS} words"
    return Kept(f"gsm8k_{len(steps)}_steps", question, value)


def true_number(solution: str) -> Fraction | None:
    r"""The one number that a reference solution gives: all its `\boxed{}` agree, or it is or marks a number."""
    boxes = {parse_number(box) if box else None for box in boxed(solution)}
    if boxes:
        return boxes.pop() if len(boxes) == 1 else None
    bare = parse_number(solution)
    return extract_answer(solution) if bare is None else bare


def from_openthoughts(row: Row) -> Kept | str:
    """The paper's rule for complex problems on a row of OpenThoughts' `metadata` configuration.

    Its columns `problem`, `ground_truth_solution` and `domain` are read. Proofs and problems that need a figure
    are dropped, as is what shows no sign of the three topics (by key words: the paper doesn't say how).
    """
    question, solution = row["problem"], row["ground_truth_solution"] or ""
    if row["domain"] != "math":
        return "not mathematics"
    if _UNFIT.search(question):
        return "needs a proof or a figure"
    family = next((t for t, words in _TOPICS.items() if re.search(words, question, re.IGNORECASE)), None)
    if family is None:
        return "another topic"
    value = true_number(solution)
    return NO_ANSWER if value is None else Kept(family, question, value)
