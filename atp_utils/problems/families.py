"""Families of complex problems, and what each offers (paper, Appendix A.1.2); `counting` and `algebra` hold them.

A family draws parameters, words the question and answers it. `solve` stands on its own, so that `program` can show it
as a tool-assisted solution; tests hold it against a second solver that shares no method with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

Params = dict[str, Any]
Solver = Callable[..., int | float]


@dataclass(frozen=True)
class Family:
    """`make(rng)` -> parameters; `text(**parameters)` -> question; `solve(**parameters)` -> its one answer."""

    make: Callable[[Random], Params]
    text: Callable[..., str]
    solve: Solver


FAMILIES: dict[str, Family] = {}


def family(make: Callable[[Random], Params], text: Callable[..., str]):
    """Register the decorated solver as a family under its own name."""

    def register(solve: Solver) -> Solver:
        FAMILIES[solve.__name__] = Family(make, text, solve)
        return solve

    return register


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
