"""What holds the repository's own files together."""

import json
import shutil
import subprocess
import tomllib

import pytest
import yaml

from atp_utils import ROOT
from atp_utils.runs import adapters
from atp_utils.support.files import sha256


def test_conda_users_get_the_same_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    pins = {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert {entry for entry in pip if not entry.startswith("-e")} == pins
    assert all("==" in pin for pin in pins)


def test_nothing_large_and_no_weights_but_small_adapters_are_tracked():
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listing.stdout.split("\0") if name]
    present = [path for path in tracked if path.is_file()]
    records = [ROOT / "data/results", ROOT / adapters.PUBLISHED]
    recorded = [path for path in present if any(path.is_relative_to(folder) for folder in records)]
    others = [path.stat().st_size for path in set(present) - set(recorded)]
    assert sum(path.stat().st_size for path in recorded) < 25e6
    assert sum(others) < 12e6 and max(others) < 5e6
    weights = [path for path in present if path.suffix in (".safetensors", ".gguf", ".bin")]
    published = [path for path in weights if path.is_relative_to(ROOT / adapters.PUBLISHED)]
    assert weights == published and sum(path.stat().st_size for path in published) < 20e6
    for path in published:
        facts = json.loads(path.with_name("manifest.json").read_text())
        assert path.stat().st_size <= adapters.LARGEST and facts["sha256"] == sha256(path)


def cleaned(root, profile):
    shutil.copy(ROOT / "Makefile", root)
    return subprocess.run(["make", "clean", f"PROFILE={profile}"], cwd=root, capture_output=True, text=True)


def test_what_a_profiles_run_made_can_be_removed_whole(tmp_path):
    for part in ("data/role_play", "demonstration/dpo", "evolution", "notebooks"):
        (tmp_path / "runs/quick" / part).mkdir(parents=True)
    (tmp_path / "runs/other/data").mkdir(parents=True)
    assert cleaned(tmp_path, "quick").returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize("profile", ["..", ".", "mine/..", "/", ""])
def test_nothing_outside_a_profiles_run_is_removed(tmp_path, profile):
    for place in ("data/thesis", "runs/data/thesis"):
        (tmp_path / place).mkdir(parents=True)
    done = cleaned(tmp_path, profile)
    assert done.returncode == 2 and f"PROFILE={profile}: expected the name" in done.stderr
    assert (tmp_path / "data/thesis").is_dir() and (tmp_path / "runs/data/thesis").is_dir()
