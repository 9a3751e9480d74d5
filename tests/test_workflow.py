"""What makes the workflow run a job again, on a copy of the repository whose jobs count as done."""

import os
import re
import shutil
import socket
import subprocess
import sys

import nbformat
import pytest

from atp_utils import ROOT


def snakemake(root, *arguments):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=tests/profiles/smoke.yaml"]
    done = subprocess.run(
        [*command, *arguments], cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def jobs(root):
    """How many jobs of each rule the next call would run."""
    rows = [line.split() for line in snakemake(root, "--dry-run", "--quiet", "all").splitlines()]
    rules = ("data", "align", "evolve", "figures")
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[0] in rules}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the repository in which every output is there, though empty, and recorded as up to date."""
    root = tmp_path_factory.mktemp("repository") / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("atp_utils", "notebooks", "profiles", "tests/profiles", "data/environments"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "Snakefile", root)
    for line in snakemake(root, "--summary").splitlines():
        if line.startswith("runs/"):
            path = root / line.split("\t")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    snakemake(root, "--touch", "--forceall")
    return root


def edit(root, book, cell_type, added):
    """Append ``added`` to a notebook's last cell of that type, and nothing else."""
    path = root / "notebooks" / f"{book}.ipynb"
    content = nbformat.read(path, as_version=4)
    cell = [cell for cell in content.cells if cell.cell_type == cell_type][-1]
    cell.source += added
    nbformat.write(content, path)


def test_prose_reruns_no_model(finished):
    assert jobs(finished) == {}
    for book in sorted((finished / "notebooks").glob("0[1-6]*.ipynb")):
        content = nbformat.read(book, as_version=4)
        for cell in content.cells:
            if cell.cell_type == "markdown":
                cell.source = "Other words."
            else:
                cell.source, cell.outputs = f"# Another comment.\n{cell.source}", []
        nbformat.write(content, book)
    module = finished / "atp_utils/evolve.py"
    _, docstring, rest = module.read_text().split('"""', 2)
    module.write_text(f'"""Other words: {docstring}"""{rest}\n# The end.\n')
    assert jobs(finished) == {}
    edit(finished, "08_figures", "markdown", "\nMore.")
    assert jobs(finished) == {"figures": 1}


def test_code_reruns_what_depends_on_it(finished):
    edit(finished, "04_evolve_role_play", "code", "\nprint(1)")
    # One scenario's three arms, then both notebooks that draw.
    assert jobs(finished) == {"evolve": 3, "figures": 2}
    module = finished / "atp_utils/align.py"
    module.write_text(module.read_text() + "\nADDED = 1\n")
    assert jobs(finished) == {"align": 6, "evolve": 7, "figures": 2}


def asked(root, *arguments):
    """Rule -> resources and threads of its jobs, as a dry run on 16 cores prints them."""
    # A rule's message would be printed in place of them.
    plain = root / "Snakefile.plain"
    plain.write_text(re.sub(r"    message:\n.*\n", "", (root / "Snakefile").read_text()))
    text = snakemake(root, "--snakefile", str(plain), "--dry-run", "--forceall", "--cores", "16", *arguments)
    needs = {}
    for block in text.split("\nrule ")[1:]:
        rule, lines = block.partition(":")[0], [line.strip() for line in block.splitlines()]
        given = next(line for line in lines if line.startswith("resources:")).removeprefix("resources:")
        needs[rule] = dict(part.strip().split("=") for part in given.split(","))
        needs[rule]["threads"] = next((line.split()[1] for line in lines if line.startswith("threads:")), "1")
    del needs["all"]
    return needs


def test_model_jobs_carry_what_a_cluster_must_give(finished):
    needs = asked(finished, "--workflow-profile", "none")
    gpus = {"data": None, "align": "1", "evolve": "1", "figures": None}
    assert {rule: given.get("gpu") for rule, given in needs.items()} == gpus
    assert all(int(given["mem_mb"]) > 0 and int(given["runtime"]) > 0 for given in needs.values())
    assert needs["align"]["threads"] == needs["evolve"]["threads"] == "8"


def test_on_one_machine_a_model_job_takes_all_cores(finished):
    threads = {rule: given["threads"] for rule, given in asked(finished).items()}
    assert threads == {"data": "1", "align": "16", "evolve": "16", "figures": "1"}


def test_progress_goes_to_a_log_and_not_to_a_socket(tmp_path):
    """A cluster's job writes to a pipe or a file; ssh without a terminal gives a socket, which can't be opened."""
    command = [sys.executable, "-c", "from atp_utils import run; print(run.progress_file())"]
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "log").open("w") as log:
        for stderr, expected in (theirs, os.devnull), (log, "/fd/2"), (subprocess.PIPE, "/fd/2"):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, check=True)
            assert done.stdout.strip().endswith(expected)
