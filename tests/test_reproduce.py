"""What `make reproduce` starts, under faults: notebook and cell are named, nothing is lost, the next call goes on.

The first part has a notebook of a few cells in place of the pipeline's; the second runs role-play of the smoke profile
with the embedded model, and kills whatever runs, at seeded moments, until a call comes to its end.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from test_workflow import copied

from atp_utils import ROOT
from atp_utils.evolution import journal

pytestmark = pytest.mark.soak
BOOK = "notebooks/04_evolve_role_play.ipynb"
PROFILE = "tests/profiles/smoke.yaml"
FAULTS = {
    "raises": "raise ValueError('no such thing')",
    "exits": "import os; os._exit(9)",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "has no memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33)); bytearray(1 << 34)",
    "is interrupted": "import time; (folder / 'waits').touch(); time.sleep(600)",
}
SAID = {
    "raises": "failed in cell {} (raise ValueError('no such thing')): ValueError: no such thing",
    "exits": "failed in cell {} (import os; os._exit(9)): its kernel died",
    "is killed": "failed in cell {} (import os, signal; os.kill(os.getpid(), signal.SIGKILL)): its kernel died",
    "has no memory": "failed in cell {} (import resource; resource.setrlimit(resource.RLIMIT_AS, (1 <): MemoryError",
    "is interrupted": "was interrupted in cell {} (import time; (folder / 'waits').touch(); time.sleep(600)): the next",
}


def reproduce(root, *targets, profile=PROFILE):
    """Snakemake as the Makefile starts it, in a group of its own, as a terminal has it."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"profile={profile}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*command, "--rerun-incomplete", "--nolock", "--quiet", "host", "reason", "--", *targets],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(root), "ATP_PROGRESS": os.devnull},
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with a notebook of a few cells, of which one is at fault while a file says so."""
    root = copied(tmp_path_factory)
    for split in ("train", "test"):
        for scenario in ("role_play", "tool_use", "collusion"):
            path = root / f"runs/smoke/data/{scenario}/{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_costs_its_cell(copy, fault, record_property):
    book, out = nbformat.read(ROOT / BOOK, as_version=4), "runs/smoke/evolution/role_play/smollm2-135m/standard/base"
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    first = "from pathlib import Path\nfolder = Path(out)\nfolder.mkdir(parents=True, exist_ok=True)\n"
    first += "with (folder / 'answered').open('a') as file:\n    file.write('x')"
    last = "(folder / 'manifest.json').write_text((folder / 'answered').read_text())"
    shutil.rmtree(copy / out, ignore_errors=True)

    def call(*cells):
        book.cells = [parameters, *map(nbformat.v4.new_code_cell, (first, *cells, last))]
        nbformat.write(book, copy / BOOK)
        process = reproduce(copy, f"{out}/manifest.json")
        if fault == "is interrupted" and cells:
            while not (copy / out / "waits").exists():
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[0]
        return process.returncode, said

    code, said = call(FAULTS[fault])
    # papermill adds a cell with the values that were given.
    assert code != 0 and f"error: {BOOK} {SAID[fault].format(3)}" in said, said
    log = "runs/smoke/notebooks/evolve-role_play-smollm2-135m-standard-base.ipynb"
    assert f"the notebook as far as it came: {log}" in said and (copy / log).is_file()
    assert (copy / out / "answered").read_text() == "x" and not (copy / out / "manifest.json").exists()
    code, said = call()
    assert code == 0 and (copy / out / "manifest.json").read_text() == "xx", said
    record_property("faults", 1)


# --- The pipeline ----------------------------------------------------------------------------------------------


def below(process):
    """What runs below a call: notebooks' processes and their kernels."""
    try:
        found = psutil.Process(process.pid).children(recursive=True)
        return [child for child in found if {"atp_utils.run", "ipykernel_launcher"} & set(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def test_a_pipeline_that_is_killed_again_and_again(embedded, tmp_path, record_property):
    draw, kills, calls = random.Random(16), [], 0
    places = {name: ROOT / "runs" / f"soak-{name}" for name in ("whole", "killed")}
    for folder in places.values():
        shutil.rmtree(folder, ignore_errors=True)
    profiles = {name: tmp_path / f"{place.name}.yaml" for name, place in places.items()}
    content = yaml.safe_load((ROOT / PROFILE).read_text()) | {"scenarios": ["role_play"], "arms": ["base", "dpo"]}
    for profile in profiles.values():
        profile.write_text(yaml.safe_dump(content))
    began = time.monotonic()
    process = reproduce(ROOT, profile=profiles["whole"])
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    seconds = time.monotonic() - began
    while True:
        calls += 1
        process = reproduce(ROOT, profile=profiles["killed"])
        if len(kills) < 8:
            # Between one and three notebooks on; what is killed is the call itself, a notebook's process, or a kernel.
            until, began = draw.uniform(0.02, 0.2) * seconds, time.monotonic()
            while process.poll() is None and time.monotonic() - began < until:
                time.sleep(0.2)
            running = below(process)
            if process.poll() is None and running:
                how = draw.choice(["SIGINT to all", "SIGKILL to a notebook", "SIGKILL to a kernel"])
                kills.append(how)
                if how == "SIGINT to all":
                    os.killpg(process.pid, signal.SIGINT)
                else:
                    wanted = "ipykernel_launcher" if "kernel" in how else "atp_utils.run"
                    ([child for child in running if wanted in child.cmdline()] or running)[-1].kill()
        said = process.communicate()[0]
        if process.returncode == 0:
            break
        assert calls < 60 and "Traceback" not in said.split("error: notebooks/")[-1], said[-3000:]
    tables = {name: journal.read_decisions(place / "evolution") for name, place in places.items()}
    key = ["arm", "item", "seed", "round"]
    whole, killed = (table.sort_values(key, ignore_index=True) for table in tables.values())
    assert len(whole) == len(killed) and whole[key].equals(killed[key])
    differ = int((whole["choice"].fillna("") != killed["choice"].fillna("")).sum())
    asked = sum(len(journal.record_of(run).replies) for run in journal.complete_runs(places["whole"]))
    again = sum(len(journal.record_of(run).replies) for run in journal.complete_runs(places["killed"]))
    assert again == asked
    assert not list(places["killed"].rglob(".replaced-*"))
    for name in sorted(set(kills)):
        record_property(name, kills.count(name))
    counts = {"calls": calls, "replies": asked, "decisions": len(whole), "choices that differ": differ}
    for name, value in counts.items():
        record_property(name, value)
    record_property("largest difference of P(deviate)", float((whole["p_deviate"] - killed["p_deviate"]).abs().max()))
    for folder in places.values():
        shutil.rmtree(folder)
