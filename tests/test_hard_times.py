"""An evolution on a full disk, in a read-only folder, under a clock that jumps, moved, asked for by two at a time.

Each ends with an error that names the file, and goes on from there as if nothing had been.
"""

import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
import trainings

from atp_utils import ROOT, parameters, runs
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution.journal import Journal, read_record
from atp_utils.runs import evolving
from atp_utils.sandbox import find_bwraps
from atp_utils.support import folders
from atp_utils.training import trainer

COUNTS = {"train_per_environment": 2, "test_per_environment": 2, "instances_per_game": 2}
COUNTS |= {"simple_problems": 2, "complex_problems": 2, "simple_test": 1, "complex_test": 1}
ODD = 'größe 模型/a b\'s "c" 50% {d} $HOME'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    runs.write_data(COUNTS | {"out": str(folder)})
    return folder


@pytest.fixture
def play(data, monkeypatch):
    """Play role-play in a folder with some parameters; the decisions, and how many answers were asked for."""

    def scripted(out, **changes):
        engine = ScriptedEngine(lambda request: (0.3, 0.7) if len(request.messages) > 2 else (0.6, 0.4))
        monkeypatch.setattr(evolving, "open_engine", lambda *_, **__: engine)
        evolution = evolving.begin("role_play", {"data": str(data), "rounds": 2, "out": str(out)} | changes)
        return evolution.play(), engine.answered

    return scripted


def cut_short(out, share=0.5):
    """Leave a run as if it had been killed when so much of its journal was written."""
    for name in ("manifest.json", "decisions.parquet"):
        (out / name).unlink()
    content = (out / "replies.jsonl").read_bytes()
    (out / "replies.jsonl").write_bytes(content[: int(len(content) * share)])


def same(table, other):
    pd.testing.assert_frame_equal(table, other)
    return True


def test_a_run_goes_on_where_it_was_moved_to_and_paths_may_hold_anything(tmp_path, play):
    whole, asked = play(tmp_path / "whole")
    assert asked > 8
    play(tmp_path / "here")
    cut_short(tmp_path / "here")
    held = len(read_record(tmp_path / "here/replies.jsonl").replies)
    (tmp_path / ODD).parent.mkdir()
    shutil.move(tmp_path / "here", tmp_path / ODD)
    table, rest = play(tmp_path / ODD)
    assert same(table, whole) and 0 < rest < asked and rest == asked - held
    assert play(tmp_path / ODD)[1] == 0


@pytest.mark.parametrize("to", [0, 2**32])
def test_a_clock_that_jumps_moves_nothing(tmp_path, play, monkeypatch, to):
    whole, asked = play(tmp_path / "whole")
    play(tmp_path / "run")
    cut_short(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (to, to))
    monkeypatch.setattr(time, "time", lambda: to)
    table, rest = play(tmp_path / "run")
    assert same(table, whole) and 0 < rest < asked


def test_of_the_checkpoints_the_last_is_kept_whatever_the_clock_says(tmp_path):
    """The Trainer goes by times: after a clock was set back it would delete the checkpoint that it has just saved."""
    for step, when in ((1, 3e9), (2, 1e9)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
        os.utime(tmp_path / f"checkpoint-{step}", (when, when))
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    arguments = trainer.trl_arguments(tmp_path, rows, parameters.check("02_align_dpo", {}))
    assert arguments.save_total_limit is None

    class State:
        is_world_process_zero, global_step = True, 2

    trainer._Steps(None, None).on_save(arguments, State, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("state", ["", '{"epoch": 1.0, "glo', "\0" * 40])
def test_a_training_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path, state):
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-9/trainer_state.json").write_text('{"epoch": 1.0}')
    (tmp_path / "checkpoint-10/trainer_state.json").write_text(state)
    assert trainer._last_whole(tmp_path) == str(tmp_path / "checkpoint-9")
    assert trainer._last_whole(tmp_path / "none") is None


def test_changed_prompts_ask_for_what_they_changed(tmp_path, play, data):
    before, asked = play(tmp_path / "run")
    replies = (tmp_path / "run/replies.jsonl").read_bytes()
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    path = mine / "role_play/test.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(first.replace('"prompt":"', '"prompt":"Once upon a time: ') + "\n" + rest)
    changed, more = play(tmp_path / "run", data=str(mine), overwrite=True)
    assert 0 < more < asked and same(changed, play(tmp_path / "new", data=str(mine))[0])
    # What was paid for stays, and answers the old prompts.
    assert (tmp_path / "run/replies.jsonl").read_bytes().startswith(replies)
    again, none = play(tmp_path / "run", overwrite=True)
    assert same(again, before) and none == 0


def test_a_damaged_line_is_named_and_nothing_is_touched(tmp_path, play):
    whole, asked = play(tmp_path / "run")
    path = tmp_path / "run/replies.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    content[5] = content[5][:20] + b"\0\0\xff\n"
    # The end is torn too, and isn't cut off as long as the rest can't be read.
    path.write_bytes(b"".join(content)[:-9])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"replies.jsonl, line 6: "):
        play(tmp_path / "run")
    assert path.read_bytes() == before
    # Without the line, what it held is asked for again.
    path.write_bytes(b"".join(content[:5] + content[6:]))
    table, rest = play(tmp_path / "run")
    assert same(table, whole) and rest <= 1


def test_a_lost_message_is_named(tmp_path, play):
    table, _ = play(tmp_path)
    path = tmp_path / "replies.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(ValueError, match="the request of the reply .* isn't whole: '[0-9a-f]+'"):
        read_record(path).request(table["reply"][0])


# --- Other processes -----------------------------------------------------------------------------------------


def elsewhere(code, *command, **options):
    """Another process that runs ``code``, perhaps inside of ``command``."""
    return subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"ATP_PROGRESS": os.devnull}, **options,
    )  # fmt: skip


def evolution(data, out, **changes):
    """Code that plays role-play as `play` does."""
    given = {"data": str(data), "rounds": 2, "out": str(out)} | changes
    return f"""
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.runs import evolving
rule = lambda request: (0.3, 0.7) if len(request.messages) > 2 else (0.6, 0.4)
evolving.open_engine = lambda *_, **__: ScriptedEngine(rule)
evolving.begin("role_play", {given!r}).play()
"""


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, play, data):
    whole, _ = play(tmp_path)
    marker = (tmp_path / folders.MARKER).read_bytes()
    for changes in {}, {"rounds": 3, "overwrite": True}:
        with Journal(tmp_path):
            done = elsewhere(evolution(data, tmp_path, **changes))
        assert done.returncode == 1 and f"{tmp_path.name} is in use by another run" in done.stderr
        assert (tmp_path / folders.MARKER).read_bytes() == marker and (tmp_path / "manifest.json").is_file()
    assert same(play(tmp_path)[0], whole)


def test_a_training_that_runs_is_neither_joined_nor_set_aside(tmp_path):
    for given in {}, {"beta": 0.2, "overwrite": True}:
        run = trainings.a_run("dpo", "smollm2-135m", tmp_path / "adapter", **given)
        folders.claim(run.out, {"notebook": "02_align_dpo"}, overwrite=True, append=True)
        with folders.lock(run.out), pytest.raises((RuntimeError, FileExistsError), match="in use|holds something else"):
            trainer.adapter(run, "dpo", [{"prompt": "p"}])
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def view(*options):
    """Bubblewrap with all of the file system, and over it what ``options`` say; skips where it may not start."""
    for bwrap in find_bwraps():
        command = [bwrap, "--dev-bind", "/", "/", *map(str, options)]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("no file system of a process's own can be made here: user namespaces aren't permitted")


def test_a_full_disk_is_named_and_room_is_enough_to_go_on(tmp_path, play, data):
    whole, asked = play(tmp_path / "whole")
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir(), out.mkdir()
    size = (tmp_path / "whole/replies.jsonl").stat().st_size
    # What the small disk held is copied out before the process ends, and its disk with it.
    code = f"""
import shutil
try:
    {evolution(data, small / "run").replace(chr(10), chr(10) + "    ")}
finally:
    shutil.copytree({str(small / "run")!r}, {str(out / "run")!r})
"""
    done = elsewhere(code, *view("--size", size // 2, "--tmpfs", small))
    assert done.returncode == 1, done.stderr
    assert "replies.jsonl: No space left on device; the replies before are kept" in done.stderr
    content = (out / "run/replies.jsonl").read_bytes()
    assert content.endswith(b"\n") and not (out / "run/manifest.json").exists()
    held = len(read_record(out / "run/replies.jsonl").replies)
    table, rest = play(out / "run")
    assert same(table, whole) and rest == asked - held and held


def test_a_read_only_folder_is_named_before_anything_is_asked(tmp_path, play, data):
    run = tmp_path / "run"
    run.mkdir()
    for finished in False, True:
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        done = elsewhere(evolution(data, run), *view("--ro-bind", run, run))
        assert done.returncode == 1 and f"Read-only file system: '{run}" in done.stderr, (finished, done.stderr)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        play(run)


def test_decisions_of_other_parameters_never_stand_behind_a_runs_marker(tmp_path, play, monkeypatch):
    whole, _ = play(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folders, "claim", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        play(tmp_path, rounds=1, overwrite=True)
    assert not (tmp_path / "manifest.json").exists()
    table, none = play(tmp_path)
    assert same(table, whole) and none == 0
