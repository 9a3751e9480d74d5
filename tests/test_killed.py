"""Killed at any moment and asked for again, a job ends as if nothing had been, and asks for nothing that it had."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from atp_utils import ROOT
from atp_utils.evolution.journal import read_record

# `make test` takes the first of the moments that `make soak` takes.
KILLS = [2, pytest.param(20, marks=pytest.mark.soak)]


def killed(job, folder, *moments):
    """Run `killing.py`; how many times the job was killed."""
    command = [sys.executable, "tests/killing.py", job, str(folder), *map(str, moments)]
    environment = os.environ | {"ATP_PROGRESS": os.devnull, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return sum(json.loads((folder / "killed.json").read_text())["killed"])


def drawn(job, kills):
    draw = random.Random(job)
    return [draw.random() for _ in range(kills)]


def lines(path):
    return path.read_text().splitlines() if path.is_file() else []


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a job took, which is another's the next time.
TOOK = ("started", "finished", "seconds", "train_seconds", "most_bytes")


def manifest(out):
    """What the manifest says, but for what the job took, and how often the work was begun."""
    facts = json.loads((out / "manifest.json").read_text())
    now = {name: facts.get("counts", {}).pop(name, None) for name in ("replayed", "answered_now")}
    facts.get("settings", {}).pop("out")
    return {name: fact for name, fact in facts.items() if name not in TOOK}, now


def without_times(path):
    """A journal's lines but for the seconds that a tool took, sorted: chats that are alike change places by a kill."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        entry.get("result", {}).pop("seconds", None)
    return sorted(entries, key=json.dumps)


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("scenario", ["role_play", "collusion", "tool_use"])
def test_an_evolution(tmp_path, scenario, kills, record_property):
    count = killed(scenario, tmp_path, *drawn(scenario, kills))
    whole, twice, kept, between = tmp_path / "whole", 0, 0, 0
    asked = lines(tmp_path / "whole.asked")
    assert len(asked) == len(set(asked)) > 50
    for number in range(kills):
        out, left = tmp_path / str(number), tmp_path / f"{number}.kept/replies.jsonl"
        answered = read_record(left).replies if left.is_file() else {}
        before, again = lines(tmp_path / f"{number}.asked"), lines(tmp_path / f"{number}.asked again")
        assert not set(again) & set(answered)
        # What was under way when the kill came is all that can be asked twice.
        assert set(before + again) == set(asked) and len(before) - len(answered) in (0, 1)
        assert (out / "decisions.parquet").read_bytes() == (whole / "decisions.parquet").read_bytes()
        assert without_times(out / "replies.jsonl") == without_times(whole / "replies.jsonl")
        facts, now = manifest(out)
        assert facts == manifest(whole)[0] and now == {"replayed": len(answered), "answered_now": len(again)}
        twice, kept = twice + len(before) + len(again) - len(asked), kept + len(answered)
        between += 0 < len(answered) < len(asked)
    counts = {"kills": count, "of them between answers": between}
    counts |= {"answers of a run": len(asked), "kept by the kills": kept, "asked twice": twice}
    for name, value in counts.items():
        record_property(name, value)
    assert count == kills


@pytest.mark.parametrize("kills", [1, KILLS[1]])
@pytest.mark.parametrize("method", ["dpo", pytest.param("grpo", marks=pytest.mark.soak)])
def test_a_training(tmp_path, method, kills, record_property):
    count = killed(method, tmp_path, *drawn(method, kills))
    whole, twice, between = tmp_path / "whole", 0, 0
    steps = lines(tmp_path / "whole.asked")
    made = ["adapter_config.json", "adapter_model.safetensors", "training_log.csv"]
    for number in range(kills):
        out = tmp_path / str(number)
        before, again = lines(tmp_path / f"{number}.asked"), lines(tmp_path / f"{number}.asked again")
        # A step of which no checkpoint was whole is taken again.
        assert set(before + again) == set(steps) and len(before) + len(again) - len(steps) in (0, 1)
        assert [name for name in made if (out / name).read_bytes() != (whole / name).read_bytes()] == []
        assert manifest(out) == manifest(whole) and not (out / "checkpoints").exists()
        twice += len(before) + len(again) - len(steps)
        between += 0 < len(before) < len(steps)
    counts = {"kills": count, "of them between steps": between}
    counts |= {"steps of a training": len(set(steps)), "taken twice": twice}
    for name, value in counts.items():
        record_property(name, value)
    assert count == kills


@pytest.mark.parametrize("kills", ["renames", KILLS[1]])
def test_publishing(tmp_path, kills, record_property):
    count = killed("publish", tmp_path, *([kills] if kills == "renames" else drawn("publish", kills)))
    whole, old, away = tmp_path / "whole", tmp_path / "before", 0
    assert sum("/again/" in name for name in tree(whole)) == 3 and not any("/again/" in name for name in tree(old))
    for number in range(count):
        left = tmp_path / f"{number}.kept"
        for place in map(Path, ("record", "adapters/smollm2-135m/role_play/dpo/0")):
            held = left / place
            if not held.exists():
                away, held = away + 1, left / place.with_name(f".rebuilding-{place.name}") / "before"
            assert tree(held) in (tree(old / place), tree(whole / place))
        assert tree(tmp_path / str(number)) == tree(whole)
    for name, value in {"kills": count, "away from its place": away}.items():
        record_property(name, value)
    assert count == kills or kills == "renames" and count > 5
