"""Maths problems of the tool-use scenario: sources, filters, loading and writing (paper, Appendix A.1.2).

The paper draws 500 simple problems from GSM8K (<= 3 calculation steps, numbers < 1000, <= 50 words) and 300 complex
ones from OpenThoughts (algorithmic, combinatorial, algebraic; one numeric answer). It names neither the rows nor the
code of its filter. Three sources:

- ``generated`` (default, offline): `templates` and `families`, balanced over them;
- ``hub``: the paper's two data sets from the Hugging Face hub, filtered as above;
- the path of a JSONL file: rows of GSM8K or OpenThoughts, filtered in the same way, or our own format, as is.

A malformed row of a file is an error that names file and line. Rows that a filter drops are counted by reason.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from atp_utils import resolve, shown
from atp_utils.evolution.requests import derive_seed
from atp_utils.problems.answers import canonical, parse_number
from atp_utils.problems.filters import Gsm8k, OpenThoughts
from atp_utils.problems.templates import DRAW, TEMPLATES
from atp_utils.support import files

NotBlank = Annotated[str, Field(pattern=r"\S")]
HUB = {"simple": ("openai/gsm8k", "main"), "complex": ("open-thoughts/OpenThoughts-114k", "metadata")}


class Problem(BaseModel):
    """One problem, and a line of our own format. `answer` is the exact truth: "42", "2.125", "1/3", or a number.

    `id` is unique to the question's wording; `family` is its template, family or topic. Raises ValueError for
    an unknown kind, an empty question or an answer that isn't one number.
    """

    model_config = ConfigDict(frozen=True)
    id: NotBlank
    kind: Literal["simple", "complex"]
    family: str
    question: NotBlank
    answer: str
    source: str

    @field_validator("answer", mode="before")
    @classmethod
    def _one_number(cls, answer: Any) -> str:
        value = parse_number(str(answer))
        if value is None:
            raise ValueError("expected one number")
        return canonical(value)


def _wording(question: str) -> str:
    return " ".join(question.split()).casefold()


def make_problem(kind: str, family: str, question: str, answer: Any, source: str) -> Problem:
    """A problem whose id follows from its question, so that the same question has the same id everywhere."""
    digest = f"{derive_seed('problem', _wording(question)):016x}"
    return Problem(id=f"{kind}-{digest}", kind=kind, family=family, question=question, answer=answer, source=source)


def generate(kind: str, n: int, seed: int) -> list[tuple[Problem, str]]:
    """`n` problems with different questions, each with Python that prints its answer (a tool-assisted solution).

    Equally many from every template or family (give or take one), in turn; the first m of n problems are the m problems
    of the same seed. The program needs the standard library only. ValueError when a family has no new questions left.
    """
    names = sorted(TEMPLATES[kind])
    Random(derive_seed("problem families", kind, seed)).shuffle(names)
    drawn, seen = [], set()
    for index, name in zip(range(n), itertools.cycle(names), strict=False):
        for attempt in range(200):
            rng = Random(derive_seed("problems", kind, seed, index, attempt))
            question, answer, code = DRAW[kind](TEMPLATES[kind][name], rng)
            if question not in seen:
                break
        else:
            raise ValueError(f"{n} {kind} problems: {name!r} has no new questions after {index} problems")
        seen.add(question)
        drawn.append((make_problem(kind, name, question, answer, "generated"), code))
    return drawn


def _row(row: Any, kind: str) -> Problem | Gsm8k | OpenThoughts:
    own = isinstance(row, dict) and "kind" in row
    return (Problem if own else {"simple": Gsm8k, "complex": OpenThoughts}[kind]).model_validate(row)


def _file_rows(path: Path, kind: str) -> Iterator[Problem | Gsm8k | OpenThoughts]:
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file (problem source: generated, hub or a JSONL file)")
    return (row for _, row in files.each_line(path, path.read_bytes(), lambda line: _row(json.loads(line), kind)))


def _hub_rows(kind: str) -> Iterator[Gsm8k | OpenThoughts]:
    from datasets import load_dataset

    # Streamed: the second data set is 2.5 GB, and of its columns only three short ones are kept.
    return (_row(row, kind) for row in load_dataset(*HUB[kind], split="train", streaming=True))


def load(kind: str, n: int, source: str | Path, seed: int = 0) -> tuple[list[Problem], dict[str, int]]:
    """`n` problems of a kind ("simple" or "complex"), and the counts of rows read, kept and dropped by reason.

    From the hub or a file; the n problems are a sample fixed by seed and wording, whatever the order of the rows.
    ValueError if n problems can't be had or a row is malformed, FileNotFoundError, or what the hub's client raises.
    """
    if source == "hub":
        rows, name = _hub_rows(kind), HUB[kind][0]
    else:
        rows, name = _file_rows(resolve(source), kind), Path(source).name
    found, counts = {}, Counter(rows=0, kept=0)
    for row in rows:
        counts["rows"] += 1
        if isinstance(row, Problem):
            result = row if row.kind == kind else "of the other kind"
        elif not isinstance(result := row.kept(), str):
            result = make_problem(kind, *result, name)
        if not isinstance(result, str) and found.setdefault(_wording(result.question), result) is not result:
            result = "duplicate"
        counts[result if isinstance(result, str) else "kept"] += 1
    if len(found) < n:
        raise ValueError(f"{name}: {n} {kind} problems asked for, {len(found)} found; counts: {dict(counts)}")
    ranked = sorted(found.values(), key=lambda problem: derive_seed("sample", seed, problem.id))
    return ranked[:n], dict(counts)


def split_problems(problems: list[Problem], n_test: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, test) problems, all of different questions; test holds each family's share, order is kept.

    Who lands where depends on seed, family and wording, not on order. ValueError if `n_test` isn't between 1 and
    len(problems) - 1.
    """
    if not 0 < n_test < len(problems):
        raise ValueError(f"n_test: expected 1 to {len(problems) - 1}, got {n_test}")
    ranked = sorted(problems, key=lambda problem: derive_seed("split", seed, problem.id))
    sizes, place, share = Counter(problem.family for problem in problems), Counter(), {}
    for problem in ranked:
        place[problem.family] += 1
        share[problem.id] = place[problem.family] / sizes[problem.family]
    test = {problem.id for problem in sorted(ranked, key=lambda problem: share[problem.id])[:n_test]}
    return [p for p in problems if p.id not in test], [p for p in problems if p.id in test]
