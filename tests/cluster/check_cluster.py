"""The pipeline on a one-node Slurm that loses jobs: `make test-cluster` (root on Debian or Ubuntu).

The first call loses four jobs, each in its own way; the second has the mistakes corrected and finishes; the third
has nothing left to do. All are the `make reproduce EXECUTOR=slurm` of docs/cluster.md, with the smallest counts and
without a GPU. pytest doesn't collect this file by itself: it starts daemons.
"""

import copy
import json
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from atp_utils import ROOT

RUN = ROOT / "runs" / "cluster"
LOGS = RUN / "slurm"
RECORD = Path("/run/atp-slurm/jobs.log")
MODEL = "smollm2-135m"
FAILS, TOO_LONG = f"align/collusion_{MODEL}_grpo", f"align/role_play_{MODEL}_dpo"
CUT_TRAINING, CUT_EVOLUTION = f"align/tool_use_{MODEL}_dpo", f"evolve/role_play_{MODEL}_standard_base"
CHECKPOINTS = RUN / f"adapters/tool_use/{MODEL}/dpo-0/checkpoints/here"
REPLIES = RUN / f"evolution/role_play/{MODEL}/standard/base/replies.jsonl"
MARK = 123.0


@dataclass
class Call:
    """One `make reproduce`: how it ended, what it printed, and the Slurm state of each of its jobs."""

    code: int
    text: str
    states: dict[str, str]


@pytest.fixture(scope="module")
def slurm():
    script = str(ROOT / "tests/cluster/slurm.sh")
    subprocess.run([script, "start"], check=True)
    yield
    subprocess.run([script, "stop"], check=True)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Folder of the two files that a user edits: the run's profile and the cluster's."""
    folder = tmp_path_factory.mktemp("settings")
    cluster = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    for rule in ("data", "align", "evolve", "figures"):
        cluster["set-resources"][rule] = {"gpu": 0, "mem_mb": 2500, "runtime": 600}
    # The training that is made too long gets two minutes, those of one scenario the GPU that is one in name only.
    cluster["set-resources"]["align"]["runtime"] = (
        "2 if wildcards.scenario == 'role_play' and wildcards.method == 'dpo' else 600"
    )
    cluster["set-resources"]["align"]["gpu"] = "1 if wildcards.scenario == 'collusion' else 0"
    cluster["set-threads"] = {"align": 1, "evolve": 1}
    cluster["slurm-init-seconds-before-status-checks"] = 5
    cluster["slurm-keep-successful-logs"] = True
    write(folder / "slurm/config.yaml", cluster)
    return folder


@pytest.fixture(scope="module")
def first(slurm, settings):
    shutil.rmtree(RUN, ignore_errors=True)
    good = profile()
    bad = copy.deepcopy(good)
    bad["notebooks"]["03_align_grpo/collusion"] = {"temperature": 0}
    bad["notebooks"]["02_align_dpo/role_play"] = {"max_steps": 100_000}
    write(settings / "cluster.yaml", bad)
    call = reproduce(settings, {CUT_TRAINING: has_checkpoint, CUT_EVOLUTION: has_replies})
    write(settings / "cluster.yaml", good)
    return call


@pytest.fixture(scope="module")
def kept(first):
    """What the cut jobs left: the number of whole replies, and a checkpoint whose log gets a mark."""
    checkpoint = max(CHECKPOINTS.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    next(entry for entry in state["log_history"] if "loss" in entry)["loss"] = MARK
    path.write_text(json.dumps(state))
    lines = REPLIES.read_bytes().splitlines(keepends=True)
    return sum(b'"digest"' in line and line.endswith(b"\n") for line in lines)


@pytest.fixture(scope="module")
def second(kept, settings):
    return reproduce(settings)


def profile():
    """The tests' smallest profile, with one training and one evolution that last long enough to be cut."""
    content = yaml.safe_load((ROOT / "tests/profiles/smoke.yaml").read_text())
    content["notebooks"]["02_align_dpo/tool_use"] = {"max_steps": 30, "save_steps": 2}
    content["notebooks"]["04_evolve_role_play"] = {"seeds": [0, 1], "rounds": 6, "items": 16}
    return content


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def has_checkpoint():
    # Its last file: an unfinished checkpoint can't be resumed from.
    return any(CHECKPOINTS.glob("checkpoint-*/trainer_state.json"))


def has_replies():
    return REPLIES.is_file() and REPLIES.stat().st_size > 0


def reproduce(settings, cuts=None):
    """`make reproduce` on Slurm; a job named in ``cuts`` is cancelled once its condition holds."""
    waiting, before = dict(cuts or {}), set(states())
    command = ["make", "reproduce", "EXECUTOR=slurm", f"PROFILE={settings}/cluster.yaml"]
    with (settings / "output").open("w+") as output:
        command.append(f"SLURM_PROFILE={settings}/slurm")
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for name in [name for name, ready in waiting.items() if ready()]:
                [log] = LOGS.glob(f"rule_{name}/*.log")
                subprocess.run(["scancel", log.stem], check=True)
                del waiting[name]
            time.sleep(0.1)
        output.seek(0)
        text = output.read()
    print(text)
    assert not waiting
    return Call(process.returncode, text, {names()[job]: state for job, state in states().items() if job not in before})


def states():
    """Slurm job -> state, of all jobs that have ended."""
    rows = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in RECORD.open()]
    return {row["JobId"]: row["JobState"] for row in rows}


def names():
    """Slurm job -> rule and wildcards, by the place of its log."""
    return {log.stem: str(log.parent.relative_to(LOGS)).removeprefix("rule_") for log in LOGS.rglob("*.log")}


def test_every_job_that_can_run_does_so_in_slurm(first):
    lost = {FAILS: "FAILED", TOO_LONG: "TIMEOUT", CUT_TRAINING: "CANCELLED", CUT_EVOLUTION: "CANCELLED"}
    assert {name: state for name, state in first.states.items() if state != "COMPLETED"} == lost
    # All but the three evolutions whose adapter is missing, and the figures.
    assert Counter(name.split("/")[0] for name in first.states) == {"data": 1, "align": 6, "evolve": 6}


def test_jobs_get_the_gpus_they_ask_for(first):
    command = ["squeue", "--states=all", "--noheader", "--Format=jobid:20,tres-per-job:40"]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    given = {names()[job]: asked for job, asked in map(str.split, rows)}
    expected = {name: "gres:gpu:1" if name.startswith("align/collusion") else "N/A" for name in first.states}
    assert {name: given[name] for name in first.states} == expected


def test_a_lost_job_is_reported_with_its_logs(first):
    assert first.code != 0
    identifiers = {name: job for job, name in names().items()}
    for name, state in (FAILS, "FAILED"), (TOO_LONG, "TIMEOUT"), (CUT_EVOLUTION, "CANCELLED"):
        assert f"SLURM-job '{identifiers[name]}' failed, SLURM status is: '{state}'" in first.text
        rule, wildcards = name.split("/")
        log = wildcards.replace(f"_{MODEL}_", f"-{MODEL}-").replace("-standard_", "-standard-")
        assert f"runs/cluster/notebooks/{rule}-{log}.ipynb" in first.text
        assert f"{LOGS}/rule_{name}/{identifiers[name]}.log" in first.text
    log = (LOGS / f"rule_{FAILS}" / f"{identifiers[FAILS]}.log").read_text()
    assert "notebooks/03_align_grpo.ipynb failed in cell" in log and "temperature" in log


def test_the_next_call_runs_what_is_missing(second):
    assert second.code == 0
    again = {FAILS, TOO_LONG, CUT_TRAINING, CUT_EVOLUTION}
    trained = (FAILS, TOO_LONG, CUT_TRAINING)
    freed = {name.replace("align", "evolve").replace(MODEL, f"{MODEL}_standard") for name in trained}
    assert second.states == dict.fromkeys(again | freed | {"figures/07_heatmaps", "figures/08_figures"}, "COMPLETED")
    assert "Role-play: rule violations by round" in second.text


def test_the_cut_training_went_on_from_its_checkpoint(second):
    log = pd.read_csv(CHECKPOINTS.parents[1] / "training_log.csv")
    assert list(log["step"]) == list(range(1, 31)) and log["loss"][0] == MARK


def test_the_cut_evolution_replayed_its_journal(second, kept):
    counts = json.loads((REPLIES.parent / "manifest.json").read_text())["counts"]
    # Two seeds, 16 items, 6 rounds; each decision is asked in both orders.
    assert counts["decisions"] == 2 * 16 * 6 and counts["replies_used"] == 2 * counts["decisions"]
    assert 0 < counts["replayed"] == kept < counts["replies_used"]
    assert counts["answered_now"] == counts["replies_used"] - kept


def test_a_third_call_submits_nothing(second, settings):
    third = reproduce(settings)
    assert third.code == 0 and third.states == {} and "Nothing to be done" in third.text
