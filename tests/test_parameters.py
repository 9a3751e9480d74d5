import os
from ast import literal_eval

import papermill
import pytest

from atp_utils import parameters, resolve
from atp_utils.parameters import check, from_text
from atp_utils.profiles import read_profile, run_folder

BOOKS = sorted(path.stem for path in resolve("notebooks").glob("*.ipynb"))
PROFILES = sorted(path.stem for path in resolve("profiles").glob("*.yaml"))


def test_every_notebook_declares_its_parameters():
    assert set(parameters.MODELS) == set(BOOKS)


@pytest.mark.parametrize("book", BOOKS)
def test_the_tagged_cell_repeats_the_declared_names_and_defaults(book):
    cell = papermill.inspect_notebook(str(resolve(f"notebooks/{book}.ipynb")))
    declared = parameters.model_of(book)
    assert {name: literal_eval(found["default"]) for name, found in cell.items()} == declared().model_dump()
    assert all(field.description for field in declared.model_fields.values())


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_valid(name):
    assert read_profile(name).scenarios


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no parameter 'round' \(it has: .*rounds"):
        check("04_evolve_role_play", {"round": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0), ("rounds", 2.5), ("rounds", "6"), ("rounds", True), ("seeds", []), ("seeds", [0, -1]),
        ("arm", "ppo"), ("protocol", "ask"), ("temperature", -0.1), ("top_p", 0), ("thinking", "perhaps"),
        ("model", ""), ("items", None), ("condition", "cought"), ("held_out", 5),
        ("history_window", -1), ("memory", "all"), ("supervision", []), ("supervision", ["watched"]), ("told", ["me"]),
        ("forced_rounds", 7), ("ratios", [0]), ("ratios", [1, 1]),
        ("temperature", True), ("temperature", float("inf")), ("top_p", float("nan")),
        ("temperature", "nan"), ("temperature", "1:30"), ("thinking", 1), ("thinking", "true"), ("seeds", [0, 0]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"04_evolve_role_play, parameter {name}[.:]"):
        check("04_evolve_role_play", {name: value})


def test_payoffs_are_numbers():
    assert check("06_evolve_collusion", {"payoffs": [[2, 1.5, "1e-1"]]}).payoffs == [[2.0, 1.5, 0.1]]
    for wrong in (True, float("inf"), "much"):
        with pytest.raises(ValueError, match=r"parameter payoffs\.0\.2: "):
            check("06_evolve_collusion", {"payoffs": [[2, 1.5, wrong]]})


def test_a_number_may_be_written_as_text():
    assert check("02_align_dpo", {"learning_rate": "1e-5"}).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("book", "name", "text", "value"),
    [
        ("04_evolve_role_play", "rounds", "3", 3), ("04_evolve_role_play", "seeds", "[0, 1]", [0, 1]),
        ("04_evolve_role_play", "thinking", "true", True), ("02_align_dpo", "scenario", "role_play", "role_play"),
        ("04_evolve_role_play", "temperature", "0.5", 0.5), ("04_evolve_role_play", "adapter", "", ""),
        ("04_evolve_role_play", "supervision", '["supervised", "uncertain"]', ["supervised", "uncertain"]),
        ("04_evolve_role_play", "condition", "caught", "caught"),
        ("04_evolve_role_play", "unknown", "x", "x"), ("04_evolve_role_play", "rounds", "many", "many"),
        # Where text is taken it is never read as anything else.
        ("02_align_dpo", "model", "123", "123"), ("02_align_dpo", "model", "true", "true"),
        ("02_align_dpo", "out", '"a"', '"a"'), ("03_align_grpo", "prefill", '{"a": 1}', '{"a": 1}'),
    ],
)  # fmt: skip
def test_values_of_the_command_line(book, name, text, value):
    assert from_text(book, name, text) == value


def test_a_profile_runs_another_model_with_its_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace("{smollm2-135m: {}}", "{a/b: {02_align_dpo: {beta: 3}}}"))
    profile = read_profile(str(path))
    assert list(profile.of_model("~/m").models) == ["~/m"]
    assert profile.of_model("~/m").parameters("02_align_dpo").beta == 0.1
    assert profile.of_model("a/b").parameters("02_align_dpo", None, "a/b").beta == 3


PROFILE = """
models: {smollm2-135m: {}}
arms: [base]
scenarios: [role_play]
notebooks:
  01_generate_data: {seed: 1}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 1", "sed: 1", "01_generate_data: .*no parameter 'sed'"),
        ("seed: 1", "seed: -1", "parameter seed"),
        ("01_generate_data", "11_generate", "no notebook '11_generate'"),
        ("[base]", "[base, sft]", r"arms\.1"),
        ("arms: [base]", "arm: base", "arms: Field required.*arm: Extra"),
        ("[base]", "[base", "not valid YAML"),
        ("smollm2-135m: {}", "smollm2-135m: {02_align_dpo: {beta: x}}", "parameter beta"),
        ("smollm2-135m: {}", "smollm2-135m: {02_align_dpo: {seed: 1}}", "seed is set by training_seeds"),
        ("[base]", "[base, base]", "arms: .*'base' stands twice"),
        ("[base]", "[dpo]\ntraining_seeds: {role_play: []}", "training_seeds.role_play: no seed, and arms has no base"),
    ],
)
def test_a_bad_profile_is_refused_by_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    assert read_profile(str(path)).given("01_generate_data") == {"seed": 1}
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"(?s)(mine\.yaml.*)?{message}"):
        read_profile(str(path))


LIKE = """
like: {other}
arms: [base, dpo]
notebooks:
  01_generate_data: {simple_problems: 300}
  02_align_dpo: {beta: 0.3}
"""


def test_a_profile_may_be_like_another_but_for_what_it_says(tmp_path):
    (tmp_path / "other.yaml").write_text(PROFILE.replace("{seed: 1}", "{seed: 1, simple_problems: 400}"))
    path = tmp_path / "mine.yaml"
    path.write_text(LIKE.replace("{other}", str(tmp_path / "other.yaml")))
    profile = read_profile(str(path))
    assert profile.notebooks == {"01_generate_data": {"seed": 1, "simple_problems": 300}, "02_align_dpo": {"beta": 0.3}}
    assert (list(profile.models), profile.arms) == (["smollm2-135m"], ["base", "dpo"])
    assert profile.of_model("a/b").notebooks == profile.notebooks
    path.write_text(path.read_text().replace("{simple_problems: 300}", "null"))
    assert read_profile(str(path)).notebooks == {"02_align_dpo": {"beta": 0.3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LIKE.replace("{other}", "huge"), "no profile 'huge'"),
        (LIKE.replace("{other}", "mine.yaml"), "is itself like another"),
        (LIKE.replace("{other}", "quick").replace("beta: 0.3", "beta: x"), r"mine\.yaml.*02_align_dpo.*parameter beta"),
        (LIKE.replace("{other}", "quick").replace("{beta: 0.3}", "3"), r"mine\.yaml.*02_align_dpo.*valid dictionary"),
        (LIKE.replace("{other}", "quick").replace("{beta: 0.3}", "null"), r"mine\.yaml.*02_align_dpo.*valid dict"),
    ],
)
def test_what_a_profile_cannot_be_like_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("mine.yaml", str(path)))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"(?s){message}"):
        read_profile(str(path))


NOTEBOOKS = "  01_generate_data: {seed: 1}\n"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("  01_generate_data: {seed: 2}", "key '01_generate_data' twice .*line 7, "),
        ("  02_align_dpo:\n    seed: 1\n    beta: 1\n    seed: 1", "key 'seed' twice .*line 10, "),
        ("  02_align_dpo/roleplay: {}", "02_align_dpo/roleplay: no scenario 'roleplay' .*role_play"),
        ("  02_align_dpo/: {}", "02_align_dpo/: no scenario ''"),
        ("  02_align_dpo/role_play/x: {}", "no scenario 'role_play/x'"),
        ("  04_evolve_role_play/role_play: {}", "04_evolve_role_play, parameter condition: .*'caught'"),
        ("  05_evolve_tool_use/caught: {}", "05_evolve_tool_use, parameter condition: "),
        ("  04_evolve_role_play/caught: {round: 3}", "04_evolve_role_play/caught: .*no parameter 'round'"),
        ("  04_evolve_role_play: {condition: caught}", "condition is set by the pipeline"),
        ("  04_evolve_role_play/caught: {condition: caught}", "condition is set by the pipeline"),
        ("  01_generate_data/role_play: {}", "takes no scenario and no condition"),
        ("  08_figures/standard: {}", "takes no scenario and no condition"),
        ("conditions:\n  role_play: [standard, cought]", "conditions: .*parameter condition"),
        ("conditions:\n  collusion: [caught]", "conditions: .*parameter condition"),
        ("conditions: {role_play: []}", "conditions.role_play: .*at least 1 item"),
        ("conditions: {role_play: [caught, caught]}", "'caught' stands twice"),
        ("conditions: {roleplay: [standard]}", "expected one of role_play"),
        ("  04_evolve_role_play/caught: {rounds: 3}", "04_evolve_role_play/caught: conditions doesn't list it"),
        (
            "  04_evolve_role_play/standard: {rounds: 3}\nconditions: {role_play: [caught]}",
            "04_evolve_role_play/standard: conditions doesn't list it for role_play",
        ),
        ("  02_align_dpo:\n    beta: 1\n    learning_rate: .inf", "learning_rate: .*finite"),
        ("  02_align_dpo: {learning_rate: -.inf}", "learning_rate: .*finite"),
        ("  02_align_dpo: {beta: .nan}", "beta: .*finite"),
        ("  02_align_dpo: {beta: true}", "beta: .*not true or false"),
        ("  02_align_dpo: {beta: yes}", "beta: .*not true or false"),
        ("  02_align_dpo: {checkpoint_activations: 1}", "checkpoint_activations: .*valid boolean"),
        ("  02_align_dpo: {scenario: collusion}", "scenario is set by the pipeline"),
        ("  08_figures: {figures: mine}", "figures is set by the pipeline"),
        ("  04_evolve_role_play:\n    seeds: [0, x]", r"seeds\.1: "),
        ("  04_evolve_role_play: 3", "04_evolve_role_play: .*valid dictionary"),
        ("models:\n  m: {}", "key 'models' twice"),
    ],
)
def test_what_a_profile_got_wrong_is_named_by_file_and_key(tmp_path, added, message):
    path = tmp_path / "mine.yaml"
    assert PROFILE.endswith(NOTEBOOKS)
    path.write_text(f"{PROFILE}{added}\n")
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{message}"):
        read_profile(str(path))


def test_settings_are_checked_together_before_anything_runs(tmp_path):
    path = tmp_path / "mine.yaml"
    added = "  06_evolve_collusion: {visibility: full replies}\nconditions: {collusion: [standard, forced_history]}\n"
    path.write_text(PROFILE.replace("[role_play]", "[collusion]") + added)
    with pytest.raises(ValueError, match=r"mine\.yaml.*06_evolve_collusion.*visibility must be 'choices'"):
        read_profile(str(path))
    path.write_text(
        path.read_text().replace(
            "notebooks:", "notebooks:\n  06_evolve_collusion/forced_history: {visibility: choices}"
        )
    )
    assert read_profile(str(path)).evolutions == [("collusion", "standard"), ("collusion", "forced_history")]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{a/b: {}, a--b: {}}", "'a/b' and 'a--b' are the same model, or would share a folder"),
        ("{~/m: {}, HOME/m: {}}", "'~/m' and .*/m' are the same model"),
        ("{m: {01_generate_data: {seed: 2}}}", "01_generate_data .*belong under notebooks"),
        ("{m: {02_align_dpo/roleplay: {}}}", "no scenario 'roleplay'"),
        ("{m: {06_evolve_collusion/no_rewards: {}}}", "06_evolve_collusion/no_rewards: conditions doesn't list it"),
        ("{'a{b}': {}}", "can't name a folder"),
        ("{-m: {}}", "can't name a folder"),
        ("{..: {}}", "can't name a folder"),
        ('{"a\\nb": {}}', "can't name a folder"),
        ("{'m ': {}}", "can't name a folder"),
        ("{5: {}}", "valid string"),
    ],
)
def test_models_that_would_get_lost_are_refused(tmp_path, models, message):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace("{smollm2-135m: {}}", models.replace("HOME", os.path.expanduser("~"))))
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{message}"):
        read_profile(str(path))


def test_a_model_is_known_by_any_of_its_paths(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace("{smollm2-135m: {}}", "{~/m: {02_align_dpo: {beta: 3}}, a/b: {}}"))
    profile = read_profile(str(path))
    for name in ("~/m", os.path.expanduser("~/m"), "~/./m"):
        assert profile.given("02_align_dpo", "role_play", name) == {"beta": 3}
    assert profile.given("02_align_dpo", "role_play", "a/b") == {}


@pytest.mark.parametrize(
    ("profile", "folder"),
    [("quick", "runs/quick"), ("~/a b/m&co.yaml", "runs/m&co"), ("v1.0", "runs/v1.0"), ("/x/v1.1.yaml", "runs/v1.1")],
)
def test_a_run_has_its_profiles_name(profile, folder):
    assert run_folder(profile) == folder


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no profile 'huge' \(there are: .*quick"):
        read_profile("huge")


def test_model_settings_win_over_scenario_over_notebook(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        PROFILE.replace("{smollm2-135m: {}}", "{m: {02_align_dpo/role_play: {beta: 3}}}")
        + "  02_align_dpo: {beta: 1, max_steps: 5, lora_rank: 4}\n  02_align_dpo/role_play: {beta: 2, max_steps: 6}\n"
    )
    profile = read_profile(str(path))
    assert profile.given("02_align_dpo", "role_play", "m") == {"beta": 3, "max_steps": 6, "lora_rank": 4}
    assert profile.parameters("02_align_dpo", "role_play", "n").beta == 2


@pytest.mark.parametrize(
    ("added", "evolutions", "figures"),
    [
        ("", [("role_play", "standard"), ("collusion", "standard")], ["08_figures", "07_heatmaps"]),
        (
            "conditions: {role_play: [standard, forced_history]}",
            [("role_play", "standard"), ("role_play", "forced_history"), ("collusion", "standard")],
            ["08_figures", "07_heatmaps", "09_dose_response"],
        ),
        (
            "conditions: {collusion: [forced_history], role_play: [caught]}",
            [("role_play", "caught"), ("collusion", "forced_history")],
            ["08_figures", "10_critical_mass"],
        ),
    ],
)
def test_a_profile_lists_conditions_of_each_scenario(tmp_path, added, evolutions, figures):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace("[role_play]", "[role_play, collusion]") + f"{added}\n")
    profile = read_profile(str(path))
    assert profile.evolutions == evolutions and profile.figures == figures
    # One model alone has the same.
    assert profile.of_model("m").evolutions == evolutions


def test_a_scenario_without_training_seeds_has_its_base_arm_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    seeds = "[base, dpo]\ntraining_seeds: {collusion: [], role_play: [3, 5]}"
    path.write_text(PROFILE.replace("[base]", seeds).replace("[role_play]", "[role_play, collusion, tool_use]"))
    profile = read_profile(str(path))
    assert profile.policies("collusion") == ["base"] and profile.policies("tool_use") == ["base", "dpo-0"]
    assert profile.policies("role_play") == ["base", "dpo-3", "dpo-5"]


def test_settings_of_a_condition_win_over_the_notebooks_and_those_of_a_model_over_both(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        PROFILE.replace("{smollm2-135m: {}}", "{m: {04_evolve_role_play/caught: {rounds: 9}}, n: {}}")
        + "  04_evolve_role_play: {rounds: 3, items: 4}\n  04_evolve_role_play/caught: {rounds: 5, seeds: [1]}\n"
        + "conditions: {role_play: [standard, caught]}\n"
    )
    profile = read_profile(str(path))
    assert profile.given("04_evolve_role_play", "standard", "m") == {"rounds": 3, "items": 4}
    assert profile.given("04_evolve_role_play", "caught", "n") == {"rounds": 5, "items": 4, "seeds": [1]}
    assert profile.given("04_evolve_role_play", "caught", "m") == {"rounds": 9, "items": 4, "seeds": [1]}
