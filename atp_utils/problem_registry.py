"""The registry of complex problem families, and what every family offers (paper, Appendix A.1.2).

A family draws parameters, words the question and answers it twice: `solve` and `check` share no method, and
`answer` raises where they disagree. `solve` stands on its own, so that `program` can show it as a
tool-assisted solution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from atp_utils.answers import exact

Params = dict[str, Any]
Solver = Callable[..., int | float]


@dataclass(frozen=True)
class Family:
    """`make(rng)` -> parameters; `text(**parameters)` -> question; `solve`, `check` -> its one answer."""

    make: Callable[[Random], Params]
    text: Callable[..., str]
    solve: Solver
    check: Solver


FAMILIES: dict[str, Family] = {}


def family(check: Solver, make: Callable[[Random], Params], text: Callable[..., str]):
    """Register the decorated solver as a family under its own name."""

    def register(solve: Solver) -> Solver:
        FAMILIES[solve.__name__] = Family(make, text, solve, check)
        return solve

    return register


def answer(name: str, params: Params) -> Fraction:
    """The answer both solvers give, exactly; RuntimeError names family and parameters if they disagree."""
    first, second = exact(FAMILIES[name].solve(**params)), exact(FAMILIES[name].check(**params))
    if first is None or first != second:
        raise RuntimeError(f"family {name!r}: the solvers disagree on {params}: {first} and {second}")
    return first


def program(name: str, params: Params) -> str:
    """Python that prints the answer, with the standard library alone: the source of `solve` and a call."""
    source = inspect.getsource(FAMILIES[name].solve)
    body = source[source.index("\ndef ") + 1 :]  # without the decorator
    return f"{body}\n\nprint({name}({', '.join(f'{key}={value!r}' for key, value in params.items())}))\n"


def listed(items: Iterable[Any]) -> str:
    """ "1, 2 and 3"."""
    *head, last = map(str, items)
    return f"{', '.join(head)} and {last}" if head else last


def rows(matrix: Iterable[Iterable[int]]) -> str:
    """A matrix in one line: "1 2; 3 4"."""
    return "; ".join(" ".join(map(str, row)) for row in matrix)
