"""Maths problems of the tool-use scenario: sources, filters, loading and writing (paper, Appendix A.1.2).

The paper draws 500 simple problems from GSM8K (<= 3 calculation steps, numbers < 1000, <= 50 words) and 300
complex ones from OpenThoughts (algorithmic, combinatorial, algebraic; one numeric answer). It names neither
the rows nor the code of its filter. Three sources:

- ``generated`` (default, offline): `templates`, and the families of `counting` and `algebra`, balanced over them;
- ``hub``: the paper's two data sets from the Hugging Face hub, filtered as above;
- the path of a JSONL file: rows of GSM8K or OpenThoughts, filtered in the same way, or our own format, as is.

In a file, malformed JSON, a missing key or a value of the wrong type is an error that names file and line.
Rows that a filter drops, among them those without a single numeric answer, are counted by reason.
"""

import codecs
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from atp_utils import resolve, shown
from atp_utils.evolution.requests import derive_seed
from atp_utils.problems import algebra, counting  # noqa: F401  importing them registers their families
from atp_utils.problems.answers import canonical, exact, parse_number
from atp_utils.problems.families import FAMILIES, program
from atp_utils.problems.filters import Row, from_gsm8k, from_openthoughts
from atp_utils.problems.templates import TEMPLATES, draft
from atp_utils.support import files

KINDS = ("simple", "complex")
HUB = {"simple": ("openai/gsm8k", "main"), "complex": ("open-thoughts/OpenThoughts-114k", "metadata")}


@dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the exact numeric truth as text ("42", "2.125", "1/3"); `value` is the number.

    `id` is unique to the question's wording; `family` is its template, family or topic. Raises ValueError for
    an unknown kind, an empty question or an answer that isn't one number.
    """

    id: str
    kind: str
    family: str
    question: str
    answer: str
    source: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in asdict(self).values()):
            raise ValueError("expected text in every field of a problem")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.id or not self.question.strip():
            raise ValueError("id and question: expected text, got none")
        if parse_number(self.answer) is None:
            raise ValueError(f"answer: expected one number, got {self.answer[:80]!r}")

    @property
    def value(self) -> Fraction:
        return parse_number(self.answer)


def _wording(question: str) -> str:
    return " ".join(question.split()).casefold()


def make_problem(kind: str, family: str, question: str, value: Fraction, source: str) -> Problem:
    """A problem whose id follows from its question, so that the same question has the same id everywhere."""
    digest = f"{derive_seed('problem', _wording(question)):016x}"
    return Problem(f"{kind}-{digest}", kind, family, question, canonical(value), source)


# --- generated -------------------------------------------------------------------------------------------


def _draw(kind: str, name: str, rng: Random) -> tuple[str, Fraction, str]:
    """Question, answer, and Python that prints the answer."""
    if kind == "simple":
        question, steps = draft(name, rng)
        code = "".join(f"r{i} = {a} {op} {b}\n" for i, (a, op, b, _) in enumerate(steps, 1))
        return question, Fraction(steps[-1][3]), f"{code}print(r{len(steps)})\n"
    params = FAMILIES[name].make(rng)
    return FAMILIES[name].text(**params), exact(FAMILIES[name].solve(**params)), program(name, params)


def generate(kind: str, n: int, seed: int) -> list[tuple[Problem, str]]:
    """`n` problems with different questions, each with Python that prints its answer (a tool-assisted solution).

    Equally many from every template or family (give or take one), in turn; the first m of n problems are the m
    problems of the same seed. The program needs the standard library only. ValueError when a family has no new
    questions left.
    """
    names = sorted({"simple": TEMPLATES, "complex": FAMILIES}[kind])
    Random(derive_seed("problem families", kind, seed)).shuffle(names)
    drawn, seen = [], set()
    for index, name in zip(range(n), itertools.cycle(names), strict=False):
        for attempt in range(200):
            question, value, code = _draw(kind, name, Random(derive_seed("problems", kind, seed, index, attempt)))
            if question not in seen:
                break
        else:
            raise ValueError(f"{n} {kind} problems: {name!r} has no new questions after {index} problems")
        seen.add(question)
        drawn.append((make_problem(kind, name, question, value, "generated"), code))
    return drawn


# --- rows --------------------------------------------------------------------------------------------------


def _local_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) for each line of a JSONL file that isn't blank; `where` names file and line for errors."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file (problem source: generated, hub or a JSONL file)")
    yield from files.each_line(path, path.read_bytes().removeprefix(codecs.BOM_UTF8), _row)


def _row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _hub_rows(kind: str, split: str, revision: str | None, load: Callable | None) -> Iterator[tuple[str, Row]]:
    path, config = HUB[kind]
    try:
        if load is None:
            from datasets import load_dataset as load
        # Streamed: the second data set is 2.5 GB, and of its columns only three short ones are kept.
        rows = load(path, config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows):
            yield f"{path} ({config}, {split}), row {number}", row
    except Exception as error:  # the network, the hub's client and pyarrow share no base class
        raise RuntimeError(
            f"source 'hub': {path} could not be read ({type(error).__name__}: {error}); "
            "use source 'generated' or a JSONL file"
        ) from error


def _texts(row: Row, keys: Iterable[str], where: str, optional: tuple[str, ...] = ()) -> None:
    for key in keys:
        if key not in row:
            raise ValueError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(row[key], str) and not (key in optional and row[key] is None):
            raise ValueError(f"{where}: {key}: expected text, got {str(row[key])[:80]!r}")


def _own(row: Row, where: str) -> Problem:
    keys = ("id", "kind", "family", "question", "source")
    _texts(row, keys, where)
    value = exact(row.get("answer"))
    if value is None:
        raise ValueError(f"{where}: answer: expected one number, got {str(row.get('answer'))[:80]!r}")
    try:
        return Problem(answer=canonical(value), **{key: row[key] for key in keys})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def convert(row: Row, kind: str, source: str, where: str, allow_unannotated: bool = False) -> Problem | str:
    """The problem in a row of any known format, or why it is dropped; ValueError naming `where` if malformed."""
    if "kind" in row:
        problem = _own(row, where)
        return problem if problem.kind == kind else "of the other kind"
    if "problem" in row and kind == "complex":
        _texts(row, ("problem", "ground_truth_solution", "domain"), where, optional=("ground_truth_solution",))
        result = from_openthoughts(row)
    elif kind == "complex":
        raise ValueError(f"{where}: expected a complex problem, found the keys {', '.join(map(repr, row))}")
    else:
        _texts(row, ("question", "answer"), where)
        result = from_gsm8k(row, allow_unannotated)
    return result if isinstance(result, str) else make_problem(kind, *result, source)


# --- loading -----------------------------------------------------------------------------------------------


def load(
    kind: str,
    n: int | None,
    source: str | Path = "generated",
    seed: int = 0,
    *,
    split: str = "train",
    revision: str | None = None,
    max_rows: int | None = None,
    allow_unannotated: bool = False,
    load_dataset: Callable | None = None,
) -> tuple[list[Problem], dict[str, int]]:
    """`n` problems of a kind ("simple" or "complex"), and the counts of rows read, kept and dropped by reason.

    From a file or the hub (`split`, `revision`: there only) the n problems are a sample fixed by seed and wording,
    whatever the order of the rows; `n` None takes all. `max_rows` ends the reading early. Raises ValueError if n
    problems can't be had or a row is malformed, FileNotFoundError, or RuntimeError if the hub can't be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if n is not None and n < 1 or n is None and source == "generated":
        raise ValueError(f"n: expected a whole number >= 1, got {n!r}")
    if source == "generated":
        return [problem for problem, _ in generate(kind, n, seed)], {"rows": n, "kept": n}
    if source == "hub":
        rows, name = _hub_rows(kind, split, revision, load_dataset), HUB[kind][0]
    else:
        rows, name = _local_rows(resolve(source)), Path(source).name
    found: dict[str, Problem] = {}
    counts = Counter(rows=0, kept=0)
    for where, row in itertools.islice(rows, max_rows):
        counts["rows"] += 1
        result = convert(row, kind, name, where, allow_unannotated)
        if not isinstance(result, str) and found.setdefault(_wording(result.question), result) is not result:
            result = "duplicate"
        counts["kept" if not isinstance(result, str) else result] += 1
    logging.getLogger(__name__).info("%s: %s", name, dict(counts))
    if len(found) < (n or 1):
        raise ValueError(f"{name}: {n or 1} {kind} problems asked for, {len(found)} found; counts: {dict(counts)}")
    ranked = sorted(found.values(), key=lambda problem: derive_seed("sample", seed, problem.id))
    return ranked[:n], dict(counts)


def split_problems(problems: list[Problem], n_test: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, test) problems without a common question; test holds each family's share, order is kept.

    Who lands where depends on seed, family and wording, not on order. ValueError if a question occurs twice or
    `n_test` isn't between 1 and len(problems) - 1.
    """
    if not 0 < n_test < len(problems):
        raise ValueError(f"n_test: expected 1 to {len(problems) - 1}, got {n_test}")
    if len({_wording(problem.question) for problem in problems}) < len(problems):
        raise ValueError("problems: a question occurs more than once, so it could land on both sides")
    ranked = sorted(problems, key=lambda problem: derive_seed("split", seed, problem.id))
    sizes, place, share = Counter(problem.family for problem in problems), Counter(), {}
    for problem in ranked:
        place[problem.family] += 1
        share[problem.id] = place[problem.family] / sizes[problem.family]
    test = {problem.id for problem in sorted(ranked, key=lambda problem: share[problem.id])[:n_test]}
    return [p for p in problems if p.id not in test], [p for p in problems if p.id in test]
