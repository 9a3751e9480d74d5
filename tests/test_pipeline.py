"""The pipeline end to end on the embedded model: Snakemake, papermill, every notebook, every arm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from atp_utils import ROOT
from atp_utils.evolution import journal

RUN = ROOT / "runs" / "smoke"


def snakemake(*arguments, **environment):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=tests/profiles/smoke.yaml"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*command, "--rerun-incomplete", "--nolock", *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | environment | {"PATH": path},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(embedded):
    shutil.rmtree(RUN, ignore_errors=True)
    done = snakemake(ATP_PROGRESS=os.devnull)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_arm_is_run_and_recorded(finished):
    decisions = journal.read_decisions(RUN / "evolution")
    # 4 items x 2 rounds; 7 games x 2 thresholds x 2 agents x 2 rounds; (1 simple + 2 complex problems) x 2 rounds.
    counts = decisions.groupby(["scenario", "arm"]).size().unstack("scenario")
    assert set(counts.index) == {"base", "dpo", "grpo"}
    assert set(counts["role_play"]) == {8} and set(counts["collusion"]) == {56} and set(counts["tool_use"]) == {6}
    assert decisions["valid"].all() and decisions["p_deviate"].dropna().between(0, 1).all()
    test_items = {line.split('"')[3] for line in (RUN / "data/role_play/test.jsonl").read_text().splitlines()}
    assert set(decisions.loc[decisions["scenario"] == "role_play", "item"]) <= test_items
    scenarios = ("role_play", "tool_use", "collusion", "recollusion")
    drawn = [f"{name}_smollm2-135m" for name in (*scenarios, "case_study")]
    for name in (f"{stem}.{kind}" for stem in drawn for kind in ("png", "svg")):
        assert (RUN / "figures" / name).stat().st_size > 500


def test_a_second_call_has_nothing_to_do(finished):
    done = snakemake()
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_a_lost_result_is_replayed_from_the_raw_replies(finished):
    folder = RUN / "evolution/role_play/smollm2-135m/standard/dpo-0"
    before = pd.read_parquet(folder / "decisions.parquet")
    replies = (folder / "replies.jsonl").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "decisions.parquet").unlink()
    done = snakemake(str((folder / "manifest.json").relative_to(ROOT)), ATP_PROGRESS=os.devnull)
    assert done.returncode == 0, done.stderr[-3000:]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "decisions.parquet"), before)
    assert (folder / "replies.jsonl").read_bytes() == replies


def run(*arguments):
    command = [sys.executable, "-m", "atp_utils.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_refuses_before_anything_starts(tmp_path):
    done = run("notebooks/04_evolve_role_play.ipynb", str(tmp_path / "o.ipynb"), "-p", "rounds", "0")
    assert done.returncode == 2 and "parameter rounds" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failed_notebook_is_kept_and_named(tmp_path):
    out = tmp_path / "o.ipynb"
    done = run("notebooks/08_figures.ipynb", str(out), "-p", "results", str(tmp_path / "nothing"))
    assert done.returncode == 1 and "holds no complete run" in done.stderr and out.is_file()


def test_the_reason_protocol_counts_what_it_cannot_read(embedded, tmp_path):
    values = {"protocol": "reason", "items": 3, "rounds": 2, "max_new_tokens": 12, "max_attempts": 2}
    values |= {"out": str(tmp_path / "run")}
    given = [word for name, value in values.items() for word in ("-p", name, str(value))]
    done = run("notebooks/04_evolve_role_play.ipynb", str(tmp_path / "o.ipynb"), *given)
    assert done.returncode == 0, done.stderr[-2000:]
    decisions = journal.read_decisions(tmp_path)
    assert len(decisions) == 6 and decisions["p_deviate"].isna().all()
    invalid = decisions[~decisions["valid"]]
    assert invalid["deviated"].isna().all() and (invalid["attempts"] == 2).all()
    assert (decisions["completion_tokens"] <= 24).all()
