"""The paper's filters on rows of GSM8K and OpenThoughts (Appendix A.1.2): a row in, a problem or a reason out."""

import re
from fractions import Fraction

from pydantic import BaseModel

from atp_utils.problems.answers import boxed, extract_answer, parse_number
from atp_utils.problems.templates import MAX_NUMBER, MAX_STEPS, MAX_WORDS

NO_ANSWER = "no single numeric answer"

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_ANNOTATION = re.compile(r"<<(.*?)>>")
_UNFIT = re.compile(r"\b(?:prove|show that|figure|diagram)\b|\[asy\]|!\[", re.IGNORECASE)
# Our reading of the paper's three topics; the first that matches is the problem's family.
_TOPICS = {
    "combinatorics": r"how many|number of ways|permutation|combination|probabilit|arrange|subset|\bways\b",
    "algorithmic": r"remainder|modulo|divisib|digit|sequence|recursi|prime|divisor|integer|\bgcd\b|\blcm\b",
    "algebra": r"polynomial|equation|\broots?\b|matri|determinant|logarithm|\\log|function|real number|solve",
}
# What a filter takes from a row: family, question and answer; a row that it drops gives the reason as text instead.
Kept = tuple[str, str, Fraction]


class Gsm8k(BaseModel):
    """A row of GSM8K; a solution's steps are annotated ``<<2+1=3>>``, and ``#### 3`` marks its answer."""

    question: str
    answer: str

    def kept(self) -> Kept | str:
        """The paper's rule for simple problems.

        A solution without annotations has an unknown number of steps, and many of these solve an equation: dropped.
        """
        steps = _ANNOTATION.findall(self.answer)
        value = parse_number(self.answer.rpartition("####")[2]) if "####" in self.answer else None
        numbers = [number.replace(",", "") for text in (self.question, *steps) for number in _NUMBER.findall(text)]
        if value is None:
            return NO_ANSWER
        if len(steps) > MAX_STEPS:
            return f"more than {MAX_STEPS} steps"
        if not steps:
            return "steps not annotated"
        if abs(value) >= MAX_NUMBER or any(float(number) >= MAX_NUMBER for number in numbers):
            return f"a number not below {MAX_NUMBER}"
        if len(self.question.split()) > MAX_WORDS:
            return f"more than {MAX_WORDS} words"
        return f"gsm8k_{len(steps)}_steps", self.question, value


class OpenThoughts(BaseModel):
    """A row of OpenThoughts' configuration ``metadata``, which has further columns."""

    problem: str
    ground_truth_solution: str | None = None
    domain: str

    def kept(self) -> Kept | str:
        """The paper's rule for complex problems.

        Proofs and problems that need a figure are dropped, as is what shows no sign of the three topics (by key words:
        the paper doesn't say how).
        """
        if self.domain != "math":
            return "not mathematics"
        if _UNFIT.search(self.problem):
            return "needs a proof or a figure"
        family = next((t for t, words in _TOPICS.items() if re.search(words, self.problem, re.IGNORECASE)), None)
        if family is None:
            return "another topic"
        value = true_number(self.ground_truth_solution or "")
        return NO_ANSWER if value is None else (family, self.problem, value)


def true_number(solution: str) -> Fraction | None:
    r"""The one number that a reference solution gives: all its `\boxed{}` agree, or it is or marks a number."""
    boxes = {parse_number(box) if box else None for box in boxed(solution)}
    if boxes:
        return boxes.pop() if len(boxes) == 1 else None
    bare = parse_number(solution)
    return extract_answer(solution) if bare is None else bare
