"""Problems: two solvers agree, the paper's limits hold, files are reproducible, and rows are filtered as stated."""

import ast
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import datasets
import pandas as pd
import pytest
from problem_checks import CHECKS

from atp_utils import ROOT
from atp_utils.problems import Problem, families, generate, load, make_problem, split_problems
from atp_utils.problems.answers import extract_answer, parse_number
from atp_utils.problems.filters import NO_ANSWER, Gsm8k, OpenThoughts, true_number
from atp_utils.problems.templates import TEMPLATES, draw_complex, draw_simple
from atp_utils.scenarios import tool_use
from atp_utils.scenarios.tool_use.items import draw_problems

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

# Worked by hand; the comment says how.
WORKED = {
    "digit_count": (dict(limit=30, modulus=5, digit=4), 4),  # 5, 19, 23, 28 (not 14)
    "lattice_paths": (dict(width=2, height=2, blocked=[(1, 1)]), 2),  # 6 paths, 2 * 2 through the middle
    "bounded_solutions": (dict(a=1, b=2, c=3, total=6, bound=3), 5),  # 220 030 301 111 002
    "assignments": (dict(forbidden=[[1], [2], [3]]), 2),  # derangements of three
    "linear_recurrence": (dict(p=1, q=1, r=0, first=0, second=1, n=10, modulus=7), 6),  # Fibonacci 55 = 7 * 7 + 6
    "prime_sum": (dict(limit=20, modulus=4, residue=1), 35),  # 5 + 13 + 17
    "divisor_sum": (dict(limit=6, skip=2), 17),  # odd divisors: 1, 1, 4, 1, 6, 4
    "remainders": (dict(moduli=[3, 5, 7], residues=[2, 3, 2]), 23),  # Sunzi's
    "grid_path": (dict(grid=[[1, 2], [3, 4]]), 8),  # 1 + 3 + 4
    "knapsack": (dict(weights=[5, 4, 6], values=[10, 40, 30], capacity=10), 70),  # 4 kg and 6 kg
    "determinant": (dict(matrix=[[1, 2, 3], [4, 5, 6], [7, 8, 10]]), -3),
    "polynomial_root": (dict(a=2, b=5, c=6), 2),  # (x - 2)(x + 1)(x + 3)
    "root_power_sum": (dict(a=-6, b=11, c=-6, k=4), 98),  # roots 1, 2, 3: 1 + 16 + 81
    "josephus": (dict(people=7, step=3), 4),
    "pile_game": (dict(piles=[3, 3, 3], most=2), 7),  # sizes mod 3: 000, three times 011, three times 022
}


FAMILIES, SIMPLE = TEMPLATES["complex"], TEMPLATES["simple"]


def _loaded(*arguments):
    return load(*arguments)[0]


def _generated(kind, n, seed=0):
    return [problem for problem, _ in generate(kind, n, seed)]


def written(problems, path):
    path.write_text("".join(problem.model_dump_json() + "\n" for problem in problems))


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "program", "exec"), {})
    return out.getvalue()


def number(value) -> Fraction:
    return parse_number(str(value))


def drawn(name, seed):
    """Question, answer and parameters of a family's problem."""
    question, answer, code = draw_complex(FAMILIES[name], random.Random(seed))
    call = code[code.rindex("print(") :]
    params = eval(call.replace(f"print({name}(", "dict(")[:-2])
    return question, number(answer), params


# --- families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_family_agrees_with_a_hand_worked_example(name):
    params, expected = WORKED[name]
    assert getattr(families, name)(**params) == CHECKS[name](**params) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_two_solvers_of_a_family_agree_over_many_seeds(name):
    for seed in range(60):
        question, answer, params = drawn(name, seed)
        assert answer == number(CHECKS[name](**params))
        assert answer.denominator in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000)
        assert question.endswith("?") and not re.search(r"[{}]", question)
        for stated in re.findall(r"\d+", repr(params)):  # the question states every parameter
            assert re.search(rf"(?<!\d){stated}(?!\d)", question), (stated, question)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_of_a_family_cannot_be_guessed(name):
    answers = Counter(drawn(name, seed)[1] for seed in range(40))
    assert max(answers.values()) <= 4 and answers[Fraction(0)] <= 1


def test_lists_and_matrices_are_worded():
    question, _, params = drawn("remainders", 0)
    first, second, third = params["residues"]
    assert f"remainders {first}, {second} and {third} on division by" in question
    question, _, params = drawn("determinant", 0)
    assert question.endswith(": " + "; ".join(" ".join(map(str, row)) for row in params["matrix"]) + "?")
    question, _, params = drawn("assignments", 0)
    assert all(
        f"Worker {i} cannot do job {' or '.join(map(str, jobs))}." in question
        for i, jobs in enumerate(params["forbidden"], 1)
    )


@pytest.mark.parametrize("kind", ["simple", "complex"])
def test_each_generated_problem_comes_with_a_program_that_prints_its_answer(kind):
    for problem, code in generate(kind, 35, seed=3):
        assert parse_number(printed(code)) == parse_number(problem.answer)


# --- templates -------------------------------------------------------------------------------------------

# Numbers that a question may state in words.
IN_WORDS = {
    1: "further", 2: r"twice|half|rectangular|chickens", 3: "third|three", 4: "cows", 5: "nickels", 7: "week",
    10: "dimes", 100: "percent",
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLE)
def test_simple_problems_keep_the_papers_limits_at_every_step(name):
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": Fraction}
    for seed in range(40):
        question, answer, code = draw_simple(SIMPLE[name], random.Random(seed))
        *steps, last = code.splitlines()
        stated = list(map(int, re.findall(r"\d+", question)))
        assert len(question.split()) <= 50 and 1 <= len(steps) <= 3 and last == f"print(r{len(steps)})"
        assert not re.search(r"[{}]", question) and question.endswith("?")
        known, used = Counter(stated), set()
        for index, step in enumerate(steps, 1):
            left, operation, right = re.fullmatch(rf"r{index} = (\d+) (.) (\d+)", step).groups()
            for operand in (int(left), int(right)):
                assert operand in known or re.search(IN_WORDS[operand], question), (operand, question)
                used.add(operand)
            result = operations[operation](int(left), int(right))
            known[result] += 1
        assert result == int(answer) and result not in stated
        assert all(0 < number < 1000 and number == int(number) for number in known)
        constants = {5, 10} if name == "coins" else set()
        assert set(stated) - constants <= used  # nothing in the question is idle


def test_there_are_enough_templates_and_families():
    assert len(SIMPLE) >= 25 and len(FAMILIES) >= 8


# --- generated problems ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n"), [("simple", 500), ("complex", 300)])
def test_generated_problems_are_distinct_balanced_and_nested(kind, n):
    problems = _generated(kind, n, seed=1)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == n
    sizes = Counter(p.family for p in problems).values()
    assert max(sizes) - min(sizes) <= 1 and len(sizes) == len(TEMPLATES[kind])
    assert _generated(kind, 40, seed=1) == problems[:40]
    assert not {p.id for p in problems} & {p.id for p in _generated(kind, 100, seed=2)}


def test_the_file_is_byte_identical_under_the_same_seed_in_another_process(tmp_path):
    here = tmp_path / "here.jsonl"
    written(_generated("complex", 30, seed=5) + _generated("simple", 70, seed=5), here)
    code = (
        "import sys; from pathlib import Path; from test_problems import _generated as made, written;"
        "written(made('complex', 30, seed=5) + made('simple', 70, seed=5), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "there.jsonl"], env=environment, check=True, timeout=120)
    assert here.read_bytes() == (tmp_path / "there.jsonl").read_bytes()
    assert _generated("complex", 30, seed=6) != _generated("complex", 30, seed=5)


def test_problems_survive_writing_and_reading(tmp_path):
    odd = make_problem("complex", "algebra", 'What is "½ of ⅔"?\nExactly.', Fraction(1, 3), "by hand")
    problems = [*_generated("simple", 20), odd]
    written(problems, tmp_path / "p.jsonl")
    own = _loaded("simple", 20, tmp_path / "p.jsonl"), _loaded("complex", 1, tmp_path / "p.jsonl")
    assert {problem.id: problem for problem in own[0] + own[1]} == {problem.id: problem for problem in problems}
    assert _loaded("simple", 20, tmp_path / "p.jsonl", 9) != problems[:20]  # a sample: its own order
    assert load("complex", 1, tmp_path / "p.jsonl")[1] == {"rows": 21, "kept": 1, "of the other kind": 20}


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "hard"), ("question", " "), ("answer", "5 or 6"), ("id", ""), ("family", None)]
)
def test_a_problem_checks_itself(field, value):
    good = _generated("simple", 1)[0].model_dump()
    with pytest.raises(ValueError, match=field):
        Problem(**good | {field: value})


def test_a_family_without_new_questions_is_named(monkeypatch):
    monkeypatch.setitem(TEMPLATES, "simple", {"legs": SIMPLE["legs"].model_copy(update={"text": "How many?"})})
    with pytest.raises(ValueError, match="2 simple problems: 'legs' has no new questions after 1 problems"):
        generate("simple", 2, seed=0)


def test_training_and_test_problems_are_disjoint_and_stratified():
    problems = _generated("complex", 60)
    train, test = split_problems(problems, 15, seed=0)
    assert len(test) == 15 and len(train) == 45
    assert not {p.question for p in train} & {p.question for p in test}
    assert [p for p in problems if p in train] == train
    assert set(Counter(p.family for p in test).values()) == {1}
    shuffled = random.Random(0).sample(problems, 60)
    assert {p.id for p in split_problems(shuffled, 15, seed=0)[1]} == {p.id for p in test}
    assert split_problems(problems, 15, seed=1)[1] != test


@pytest.mark.parametrize("n_test", [0, 5])
def test_a_split_with_an_empty_side_is_an_error(n_test):
    with pytest.raises(ValueError, match="n_test"):
        split_problems(_generated("simple", 5), n_test, seed=0)


# --- filters ---------------------------------------------------------------------------------------------

ROBE = {
    "question": "A robe takes 2 bolts of blue cloth and half that much white cloth. How many bolts is that?",
    "answer": "White: 2/2=<<2/2=1>>1\nTotal: 2+1=<<2+1=3>>3\n#### 3",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(answer="<<1+1=2>>" * 4 + "#### 2"), "more than 3 steps"),
        (dict(answer="x + x = 6\n#### 3"), "steps not annotated"),
        (dict(answer="<<999+1=1000>>\n#### 3"), "a number not below 1000"),
        (dict(answer="<<1+1=2>>\n#### 1,000"), "a number not below 1000"),
        (dict(answer="<<1+1=2>>\n#### -1000"), "a number not below 1000"),
        (dict(question="It costs $1,200.50. How much?"), "a number not below 1000"),
        (dict(question="word " * 51), "more than 50 words"),
        (dict(answer="<<1+1=2>> so two"), NO_ANSWER),
        (dict(answer="<<1+1=2>>\n#### two"), NO_ANSWER),
        (dict(answer="<<1+1=2>>\n#### 2 or 3"), NO_ANSWER),
    ],
)
def test_gsm8k_rows_are_dropped_with_a_reason(change, reason):
    assert Gsm8k(**ROBE | change).kept() == reason


def test_gsm8k_rows_at_the_limits_are_kept():
    row = dict(question="word " * 49 + "999.9", answer="<<1+1=2>><<2+1=3>><<3*333=999>>\n#### -999")
    assert Gsm8k(**row).kept()[2] == -999
    assert Gsm8k(**ROBE).kept() == ("gsm8k_2_steps", ROBE["question"], 3)


THOUGHT = {
    "problem": "How many positive divisors does 360 have?",
    "ground_truth_solution": r"$360 = 2^3 \cdot 3^2 \cdot 5$, so there are $4 \cdot 3 \cdot 2 = \boxed{24}$.",
    "domain": "math",
    "source": "numina_math",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("combinatorics", 24)),
        (dict(problem="Find the remainder of 2^100 modulo 7."), ("algorithmic", 24)),
        (dict(problem="The polynomial p has p(0) = 1. Find p(2)."), ("algebra", 24)),
        (dict(problem="A train travels 60 km. How fast?"), "another topic"),
        (dict(problem="Prove that there are 24 integers."), "needs a proof or a figure"),
        (dict(problem="In the figure, how many ways? [asy] draw(); [/asy]"), "needs a proof or a figure"),
        (dict(domain="code"), "not mathematics"),
        (dict(ground_truth_solution=None), NO_ANSWER),
        (dict(ground_truth_solution=r"\boxed{\text{(B)}}"), NO_ANSWER),
        (dict(ground_truth_solution=r"\boxed{2\sqrt{6}}"), NO_ANSWER),
        (dict(ground_truth_solution=r"\boxed{3} or \boxed{4}"), NO_ANSWER),
    ],
)
def test_openthoughts_rows(change, expected):
    found = OpenThoughts(**THOUGHT | change).kept()
    assert found == expected if isinstance(expected, str) else (found[0], found[2]) == expected


def test_the_number_of_a_reference_solution():
    assert true_number(r"\boxed{\frac{1}{2}} = \boxed{0.5}") == Fraction(1, 2)
    assert true_number("0") == 0 and true_number("The answer is 12.") == 12
    assert true_number(r"\boxed{5} \boxed{") is None and true_number("It has 5 roots") is None


# --- files and hub ---------------------------------------------------------------------------------------


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_a_local_file_is_filtered_counted_and_sampled_whatever_its_order(tmp_path):
    rows = [dict(ROBE, question=f"{i} + 1?") for i in range(2, 30)]
    rows += ["", dict(ROBE, question=" 2 +  1?"), dict(ROBE, answer="none"), dict(ROBE, question="1000 + 1?")]
    forth, back = write_lines(tmp_path / "a.jsonl", *rows), write_lines(tmp_path / "b.jsonl", *rows[::-1])
    problems, counts = load("simple", 5, forth, seed=4)
    assert counts == {"rows": 31, "kept": 28, "duplicate": 1, NO_ANSWER: 1, "a number not below 1000": 1}
    assert [p.id for p in problems] == [p.id for p in _loaded("simple", 9, back, 4)][:5]
    assert {p.source for p in problems} == {"a.jsonl"}
    with pytest.raises(ValueError, match=r"a.jsonl: 29 simple problems asked for, 28 found; counts: .*duplicate"):
        _loaded("simple", 29, forth)


OWN = make_problem("simple", "hand", "1 + 1?", Fraction(2), "me").model_dump()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("[1]", "valid dictionary"),
        ("null", "valid dictionary"),
        ({"question": "1 + 1?"}, "answer: Field required"),
        ({"question": "1 + 1?", "answer": 2}, "answer: Input should be a valid string (got '2')"),
        ({"question": None, "answer": "#### 2"}, "question: Input should be a valid string (got 'None')"),
        ({}, "question: Field required"),
        (OWN | {"answer": None}, "answer: Value error, expected one number (got 'None')"),
        (OWN | {"answer": float("nan")}, "answer: Value error, expected one number (got 'nan')"),
        (OWN | {"answer": True}, "answer: Value error, expected one number (got 'True')"),
        (OWN | {"kind": "hard"}, "kind: Input should be 'simple' or 'complex'"),
        ({"kind": "simple"}, "id: Field required"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write_lines(tmp_path / "rows.jsonl", ROBE, "", line)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 3: .*{re.escape(message)}"):
        _loaded("simple", 1, path)


def test_other_faults_of_a_file_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl, line 1: .*codec"):
        _loaded("simple", 1, tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: no such file"):
        _loaded("simple", 1, tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="line 1: problem: Field required"):
        _loaded("complex", 1, write_lines(tmp_path / "gsm.jsonl", ROBE))
    with pytest.raises(ValueError, match="0 found; counts: {'rows': 0"):
        _loaded("simple", 1, write_lines(tmp_path / "empty.jsonl"))


def test_a_hand_written_number_and_a_byte_order_mark_are_read(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", "\ufeff" + json.dumps(OWN | {"answer": 2.5}))
    assert _loaded(OWN["kind"], 1, path)[0].answer == "2.5"


@pytest.fixture
def hub(monkeypatch):
    """The calls of `load_dataset`, and the rows that it gives."""
    calls, rows = [], []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options))
        return iter(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls, rows


def test_the_hub_is_asked_for_the_papers_data_sets(hub):
    calls, rows = hub
    rows[:] = [ROBE, ROBE, ROBE | {"answer": "#### ?"}]
    simple, counts = load("simple", 1, "hub")
    assert simple[0].answer == "3" and counts == {"rows": 3, "kept": 1, "duplicate": 1, NO_ANSWER: 1}
    rows[:] = [THOUGHT, THOUGHT | {"domain": "code"}]
    ((hard, code),), counts = draw_problems("complex", 1, "hub")
    assert (hard.family, hard.question, hard.answer, code) == ("combinatorics", THOUGHT["problem"], "24", "")
    assert hard.source == "open-thoughts/OpenThoughts-114k" and counts == {"rows": 2, "kept": 1, "not mathematics": 1}
    assert calls == [
        ("openai/gsm8k", "main", dict(split="train", streaming=True)),
        ("open-thoughts/OpenThoughts-114k", "metadata", dict(split="train", streaming=True)),
    ]


SCHEMA = (
    "problem", "deepseek_reasoning", "deepseek_solution", "ground_truth_solution", "domain", "source", "test_cases",
    "starter_code",
)  # fmt: skip
DROPPED = {
    "rows": 13, "kept": 4, "duplicate": 1, "needs a proof or a figure": 2, "another topic": 1, NO_ANSWER: 3,
    "not mathematics": 2,
}  # fmt: skip


@pytest.fixture
def openthoughts(monkeypatch):
    """The hub with rows written for this test, in the columns of OpenThoughts' configuration ``metadata``."""
    rows = [json.loads(line) for line in (ROOT / "tests/hub_rows/openthoughts.jsonl").read_text().splitlines()]
    features = datasets.Features({name: datasets.Value("string") for name in SCHEMA})
    complex_ones = datasets.Dataset.from_list(rows, features=features)
    asked = {"openai/gsm8k": datasets.Dataset.from_list([ROBE, ROBE | {"question": f"Two {ROBE['question']}"}])}
    asked["open-thoughts/OpenThoughts-114k"] = complex_ones
    monkeypatch.setattr("datasets.load_dataset", lambda name, *_, **__: asked[name].to_iterable_dataset())


def test_rows_of_openthoughts_are_kept_or_dropped_for_a_reason(openthoughts):
    problems, counts = load("complex", 4, "hub")
    assert counts == DROPPED
    assert {(problem.family, problem.answer) for problem in problems} == {
        ("combinatorics", "24"), ("combinatorics", "7"), ("algorithmic", "1"), ("algebra", "-5"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="5 complex problems asked for, 4 found; counts: .*'another topic': 1"):
        load("complex", 5, "hub")


def test_notebook_1_prints_what_was_dropped_and_why(openthoughts):
    cells = json.loads((ROOT / "notebooks/01_generate_data.ipynb").read_text())["cells"]
    [cell] = ["".join(cell["source"]) for cell in cells if "draw_problems(" in "".join(cell["source"])]
    *before, printed = ast.parse(cell).body
    given = {"simple_problems": 2, "complex_problems": 4, "problem_source": "hub", "seed": 7, "tool_use": tool_use}
    given["pd"] = pd
    exec(compile(ast.Module(before, []), "cell", "exec"), given)
    table = eval(compile(ast.Expression(printed.value), "cell", "eval"), given)
    assert table["complex"][table["complex"] > 0].to_dict() == DROPPED
    assert table["simple"][table["simple"] > 0].to_dict() == {"rows": 2, "kept": 2}


def test_changed_columns_of_the_hub_are_named(hub):
    hub[1][:] = [{"problem": "How many?", "ground_truth_solution": "5"}]
    with pytest.raises(ValueError, match="OpenThoughts\ndomain\n"):
        load("complex", 1, "hub")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K isn't beside the repository")
@pytest.mark.parametrize(("name", "kept"), [("train", 3184), ("test", 513)])
def test_real_gsm8k_rows(name, kept):
    path = GSM8K / f"{name}.jsonl"
    problems, counts = load("simple", kept, path)
    assert counts["kept"] == len(problems) == kept and NO_ANSWER not in counts
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    truths = {row["question"]: extract_answer(row["answer"]) for row in rows}
    assert all(truths[p.question] == parse_number(p.answer) for p in problems)
