"""Nothing is removed or overwritten that the project didn't make, or that differs from what is asked for now."""

import json
import subprocess
import sys

import pytest

from atp_utils import ROOT, runs
from atp_utils.evolution.decisions import to_frame
from atp_utils.runs import evolving, publish
from atp_utils.support import folders


@pytest.fixture
def precious(tmp_path):
    """A user's folder."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"overwrite": True, "append": True}])
def test_a_folder_that_is_not_ours_is_refused_by_name(precious, options):
    with pytest.raises(FileExistsError, match="precious isn't empty and wasn't made by this project.*by out"):
        folders.claim(precious, {"a": 1}, **options)
    assert contents(precious) == {"thesis.txt": b"years of work"}


def test_a_file_is_no_folder(precious):
    with pytest.raises(NotADirectoryError, match="thesis.txt is a file: name a folder by figures"):
        folders.claim(precious / "thesis.txt", {}, name="figures")


def test_what_a_folder_holds_is_kept(tmp_path):
    folder, held = tmp_path / "ours", {"settings": {"rate": 1e-5, "epochs": 3}, "rows": [1]}
    assert folders.claim(folder, held) == folders.claim(folder, held) == folder
    (folder / "adapter").write_text("weights")
    with pytest.raises(FileExistsError, match="settings.rate: '1e-05', asked '0.1'.*or set overwrite to true"):
        folders.claim(folder, {"settings": {"rate": 0.1, "epochs": 3}, "rows": [1]})
    assert folders.holds(folder) == held and (folder / "adapter").read_text() == "weights"


def test_overwriting_sets_aside_and_appending_keeps(tmp_path):
    folder = tmp_path / "ours"
    for number in range(3):
        folders.claim(folder, {"run": number}, overwrite=True)
        (folder / "adapter").write_text(str(number))
    aside = sorted(path.name for path in tmp_path.iterdir())
    assert aside == [".replaced-ours-1", ".replaced-ours-2", "ours"]
    assert (tmp_path / ".replaced-ours-1/adapter").read_text() == "0"
    folders.claim(folder, {"run": 3}, overwrite=True, append=True)
    assert (folder / "adapter").read_text() == "2" and folders.holds(folder) == {"run": 3}
    assert list(folders.below(tmp_path, "adapter")) == [folder / "adapter"]


def test_a_part_of_the_marker_is_checked_before_the_rest_is_known(tmp_path):
    folders.claim(tmp_path / "ours", {"rate": 1, "rows": "abc"})
    assert folders.check(tmp_path / "ours", {"rate": 1}) == {"rate": 1, "rows": "abc"}
    assert folders.check(tmp_path / "new", {"rate": 1}) is None and not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="rate: '1', asked '2'"):
        folders.check(tmp_path / "ours", {"rate": 2})


def test_a_damaged_marker_is_named(tmp_path):
    (tmp_path / folders.MARKER).write_text("{")
    with pytest.raises(ValueError, match=".atp.json is damaged"):
        folders.claim(tmp_path, {})


BOOKS = ["01_generate_data", "02_align_dpo", "03_align_grpo", "04_evolve_role_play", "06_evolve_collusion"]


@pytest.mark.parametrize("book", BOOKS)
def test_no_notebook_touches_a_foreign_folder(precious, tmp_path, book):
    """The kernel starts, the first cells refuse; 01's folders lie below the one that is named."""
    folder = precious.parent if book == "01_generate_data" else precious
    if book == "01_generate_data":
        precious.rename(folder / "role_play")
    before = contents(folder)
    command = [sys.executable, "-m", "atp_utils.run", f"notebooks/{book}.ipynb", str(ROOT / "runs/refused.ipynb")]
    done = subprocess.run([*command, "-p", "out", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "wasn't made by this project" in done.stderr, done.stderr
    assert contents(folder) == before


def test_prompts_of_other_counts_are_not_replaced(tmp_path):
    values = {"out": str(tmp_path), "simple_problems": 4, "complex_problems": 4, "simple_test": 2, "complex_test": 2}
    made = runs.write_data(values)
    before = contents(tmp_path)
    assert len(made["role_play"]["test"]) == (tmp_path / "role_play/test.jsonl").read_text().count("\n") == 64
    with pytest.raises(FileExistsError, match="parameters.seed: '0', asked '1'"):
        runs.write_data(values | {"seed": 1})
    assert contents(tmp_path) == before
    runs.write_data(values | {"seed": 1, "overwrite": True})


def test_runs_that_differ_have_different_folders():
    def folder(**changes):
        return runs.start("04_evolve_role_play", {"model": "a/b"} | changes, "evolution", "role_play").out

    assert folder() == folder(servers="http://a/v1", overwrite=True, batch_tokens=9)
    assert folder().parent == ROOT / "runs/demo/evolution/role_play/a--b"
    assert len({folder(), folder(rounds=2), folder(temperature=0.5), folder(model="c/d")}) == 4


# --- Publishing --------------------------------------------------------------------------------------------


def a_run(out, **changes):
    return runs.Run("06_evolve_collusion", runs.parameters.check("06_evolve_collusion", changes), out)


def finished_run(folder, *arms):
    for arm in arms:
        run = a_run(folder / f"evolution/games/m/{arm}", arm=arm)
        with evolving._journal(run, "weights") as record:
            record.finish(to_frame([], model="m", arm=arm), run.settings, "weights")


def test_publishing_takes_complete_runs_and_no_weights(tmp_path):
    finished_run(tmp_path / "run", "base")
    (tmp_path / "run/evolution/games/m/dpo").mkdir()
    adapter = tmp_path / "run/adapters/games/m/dpo"
    adapter.mkdir(parents=True)
    for name in ("training_log.csv", "manifest.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    names = publish.publish(tmp_path / "run", tmp_path / "record")
    assert [str(name) for name in names] == [
        "adapters/games/m/dpo/manifest.json",
        "adapters/games/m/dpo/training_log.csv",
        "evolution/games/m/base/decisions.parquet",
        "evolution/games/m/base/manifest.json",
        "evolution/games/m/base/replies.jsonl.xz",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record", "run"]


def test_publishing_without_a_run_leaves_the_record(tmp_path):
    finished_run(tmp_path / "run", "base")
    publish.publish(tmp_path / "run", tmp_path / "record")
    before = contents(tmp_path / "record")
    with pytest.raises(FileNotFoundError, match="holds no complete run"):
        publish.publish(tmp_path / "none", tmp_path / "record")
    assert contents(tmp_path / "record") == before
    assert publish.main([str(tmp_path / "none"), str(tmp_path / "record")]) == 2


def test_a_record_loses_runs_only_if_told_to(tmp_path):
    finished_run(tmp_path / "all", "base", "dpo")
    finished_run(tmp_path / "part", "base")
    publish.publish(tmp_path / "all", tmp_path / "record")
    with pytest.raises(FileExistsError, match="lacks .evolution/games/m/dpo.*--overwrite"):
        publish.publish(tmp_path / "part", tmp_path / "record")
    assert len(publish.publish(tmp_path / "part", tmp_path / "record", overwrite=True)) == 3
    assert (tmp_path / ".replaced-record-1/evolution/games/m/dpo/manifest.json").is_file()
    # One that holds no more than the new one makes room for it.
    publish.publish(tmp_path / "all", tmp_path / "record")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".replaced-record-1", "all", "part", "record"]


def test_publishing_spares_what_it_did_not_publish(tmp_path, precious):
    finished_run(tmp_path / "run", "base")
    with pytest.raises(FileExistsError, match="precious isn't empty"):
        publish.publish(tmp_path / "run", precious, overwrite=True)
    publish.publish(tmp_path / "run", tmp_path / "record")
    (tmp_path / "record/notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match="holds what run lacks .notes.md"):
        publish.publish(tmp_path / "run", tmp_path / "record")
    publish.publish(tmp_path / "run", tmp_path / "record", overwrite=True)
    assert (tmp_path / ".replaced-record-1/notes.md").read_text() == "mine" and (precious / "thesis.txt").is_file()


def test_a_finished_run_of_other_weights_is_not_replaced(tmp_path):
    finished_run(tmp_path, "base")
    out = tmp_path / "evolution/games/m/base"
    before = contents(out)
    with pytest.raises(FileExistsError, match="holds a finished run of 'weights', asked was 'others'"):
        evolving._journal(a_run(out), "others")
    assert contents(out) == before
    evolving._journal(a_run(out, overwrite=True), "others").close()
    assert (out / "replies.jsonl").is_file() and not (out / "manifest.json").exists()


def test_the_manifest_holds_every_parameter(tmp_path):
    finished_run(tmp_path, "base")
    facts = json.loads((tmp_path / "evolution/games/m/base/manifest.json").read_text())
    assert set(facts["settings"]) == set(runs.parameters.model_of("06_evolve_collusion").model_fields)
    assert facts["identity"] == "weights" and facts["counts"]["faults"] == {}


# --- Folders that are built anew -------------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    target = folders.claim(tmp_path / "record", {"made": 1})
    (target / "a").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), folders.rebuilding(target, {"made": 2}) as built:
        (built / "a").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before
    # Also between the two renames.
    replace, calls = type(target).replace, []

    def fails(self, other):
        calls.append(other)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replace(self, other)

    monkeypatch.setattr(type(target), "replace", fails)
    with pytest.raises(KeyboardInterrupt), folders.rebuilding(target, {"made": 2}) as built:
        (built / "a").write_text("new")
    assert contents(tmp_path) == before and calls[-1] == target


def test_what_a_kill_left_is_put_back_and_cleared(tmp_path):
    target = folders.claim(tmp_path / "record", {"made": 1})
    (target / "a").write_text("old")
    scratch = tmp_path / ".rebuilding-record"
    (scratch / "new").mkdir(parents=True)
    (scratch / "new/half").touch()
    target.rename(scratch / "before")
    with pytest.raises(FileExistsError), folders.rebuilding(target, {"made": 2}):
        assert (target / "a").read_text() == "old"
        raise FileExistsError
    assert contents(tmp_path) == {"record/.atp.json": (target / ".atp.json").read_bytes(), "record/a": b"old"}


def test_only_one_at_a_time_builds(tmp_path):
    with folders.rebuilding(tmp_path / "record", {}):
        with pytest.raises(RuntimeError, match="in use by another run"), folders.rebuilding(tmp_path / "record", {}):
            pass
    assert (tmp_path / "record").is_dir()


def test_a_users_file_beside_a_published_adapter_is_set_aside(tmp_path):
    for kept in False, True:
        with folders.rebuilding(tmp_path / "adapter", {}) as built:
            (built / "weights").touch()
        assert (tmp_path / ".replaced-adapter-1").exists() == kept
        (tmp_path / "adapter/notes").write_text("mine")
    assert (tmp_path / ".replaced-adapter-1/notes").read_text() == "mine"
