"""``python tests/killing.py JOB FOLDER MOMENT...``: do a job once whole, and for each moment killed there and again.

A moment is a share of the calls that the whole job makes in its process: at that call it sends itself SIGKILL, as the
system does when memory runs out. ``renames`` instead is every moment behind a change of a name. Counting calls would
make a training many times slower: there it is a share of the processor's time, after which the system sends SIGPROF,
which ends a process as suddenly. In FOLDER, ``whole`` and ``0``, ``1``, ... are what the job made, ``NAME.asked`` and
``NAME.asked again`` what it asked for before and after the kill, one line each, and ``NAME.kept`` a copy of what the
kill left. A child does each run, so that libraries are imported once.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from atp_utils import parameters, runs
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution.requests import Request
from atp_utils.runs import adapters, evolving, publish
from atp_utils.support import manifest

Job = Callable[[Path], None]
Moment = Callable[[str, object], bool]  # of an event and the function, as `sys.setprofile` has them
NAMING = ("rename", "replace")
COUNTS = {"train_per_environment": 2, "test_per_environment": 2, "instances_per_game": 2}
COUNTS |= {"simple_problems": 6, "complex_problems": 12, "simple_test": 4, "complex_test": 8}
SMALL = {
    "role_play": {"rounds": 3, "protocol": "reason", "max_attempts": 2, "seeds": [0, 1, 2]},
    "tool_use": {"rounds": 2, "simple_per_round": 2, "complex_per_round": 3, "agents_per_seed": 4},
    "collusion": {"rounds": 3, "agents": 3, "thresholds": [1, 2]},
}


def ask(line: str) -> None:
    """Note what is asked for, in one write: a kill leaves the whole line, or none."""
    os.write(ASKED, f"{line}\n".encode())


def answer(request: Request) -> str | list[float]:
    """A choice, text or tool call that depends on all of the chat; one in five written choices can't be read."""
    ask(request.digest("scripted"))
    number = int(hashlib.sha256(f"{request.seed} {request.content}".encode()).hexdigest()[:8], 16) / 16**8
    if request.options:
        return [number, 1 - number]
    named = re.findall(r'\{"choice": "[^"]+"\}', request.messages[-1]["content"])
    if named:
        return "Hm." if number < 0.2 else named[number < 0.6]
    called = any("The tool printed" in message["content"] for message in request.messages[-1:])
    return r"It is \boxed{42}." if called or number < 0.3 else f"<tool>print({int(number * 9)} * 7)</tool>"


def evolution(scenario: str, folder: Path) -> Job:
    """A scenario's evolution, by the functions that its notebook calls, on prompts in ``folder``."""
    data = {"out": str(folder / "data")}
    runs.write_data(COUNTS | data)
    evolving.open_engine = lambda *_, **__: ScriptedEngine(answer)

    def job(out: Path) -> None:
        evolving.begin(scenario, SMALL[scenario] | {"data": data["out"], "out": str(out)}).play()

    return job


def training(method: str, folder: Path) -> Job:
    """A training of a tiny model, of a checkpoint a step."""
    import tiny_models
    from trainings import a_run, rows_of

    from atp_utils.scenarios import role_play
    from atp_utils.scenarios.role_play.items import make_items, read_environments
    from atp_utils.training import trainer

    # In a child: once a process has computed, it can't be forked.
    if not run(lambda out: tiny_models.build("qwen3", out), folder / "model", folder / "none"):
        raise RuntimeError("no tiny model")
    changes = {"max_steps": 6, "batch_size": 2, "lora_rank": 2, "save_steps": 1, "dtype": "float32"}
    changes |= {"accumulation": 2, "learning_rate": 1e-3}
    changes |= {"group_size": 2, "max_new_tokens": 4} if method == "grpo" else {"min_mass": 0}
    items = make_items(read_environments())[0][:8]
    logged = trainer._Steps.on_log

    def on_log(self, args, state, control, **rest):
        ask(f"step {state.global_step}")
        return logged(self, args, state, control, **rest)

    trainer._Steps.on_log = on_log
    # No reply of a random model is an answer, and without a reward there would be nothing to learn.
    role_play.SCENARIO.reward = lambda _: contextlib.nullcontext(graded)

    def job(out: Path) -> None:
        given = a_run(method, str(folder / "model"), out, **changes)
        trainer.adapter(given, method, rows_of(given, items))

    return job


def graded(completions: list[str], **_: object) -> list[float]:
    """A reward that differs between replies."""
    return [len(set(completion)) / len(completion) if completion else 0.0 for completion in completions]


def publishing(folder: Path) -> Job:
    """The publishing of two runs and an adapter, in the place of a record that holds one of these runs."""
    run_folder = folder / "run"
    play = evolution("collusion", folder)
    for arm in ("base", "again"):
        if not run(play, run_folder / "evolution" / arm, folder / "none"):
            raise RuntimeError("no run")
    trained = run_folder / "adapters/dpo"
    trained.mkdir(parents=True)
    settings = parameters.check("02_align_dpo", {}).model_dump(mode="json")
    facts = {"settings": settings, "training": {"method": "dpo"}, "steps": 1, "rows": 1, "sha256": "0"}
    (trained / adapters.MANIFEST).write_text(json.dumps(facts))
    (trained / adapters.WEIGHTS).write_bytes(bytes(1000))
    (trained / adapters.CONFIG).write_text("{}")
    (trained / adapters.LOG).write_text("step,loss\n1,0.5\n")

    def before(out: Path) -> None:
        shutil.copytree(run_folder / "evolution/base", folder / "old/evolution/base")
        publish.publish(folder / "old", out / "record")
        adapters.publish(run_folder, out / "adapters")

    if not run(before, folder / "before", folder / "none"):
        raise RuntimeError("no record")

    def job(out: Path) -> None:
        if publish.main([str(run_folder), str(out / "record"), "--adapters", str(out / "adapters")]):
            os._exit(1)

    return job


def run(job: Job, out: Path, asked: Path, moment: Moment | float | None = None) -> bool:
    """Whether the job came to its end in a child.

    It is killed where ``moment`` says of an event that it has come, or after so many seconds of the processor.
    """

    def watch(_, event, function):
        if moment(event, function):
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        global ASKED
        ASKED = os.open(asked, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if isinstance(moment, float):
                signal.setitimer(signal.ITIMER_PROF, moment)
            else:
                sys.setprofile(watch if moment else None)
            job(out)
        finally:
            sys.setprofile(None)
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(sys.exc_info()[0] is not None)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{out.name} failed")
    return os.WIFEXITED(status)


def count(job: Job, out: Path, asked: Path, calls: bool) -> dict[str, float]:
    """Do the job; its seconds of the processor or, of ``calls``, their number and how many of them changed a name."""
    counts, told = {"calls": 0, "renames": 0}, asked.with_suffix(".counts")

    def moment(event, function):
        counts["calls"] += 1
        counts["renames"] += renames(event, function)
        return False

    def counted(out):
        job(out)
        sys.setprofile(None)
        told.write_text(json.dumps(counts if calls else {"seconds": time.process_time()}))

    run(counted, out, asked, moment if calls else None)
    return json.loads(told.read_text())


def renames(event: str, function: object) -> bool:
    return event == "c_return" and getattr(function, "__name__", "") in NAMING and function.__module__ == "posix"


def after(number: int, counted: Moment) -> Moment:
    """The moment at which so many events of a kind have been."""
    left = number

    def moment(event, function):
        nonlocal left
        left -= counted(event, function)
        return left < 0

    return moment


JOBS = {name: (lambda folder, name=name: evolution(name, folder)) for name in SMALL}
JOBS |= {name: (lambda folder, name=name: training(name, folder)) for name in ("dpo", "grpo")}
JOBS |= {"publish": publishing}


def main(name: str, folder: Path, moments: list[str]) -> None:
    # Most of a small job's calls would be those that read the packages' versions, and most kills would come then.
    manifest.packages = functools.cache(manifest.packages)
    manifest.packages()
    job = JOBS[name](folder)
    begins = folder / "before"  # what is there before the job, if anything
    if begins.exists():
        shutil.copytree(begins, folder / "whole")
    counts = count(job, folder / "whole", folder / "whole.asked", name in SMALL or name == "publish")
    if moments == ["renames"]:
        kills = [after(number, renames) for number in range(counts["renames"])]
    else:
        shares = [float(share) for share in moments]
        calls = counts.get("calls")
        kills = [after(int(share * calls), lambda *_: 1) if calls else share * counts["seconds"] for share in shares]
    killed = []
    for number, moment in enumerate(kills):
        out = folder / str(number)
        if begins.exists():
            shutil.copytree(begins, out)
        killed.append(not run(job, out, folder / f"{number}.asked", moment))
        shutil.copytree(folder, folder / f"{number}.kept", ignore=lambda at, names: names)
        if out.exists():
            shutil.copytree(out, folder / f"{number}.kept", dirs_exist_ok=True)
        run(job, out, folder / f"{number}.asked again")
    (folder / "killed.json").write_text(json.dumps({"killed": killed} | counts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
