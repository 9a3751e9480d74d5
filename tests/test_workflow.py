"""What makes the workflow run a job again, on a copy of the repository whose jobs count as done."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from atp_utils import ROOT, runs
from atp_utils.profiles import read_profile
from atp_utils.runs import adapters
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support.code_digest import closure
from atp_utils.support.files import sha256


def snakemake(root, *arguments, profile="tests/profiles/smoke.yaml", config=()):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"profile={profile}", *config]
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


def copied(tmp_path_factory):
    """A copy of what the pipeline needs of the repository, without prompts and results."""
    root = tmp_path_factory.mktemp("repository") / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("atp_utils", "notebooks", "profiles", "tests/profiles", "data/environments"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "Snakefile", root)
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the repository in which every output is there, though empty, and recorded as up to date."""
    root = copied(tmp_path_factory)
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
    for name in closure("notebooks/04_evolve_role_play.ipynb", "notebooks/08_figures.ipynb"):
        module = finished / name
        _, docstring, rest = module.read_text().split('"""', 2)
        module.write_text(f'"""Other words: {docstring}"""{rest}\n# The end.\n')
    assert jobs(finished) == {}
    edit(finished, "08_figures", "markdown", "\nMore.")
    assert jobs(finished) == {"figures": 1}


def test_code_reruns_what_depends_on_it(finished):
    edit(finished, "04_evolve_role_play", "code", "\nprint(1)")
    # One scenario's three arms, then both notebooks that draw.
    assert jobs(finished) == {"evolve": 3, "figures": 2}
    module = finished / "atp_utils/training/pairs.py"
    module.write_text(module.read_text() + "\nADDED = 1\n")
    assert jobs(finished) == {"align": 6, "evolve": 7, "figures": 2}
    snakemake(finished, "--touch", "--forceall")
    # Nothing imports what the sandbox runs in its other process.
    worker = finished / next(name for name in closure("atp_utils/scenarios/tool_use/__init__.py") if "worker" in name)
    worker.write_text(worker.read_text() + "\nADDED = 1\n")
    assert jobs(finished)["evolve"] >= 3


def test_edited_sources_of_prompts_make_the_prompts_anew(finished):
    snakemake(finished, "--touch", "--forceall")
    names = {"complex_problems.yaml", "simple_problems.yaml", "role_play.yaml"}
    for name in names:
        path = finished / "data/environments" / name
        path.write_text(path.read_text() + "# Another comment.\n")
    said = snakemake(finished, "--dry-run", "--until", "data")
    [edited] = re.findall(r"Reason: Updated input files: (.*)", said)
    assert {os.path.basename(path) for path in edited.split(", ")} == names
    snakemake(finished, "--touch", "--forceall")


def test_an_edited_file_of_problems_makes_the_prompts_anew(finished):
    problems, profile = finished / "my own problems.jsonl", finished / "tests/profiles/smoke.yaml"
    before = profile.read_text()
    named = before.replace("01_generate_data: {", f"01_generate_data: {{problem_source: {json.dumps(problems.name)}, ")
    try:
        problems.write_text("1\n")
        profile.write_text(named)
        snakemake(finished, "--touch", "--forceall")
        assert jobs(finished) == {}
        problems.write_text("2\n")
        assert jobs(finished)["data"] == 1
    finally:
        profile.write_text(before)
        snakemake(finished, "--touch", "--forceall")


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


ODD = [
    "a b",
    "m&co",
    "c++-(v1)",
    "~/m",
    "it's",
    'say "hi"',
    "$HOME",
    "größe/模型",
    "a;b|c",
    "50%",
    "#1",
    "*",
    "x,y",
    "/abs/m",
]


def commands(root, **given):
    """The words of each shell command that a run of everything would start, as a shell splits them."""
    text = snakemake(root, "--dry-run", "--forceall", "--printshellcmds", **given)
    return [shlex.split(command) for command in re.findall(r"python -m atp_utils\.run .*", text)]


@pytest.mark.parametrize("stem", ["my profile", "c++-(v1).2", "m&co's"])
def test_any_name_reaches_the_notebooks_whole(finished, tmp_path, stem):
    names = ODD if stem == "my profile" else ODD[:1]
    content = yaml.safe_load((finished / "tests/profiles/smoke.yaml").read_text()) | {
        "models": {name: {"02_align_dpo": {"beta": 0.25}} for name in names},
        "scenarios": ["role_play"],
    }
    profile = tmp_path / "a folder" / f"{stem}.yaml"
    profile.parent.mkdir()
    profile.write_text(yaml.safe_dump(content, allow_unicode=True))
    found = commands(finished, profile=profile)
    # Data and figures once, and two trainings and three evolutions for each model.
    assert len(found) == 2 + 5 * len(names)
    seen = set()
    for words in found:
        assert words[4].startswith(f"runs/{stem}/notebooks/") and words[3].startswith("notebooks/")
        rest = words[5:]
        if rest[0] == "--profile":
            assert rest[1] == str(profile)
            rest = rest[2:]
        values = {name: value for flag, name, value in zip(rest[::3], rest[1::3], rest[2::3], strict=True)}
        assert set(rest[::3]) == {"-p"} and values["overwrite"] == "true"
        if "model" in values:
            folder = values["model"].replace("/", "--")
            assert values["out"].startswith(f"runs/{stem}/") and f"/role_play/{folder}/" in values["out"]
            assert not values.get("adapter") or values["adapter"].startswith(
                f"runs/{stem}/adapters/role_play/{folder}/"
            )
            seen.add(values["model"])
            # Its settings are found by the very word that the notebook is started with.
            assert read_profile(str(profile)).parameters("02_align_dpo", "role_play", values["model"]).beta == 0.25
    assert seen == set(names)


def test_each_condition_is_a_job_of_its_own_folder_and_settings(finished, tmp_path):
    content = yaml.safe_load((finished / "tests/profiles/smoke.yaml").read_text()) | {
        "conditions": {"role_play": ["standard", "caught"], "collusion": ["reminder"]}
    }
    content["notebooks"]["04_evolve_role_play/caught"] = {"rounds": 5}
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump(content))
    evolutions = [words for words in commands(finished, profile=profile) if "_evolve_" in words[3]]
    found = {words[words.index("out") + 1]: words[words.index("condition") + 1] for words in evolutions}
    played = [("role_play", "standard"), ("role_play", "caught"), ("tool_use", "standard"), ("collusion", "reminder")]
    assert found == {
        f"runs/mine/evolution/{scenario}/smollm2-135m/{condition}/{policy}": condition
        for scenario, condition in played
        for policy in ("base", "dpo-0", "grpo-0")
    }
    # All conditions of an arm have its one adapter, and a log each.
    adapters = {words[words.index("adapter") + 1] for words in evolutions}
    assert adapters == {""} | {
        f"runs/mine/adapters/{scenario}/smollm2-135m/{policy}"
        for scenario in ("role_play", "tool_use", "collusion")
        for policy in ("dpo-0", "grpo-0")
    }
    assert len({words[4] for words in evolutions}) == 12
    settings = read_profile(str(profile))
    rounds = {c: settings.parameters("04_evolve_role_play", c, "smollm2-135m").rounds for c in ("standard", "caught")}
    assert rounds == {"standard": 2, "caught": 5}


def values_of(words):
    """The parameters that a command of `atp_utils.run` is given."""
    start = words.index("-p")
    return dict(zip(words[start + 1 :: 3], words[start + 2 :: 3], strict=True))


def test_each_seed_of_a_training_has_an_adapter_and_evolutions_of_its_own(finished, tmp_path):
    content = yaml.safe_load((finished / "tests/profiles/smoke.yaml").read_text()) | {
        "scenarios": ["role_play"], "training_seeds": {"role_play": [3, 5]}
    }  # fmt: skip
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump(content))
    found = [(words[3], values_of(words)) for words in commands(finished, profile=profile)]
    folder = "runs/mine/adapters/role_play/smollm2-135m"
    trained = {given["out"]: given["seed"] for book, given in found if "_align_" in book}
    assert trained == {f"{folder}/{arm}-{seed}": seed for arm in ("dpo", "grpo") for seed in "35"}
    played = {(given["arm"], given["training_seed"]): given["adapter"] for book, given in found if "_evolve_" in book}
    expected = {(arm, seed): f"{folder}/{arm}-{seed}" for arm in ("dpo", "grpo") for seed in "35"}
    assert played == {("base", "0"): ""} | expected


def test_a_published_adapter_of_the_same_settings_is_taken_instead_of_a_training(finished, tmp_path):
    content = yaml.safe_load((finished / "tests/profiles/smoke.yaml").read_text()) | {"scenarios": ["role_play"]}
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump(content))
    settings = read_profile(str(profile))
    prompts = runs.prompts_marker(SCENARIOS["role_play"], settings.parameters(runs.DATA))
    # The copy's environments may have been edited.
    prompts["sources"] = {name: sha256(finished / "data/environments" / name) for name in prompts["sources"]}
    for arm, book in (("dpo", "02_align_dpo"), ("grpo", "03_align_grpo")):
        place = finished / adapters.folder("smollm2-135m", "role_play", arm, 0)
        place.mkdir(parents=True)
        given = settings.parameters(book, "role_play", "smollm2-135m").model_dump(mode="json")
        facts = {"settings": given | {"out": "elsewhere", "seed": 0}, "prompts": prompts}
        (place / "manifest.json").write_text(json.dumps(facts))
        (place / adapters.WEIGHTS).touch()

    def books(*config):
        found = [(words[3], values_of(words)) for words in commands(finished, profile=profile, config=config)]
        used = {given["adapter"] for _, given in found if given.get("adapter")}
        return sorted(book for book, _ in found if "_align_" in book), used, [given for _, given in found]

    try:
        shown, used, given = books()
        assert used == {f"data/adapters/smollm2-135m/role_play/{arm}/0" for arm in ("dpo", "grpo")}
        # What is left of the training is its demonstration, with the notebooks' own few steps.
        assert len(shown) == 2 and {"runs/mine/demonstration/dpo", "runs/mine/demonstration/grpo"} <= {
            each["out"] for each in given if "out" in each
        }
        ours = {f"runs/mine/adapters/role_play/smollm2-135m/{arm}-0" for arm in ("dpo", "grpo")}
        assert books("adapters=train")[1] == ours
        content["notebooks"]["02_align_dpo"] = content["notebooks"].get("02_align_dpo", {}) | {"beta": 0.3}
        profile.write_text(yaml.safe_dump(content))
        # Of other settings it is another adapter.
        assert books()[1] == {"data/adapters/smollm2-135m/role_play/grpo/0", min(ours)}
        # So it is of other prompts.
        content["notebooks"][runs.DATA] = content["notebooks"].get(runs.DATA, {}) | {"seed": 7}
        profile.write_text(yaml.safe_dump(content))
        assert books()[1] == ours
    finally:
        shutil.rmtree(finished / "data/adapters")


def test_a_conditions_own_settings_rerun_its_jobs_alone(finished, tmp_path):
    profile = finished / "tests/profiles/smoke.yaml"
    before = profile.read_text()
    snakemake(finished, "--touch", "--forceall")
    try:
        profile.write_text(before + "  04_evolve_role_play/standard: {rounds: 5}\n")
        assert jobs(finished) == {"evolve": 3, "figures": 2}
    finally:
        profile.write_text(before)


def test_servers_reach_the_notebooks_whole(finished):
    urls = ["http://a:8000/it's/v1", "http://b:8000/m&co/v1"]
    found = commands(finished, config=(f"servers={','.join(urls)}",))
    evolutions = [words for words in found if "_evolve_" in words[3]]
    assert len(evolutions) == 9
    for words in evolutions:
        # What stands last wins: servers hold the adapters themselves.
        assert words[-3:] == ["-p", "servers", ",".join(urls)]
        assert words[words.index("adapter") + 1] == ""


def test_on_several_gpus_a_training_has_all_and_evolutions_one_each(finished):
    found = commands(finished, config=("gpus=8",))
    held = {(words[3].split("_")[1], words[-2:] == ["--gpus", "8"]) for words in found}
    assert {("align", False), ("evolve", True)} <= held and not {("align", True), ("evolve", False)} & held
    needs = asked(finished, "--workflow-profile", "none", "--config", "profile=tests/profiles/smoke.yaml", "gpus=8")
    assert (needs["align"]["gpu"], needs["evolve"]["gpu"]) == ("8", "1")
    assert not any("--gpus" in words for words in commands(finished))


def test_another_model_is_run_with_the_profiles_settings(finished):
    found = commands(finished, config=("model=~/mine",))
    models = {words[words.index("model") + 1] for words in found if "model" in words}
    assert len(found) == 3 + 15 and models == {"~/mine"}
